"""What the import contracts of pyproject.toml cannot say about the house: lengths, names, what an import loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "npo_core"
LONGEST = 400
"""Lines after which a file asks to be split."""

MODULES, LINES = 18, 2800
"""What `from npo_core import NPOTrainer` may load of the package."""

FILES = sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_is_too_long():
    lines = {named(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_no_file_is_called_utils():
    assert [named(path) for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}] == []


def behind(*lines: str) -> list[dict[str, Path]]:
    """Modules that are loaded after each of some imports, with their files, in a process that imported nothing else.

    A later import's are those of the earlier ones too: one process for all, since torch alone takes seconds.
    """
    files = "{name: getattr(module, '__file__', None) for name, module in sorted(sys.modules.items())}"
    told = f"print(json.dumps({files}))"
    code = "\n".join(["import json, sys", *(f"{line}\n{told}" for line in lines)])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [{name: Path(str(file)) for name, file in json.loads(entry).items()} for entry in done.stdout.splitlines()]


def ours(loaded: dict[str, Path]) -> set[str]:
    return {name for name in loaded if name.partition(".")[0] == "npo_core"}


@pytest.fixture(scope="module")
def library() -> list[dict[str, Path]]:
    """What is loaded after the package, its front door, and a measurement of anybody's checkpoints."""
    return behind(
        "import npo_core",
        "from npo_core import NPOConfig, NPOTrainer, GuidanceCache",
        "from npo_core import measure_folder",
    )


def test_the_package_alone_is_light(library):
    loaded = library[0]
    assert ours(loaded) == {"npo_core"}
    assert not {"torch", "trl", "transformers"} & loaded.keys()


def test_the_front_door_is_small(library):
    loaded = library[1]
    lines = sum(len(loaded[name].read_text().splitlines()) for name in ours(loaded))
    assert len(ours(loaded)) <= MODULES, sorted(ours(loaded))
    assert lines <= LINES
    assert {name.split(".")[1] for name in ours(loaded) if name.count(".") > 1} == {"guidance", "method", "trainer"}


def test_a_measurement_of_anybodys_checkpoints_needs_no_study_figures_or_tasks(library):
    loaded = ours(library[2])
    assert "npo_core.stages.measure" in loaded
    assert not [name for name in loaded if name.startswith(("npo_core.study", "npo_core.figures"))]
    assert [name for name in loaded if name.startswith("npo_core.world.tasks")] == []


def test_figures_are_drawn_without_trl_and_transformers():
    (loaded,) = behind("import npo_core.figures, npo_core.method.trigger")
    assert "npo_core.figures" in loaded and not {"trl", "transformers"} & loaded.keys()
