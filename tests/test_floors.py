"""What the import contracts of pyproject.toml cannot say about the house: lengths, names, what an import loads."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "npo_core"
LONGEST = 400
"""Lines after which a file asks to be split."""

FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [path for path in FILES if path != PACKAGE / "__init__.py"]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_no_file_is_called_utils():
    assert [named(path) for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}] == []


@pytest.mark.parametrize("room", ["method", "figures"])
def test_a_light_room_loads_without_trl_and_transformers(room):
    # In a process of its own: what one import drags in shows only where nothing else was imported before.
    modules = [named(path)[:-3].replace("/", ".") for path in FILES if path.parent.name == room]
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    code += "print(*sorted({'trl', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
