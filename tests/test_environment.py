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
EXTRAS = PYPROJECT["optional-dependencies"]
DEPENDENCIES = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
CONDA_LINES = [line for line in DEPENDENCIES if isinstance(line, str)]
RUNTIME, TOOLS, SITE = (
    [line for line in part.splitlines() if line and not line.startswith("#")]
    for part in re.split(
        r"# Development tools \(extra `dev`\)\n|# Documentation site \(extra `docs`\).*\n",
        (ROOT / "requirements.txt").read_text(),
    )
)
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


LOCK, DEV, DOCS = pins(RUNTIME), pins(TOOLS), pins(SITE)
CORE = list(map(Requirement, PYPROJECT["dependencies"]))
LAB, REAL, DEVELOPMENT, DOCUMENTATION = (
    list(map(Requirement, EXTRAS[name])) for name in ("lab", "real", "dev", "docs")
)

on_reference_platform = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info[:2] != (3, 11) or not version("torch").endswith("+cpu"),
    reason="the lock is resolved for Python 3.11 on Linux with a CPU torch",
)


def names(requirements: list[Requirement]) -> list[str]:
    """Canonical names of requirements, in their order."""
    return [canonicalize_name(requirement.name) for requirement in requirements]


def test_every_line_of_the_lock_is_pinned():
    assert [line for line in [*RUNTIME, *TOOLS, *SITE, *EXTRAS["gpu"]] if not EXACT.fullmatch(line)] == []


@pytest.mark.parametrize("line", ["torch", "torch>=2.13", "torch==2.13.0+cpu", "torch==2.*", "-e ."])
def test_a_loose_requirement_is_seen(line):
    assert not EXACT.fullmatch(line)


def test_the_package_asks_for_ranges_with_both_ends():
    """A pin would replace what a user's own environment has; an open end would promise what nobody has tried."""
    for requirement in [*CORE, *LAB, *REAL, *DEVELOPMENT, *DOCUMENTATION, *map(Requirement, EXTRAS["study"])]:
        operators = sorted(part.operator for part in requirement.specifier)
        assert operators == ["<", ">="], f"{requirement} is not name>=lowest,<first untried"


def test_the_lock_lies_in_every_range():
    for requirement in [*CORE, *LAB, *REAL]:
        assert LOCK[canonicalize_name(requirement.name)] in requirement.specifier
    for requirement in DEVELOPMENT:
        assert DEV[canonicalize_name(requirement.name)] in requirement.specifier
    for requirement in DOCUMENTATION:
        assert DOCS[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_notebooks_need_what_the_figures_need():
    assert set(EXTRAS["study"]) <= set(EXTRAS["lab"])


def test_the_tests_need_the_tasks_that_a_run_can_take_as_data():
    assert set(EXTRAS["reasoning-gym"]) <= set(EXTRAS["dev"])


def test_the_core_asks_for_nothing_of_notebooks_and_figures():
    assert not set(names(CORE)) & {*names(LAB), *names(REAL), *names(DEVELOPMENT)}


def test_the_parts_of_the_lock_are_sorted_and_name_each_package_once():
    for lines in (RUNTIME, TOOLS, SITE):
        found = names(list(map(Requirement, lines)))
        assert found == sorted(set(found))
    assert not DEV.keys() & LOCK.keys() and not DOCS.keys() & (LOCK | DEV).keys()


def test_lock_has_neither_torchvision_nor_cuda():
    # torchvision beside a CPU torch breaks `import transformers.image_utils`; CUDA packages follow torch on their own.
    assert not [name for name in LOCK if re.match(r"torchvision|torchaudio|nvidia|cuda|cupy|triton", name)]


@on_reference_platform
def test_lock_is_exactly_what_core_notebooks_and_real_model_need():
    # setuptools builds the package, and stays: torch needs it on some platforms.
    assert closure([*names(CORE), *names(LAB), *names(REAL), "setuptools"]) == LOCK


@on_reference_platform
def test_development_tools_are_exactly_what_the_extra_needs():
    assert closure([*names(CORE), *names(LAB), *names(REAL), *names(DEVELOPMENT), "setuptools"]) == LOCK | DEV


@pytest.mark.parametrize("line", CONDA_LINES)
def test_conda_accepts_the_line(line):
    assert MatchSpec(line, strict=True).name is not None


def test_conda_refuses_a_malformed_line():
    with pytest.raises(InvalidMatchSpecError):
        MatchSpec("python>=", strict=True)


def test_conda_brings_a_python_that_the_package_supports():
    (line,) = [line for line in CONDA_LINES if line.startswith("python=")]
    assert line.partition("=")[2] in Requirement(f"python{PYPROJECT['requires-python']}").specifier


def test_environment_yml_is_the_lock_without_tools_plus_the_gpu_extra():
    (pip_section,) = [entry for entry in DEPENDENCIES if isinstance(entry, dict)]
    assert [str(Requirement(line)) for line in pip_section["pip"]] == [
        str(Requirement(line)) for line in [*RUNTIME, *EXTRAS["gpu"]]
    ]
