"""The package as a stranger has it: a wheel, installed into a folder that is only read."""

import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from committed import committed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git has, so that nothing is left in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in committed(ROOT):
        place = path.relative_to(ROOT)
        if place.is_relative_to("npo_core") or place.is_relative_to("data/base") or len(place.parts) == 1:
            (source / place).parent.mkdir(parents=True, exist_ok=True)
            (source / place).write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, source]
    subprocess.run(build, check=True)
    (built,) = target.glob("npo_core-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A stand-in for `site-packages` that holds the package alone and may not be written to."""
    site = tmp_path_factory.mktemp("site")
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    for path in [site, *site.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    yield site
    for path in [site, *site.rglob("*")]:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def call(site: Path, caller: Path, *arguments: str | Path, **variables: str) -> str:
    """Standard output of a Python process that has the installed copy and is started in a folder of its caller's."""
    inherited = {name: value for name, value in os.environ.items() if name != "NPO_RUNS"}
    environment = {**inherited, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    before = sorted(site.rglob("*"))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=caller,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(site.rglob("*")) == before  # permissions do not stop root
    return done.stdout


def test_every_folder_with_code_is_a_package_of_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "npo_core").rglob("*.py")}
    assert sorted(listed) == sorted([*(".".join(folder.parts) for folder in folders), "npo_core.base"])


def test_whatever_lies_beside_the_code_is_in_the_wheel(wheel):
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    beside = {path.relative_to(ROOT) for path in (ROOT / "npo_core").rglob("*") if path.is_file()}
    expected = {str(path) for path in beside if "__pycache__" not in path.parts}
    policies = [path for path in (ROOT / "data" / "base").rglob("*") if path.is_file()]
    expected |= {f"npo_core/base/{path.relative_to(ROOT / 'data' / 'base')}" for path in policies}
    assert packed == expected


def test_an_installed_copy_finds_its_policies_and_keeps_runs_with_its_caller(installed, tmp_path):
    ask = (
        "import npo_core; from npo_core.runs.folder import *; from npo_core.runs.config import resolve_config;"
        "from npo_core.world.warmstart import base_policy_folder;"
        "print(npo_core.__file__, npo_core.__version__, runs_folder(), environment()['git_revision'], sep='\\n');"
        "[print(base_policy_folder(resolve_config('grpo', name))) for name in ('smoke', 'cpu')]"
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    shipped = installed / "npo_core" / "base"
    home, found, runs, revision, *policies = call(installed, tmp_path, "-c", ask).splitlines()
    assert Path(home).is_relative_to(installed)
    assert (found, runs, revision) == (version, str(tmp_path / "data" / "runs"), "None")
    assert [Path(policy).parent for policy in policies] == [shipped, shipped]
    told = "from npo_core.runs.folder import runs_folder; print(runs_folder())"
    assert call(installed, tmp_path, "-c", told, NPO_RUNS="elsewhere") == "elsewhere\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["autonpo"], ["grpo", "--set", "compute_steps=2", "--root", "mine"]],
    ids=["autonpo", "another root"],
)
def test_an_installed_copy_trains_and_writes_where_it_may(installed, tmp_path, arguments):
    said = call(installed, tmp_path, "-m", "npo_core", *arguments, "--preset", "smoke", "--quiet")
    root = tmp_path / "mine" if "--root" in arguments else tmp_path / "data" / "runs"
    (run,) = [path for path in root.iterdir() if path.name.startswith(arguments[0])]
    assert (run / "result.json").is_file()
    assert (tmp_path / said.split(": ")[0]) == run
    assert [path.name for path in tmp_path.iterdir()] == [root.relative_to(tmp_path).parts[0]]
