"""The three files that describe the environment agree with each other, and with what is installed."""

import re
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler import MatchSpec
from rattler.exceptions import InvalidMatchSpecError

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
CONDA_LINES = [line for line in DEPENDENCIES if isinstance(line, str)]
LOCK_LINES = [
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
]
EXACT = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+( ?; .+)?")
"""`name==version` with an optional marker. A local version (`+cpu`) would exist on one machine only."""


def pins(lines: list[str]) -> dict[str, str]:
    """Canonical package name to its one pinned version; raises ValueError where a line pins none."""
    pinned = {}
    for requirement in map(Requirement, lines):
        (specifier,) = requirement.specifier
        pinned[canonicalize_name(requirement.name)] = specifier.version
    return pinned


def closure(names: list[str]) -> dict[str, str]:
    """Installed version of every package that `names` need, themselves included, on this interpreter."""
    found: dict[str, str] = {}
    visited: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(name), "") for name in names]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in visited:
            continue
        visited.add((name, extra))
        found[name] = version(name).partition("+")[0]
        for requirement in map(Requirement, distribution(name).requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                todo += [(needed, ""), *((needed, wanted) for wanted in requirement.extras)]
    return found


LOCK = pins(LOCK_LINES)
DIRECT = pins(PYPROJECT["dependencies"])
DEV = pins(PYPROJECT["optional-dependencies"]["dev"])

on_reference_platform = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info[:2] != (3, 11) or not version("torch").endswith("+cpu"),
    reason="the lock is resolved for Python 3.11 on Linux with a CPU torch",
)


@pytest.mark.parametrize("line", LOCK_LINES + PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["dev"])
def test_every_requirement_is_pinned(line):
    assert EXACT.fullmatch(line), f"{line!r} is not name==version"


@pytest.mark.parametrize("line", ["torch", "torch>=2.13", "torch==2.13.0+cpu", "torch==2.*", "-e ."])
def test_a_loose_requirement_is_seen(line):
    assert not EXACT.fullmatch(line)


def test_lock_is_sorted_and_names_each_package_once():
    names = [canonicalize_name(Requirement(line).name) for line in LOCK_LINES]
    assert names == sorted(set(names))


def test_lock_has_neither_torchvision_nor_cuda():
    # torchvision beside a CPU torch breaks `import transformers.image_utils`; CUDA packages follow torch on their own.
    assert not [name for name in LOCK if re.match(r"torchvision|torchaudio|nvidia|cuda|cupy|triton", name)]


def test_direct_pins_agree_with_the_lock():
    assert {name: LOCK.get(name) for name in DIRECT} == DIRECT


def test_development_tools_stay_out_of_the_lock():
    assert not DEV.keys() & LOCK.keys()


@on_reference_platform
def test_lock_is_exactly_what_the_direct_packages_need():
    assert closure(list(DIRECT)) == LOCK


@on_reference_platform
def test_development_extra_is_exactly_what_its_tools_need():
    assert closure([*DIRECT, *DEV]) == LOCK | DEV


@pytest.mark.parametrize("line", CONDA_LINES)
def test_conda_accepts_the_line(line):
    assert MatchSpec(line, strict=True).name is not None


def test_conda_refuses_a_malformed_line():
    with pytest.raises(InvalidMatchSpecError):
        MatchSpec("python>=", strict=True)


def test_conda_brings_a_python_that_the_package_supports():
    (line,) = [line for line in CONDA_LINES if line.startswith("python=")]
    assert line.partition("=")[2] in Requirement(f"python{PYPROJECT['requires-python']}").specifier


def test_environment_yml_is_the_lock_plus_the_gpu_extra():
    (pip_section,) = [entry for entry in DEPENDENCIES if isinstance(entry, dict)]
    gpu = PYPROJECT["optional-dependencies"]["gpu"]
    assert [str(Requirement(line)) for line in pip_section["pip"]] == [
        str(Requirement(line)) for line in [*LOCK_LINES, *gpu]
    ]
