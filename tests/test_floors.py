"""The house has floors: a file imports from lower floors, or from files to its left on its own."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "npo_core"
LONGEST = 400
"""Lines after which a file asks to be split."""

HOUSE = {
    # floor 1, maths: tensors in, tensors out
    "groups": (1, 0),
    "ratios": (1, 1),
    "stats": (1, 2),
    "learning_signal": (1, 3),
    "trigger": (1, 4),
    "signal_curve": (1, 5),
    # floor 2, records: configuration, run folder, trajectories, roll-back
    "validation": (2, 0),
    "settings": (2, 1),
    "config": (2, 2),
    "processes": (2, 3),
    "runs": (2, 4),
    "shared_run": (2, 5),
    "trajectories": (2, 6),
    "checkpoints": (2, 7),
    "progress": (2, 8),
    "signal_report": (2, 9),
    "findings": (2, 10),
    "arms": (2, 11),
    "results": (2, 12),
    "comparisons": (2, 13),
    "verdicts": (2, 14),
    "signal_claims": (2, 15),
    "claims": (2, 16),
    "benchmarks": (2, 17),
    # floor 3, world: answers, tasks, what rollouts share, policies
    "verifiers": (3, 0),
    "tasks": (3, 1),
    "prompts": (3, 2),
    "sharing": (3, 3),
    "policies": (3, 4),
    "pretrained": (3, 5),
    "merging": (3, 6),
    "warmstart": (3, 7),
    "rowrules": (3, 8),
    "datafiles": (3, 9),
    # floor 4, engine: rollouts, guides, trainer
    "sampling": (4, 0),
    "sharded": (4, 1),
    "engine": (4, 2),
    "sources": (4, 3),
    "replay": (4, 4),
    "arguments": (4, 5),
    "recording": (4, 6),
    "admission": (4, 7),
    "trainer": (4, 8),
    "gradients": (4, 9),
    # floor 5, procedures, and the plots
    "evaluation": (5, 0),
    "agreement": (5, 1),
    "fingerprint": (5, 2),
    "watch": (5, 3),
    "controller": (5, 4),
    "interventions": (5, 5),
    "autonpo": (5, 6),
    "baselines": (5, 7),
    "prefix": (5, 8),
    "factory": (5, 9),
    "plan": (5, 10),
    "stages": (5, 11),
    "launch": (5, 12),
    "measure": (5, 13),
    "signal_stages": (5, 14),
    "gain": (5, 15),
    "study": (5, 16),
    "evidence": (5, 17),
    "map_of_gain": (5, 18),
    "figures": (5, 19),
    # floor 6, the command line
    "bench": (6, 0),
    "__main__": (6, 1),
}
"""Module or subpackage of npo_core to (floor, position from the left). A new file is entered here."""

MATHS = {name for name, (floor, _) in HOUSE.items() if floor == 1}
MATHS_MAY_IMPORT = sys.stdlib_module_names | {"torch", "numpy", "scipy", "jaxtyping"}
FIGURES_MAY_NOT_IMPORT = {"trl", "transformers", "torch.nn"}


def module_of(path: Path) -> str:
    """Dotted name of a source file, packages without `__init__`: `npo_core.tasks.families`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False) -> list[tuple[int, str]]:
    """Line and absolute dotted name of every import in `source`, those inside functions included.

    `from a import b` gives `a.b`, whether b is a module or a name in one.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = len(parents) - node.level + is_package
                origin = ".".join([*parents[:kept], *([node.module] if node.module else [])])
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
    return found


def room(name: str) -> str | None:
    """The entry of HOUSE that a dotted name lies in, `__init__` for the package itself, None outside of npo_core."""
    package, _, rest = name.partition(".")
    if package != "npo_core":
        return None
    return rest.partition(".")[0] or "__init__"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What in `source` goes against the rule, one readable line each."""
    here = room(module)
    complaints = []
    for line, name in imports(source, module, is_package):
        there = room(name)
        if there is None:
            top = name.partition(".")[0]
            if here in MATHS and top not in MATHS_MAY_IMPORT:
                complaints.append(f"line {line}: floor 1 is maths, it may not import {top}")
            if here == "figures" and any(f"{name}.".startswith(f"{taboo}.") for taboo in FIGURES_MAY_NOT_IMPORT):
                complaints.append(f"line {line}: figures plots run folders, it may not import {name}")
        elif name == "npo_core.__version__" or there == here:
            continue
        elif there not in HOUSE:
            complaints.append(f"line {line}: import {name} from the file that defines it, not from the package's face")
        elif HOUSE[there] >= HOUSE[here]:
            complaints.append(f"line {line}: {here} {HOUSE[here]} may not import {there} {HOUSE[there]}")
        elif here == "figures" and HOUSE[there][0] > 2:
            complaints.append(f"line {line}: figures reads run folders, it may not import {there}")
    return complaints


FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [path for path in FILES if path != PACKAGE / "__init__.py"]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ROOMS, ids=named)
def test_every_file_has_its_place(path):
    assert room(module_of(path)) in HOUSE, (
        f"{named(path)} has no floor: enter it in HOUSE in tests/test_floors.py, with its floor and position"
    )


@pytest.mark.parametrize("path", [path for path in ROOMS if room(module_of(path)) in HOUSE], ids=named)
def test_imports_go_down_or_left(path):
    assert violations(path.read_text(), module_of(path), path.name == "__init__.py") == []


def test_a_subpackage_has_no_import_cycle():
    graph = {}
    for path in ROOMS:
        module = module_of(path)
        if module.count(".") > 1:
            names = {name for _, name in imports(path.read_text(), module)}
            graph[module] = {
                other
                for other in map(module_of, ROOMS)
                if other.count(".") > 1 and any(f"{name}.".startswith(f"{other}.") for name in names)
            }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_no_file_is_called_utils():
    assert [named(path) for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}] == []


def test_maths_and_figures_load_without_trl_and_transformers():
    # In a process of its own: what one import drags in shows only where nothing else was imported before.
    light = [
        f"npo_core.{name}"
        for name in [*sorted(MATHS), "figures"]
        if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()
    ]
    code = f"import sys, importlib\nfor name in {light!r}: importlib.import_module(name)\n"
    code += "print(*sorted({'trl', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("ratios", "from .groups import gate", None),
        ("groups", "from .ratios import log_ratio", "may not import ratios"),
        ("groups", "from . import ratios", "may not import ratios"),
        ("groups", "def f():\n    import npo_core.runs", "may not import runs"),
        ("groups", "from __future__ import annotations\nimport math, torch.nn\nfrom scipy import stats", None),
        ("groups", "import pandas as pd", "may not import pandas"),
        ("trainer", "from npo_core import groups, sources", None),
        ("trainer", "from npo_core import NPOConfig", "not from the package's face"),
        ("trainer", "from npo_core import __version__", None),
        ("tasks.problems", "from .families import FAMILIES\nfrom ..verifiers import verify", None),
        ("tasks.problems", "from ..policies import tiny", "may not import policies"),
        ("figures", "from .runs import Run\nimport seaborn", None),
        ("figures", "from .trainer import NPOTrainer", "may not import trainer"),
        ("figures", "from torch import nn", "may not import torch.nn"),
        ("figures", "def f():\n    import transformers", "may not import transformers"),
        ("stages", "from .figures import curves", "may not import figures"),
        ("__main__", "from . import figures, stages", None),
    ],
)
def test_the_rule_itself(module, source, complaint):
    found = violations(source, f"npo_core.{module}")
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1
        assert complaint in found[0]
