"""Both ends of the ranges in pyproject.toml: `python tests/ranges.py [lowest] [newest]`, which `make test-range` calls.

Each end gets an environment in `.venv-range`, made once and used again while the ranges, the pins and Python stay as
they are. In each, TRL's contract and the trainer's tests run, then a small training through AutoNPO.

A torch that brings CUDA to a machine without an NVIDIA card is refused: gigabytes that nothing there could use. On
Linux without a card both ends have the torch of requirements.txt, unless another is named.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".venv-range"
ENDS = ("lowest", "newest")
TOOLS = ("pytest", "hypothesis", "beartype")
"""What the tests below import; pinned as everywhere."""
TESTS = ("tests/trainer/test_trl_contract.py", "tests/trainer/test_trainer.py")
NO_CUDA = ("triton<0", "nvidia-nccl-cu12<0", "nvidia-nccl-cu13<0", "cuda-toolkit<0")
"""No release fits these constraints, and every torch with CUDA for Linux asks for one of the packages."""


def without_card() -> bool:
    """Whether torch of the package index would bring CUDA to a machine that has no NVIDIA card."""
    return sys.platform == "linux" and shutil.which("nvidia-smi") is None


def project() -> dict:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(names: tuple[str, ...]) -> list[str]:
    """The lines of requirements.txt for these packages."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for name in names for line in lines if line.startswith(f"{name}==")]


def wanted(end: str, torch: str, no_card: bool) -> list[str]:
    """What one end installs: the core's packages, the lowest release of each range or the range, for its newest.

    Args:
        end: "lowest" or "newest".
        torch: release of torch; "" for that of the end, and for the pinned one where there is no card.
        no_card: see `without_card`.
    """
    found = []
    for requirement in map(Requirement, project()["dependencies"]):
        (lowest,) = [part.version for part in requirement.specifier if part.operator == ">="]
        line = f"{requirement.name}=={lowest}" if end == "lowest" else str(requirement)
        if requirement.name == "torch" and (torch or no_card):
            line = f"torch=={torch}" if torch else pinned(("torch",))[0]
            if not requirement.specifier.contains(line.removeprefix("torch==")):
                raise SystemExit(f"{line} lies outside of the range of pyproject.toml, {requirement}.")
        found.append(line)
    return found + pinned(TOOLS)


def asked(end: str, torch: str, no_card: bool) -> dict[str, object]:
    """What an environment was made from; another one is needed where this differs."""
    constraints = list(NO_CUDA) if no_card else []
    return {"python": platform.python_version(), "install": wanted(end, torch, no_card), "constraints": constraints}


def is_whole(folder: Path, ask: dict[str, object]) -> bool:
    """Whether `folder` holds an environment that was finished from just this; a half one has no `made_from.json`."""
    record = folder / "made_from.json"
    return record.exists() and json.loads(record.read_text()) == ask


def make(end: str, torch: str) -> Path:
    """The environment of one end, made where no whole one is there; SystemExit where pip finds no set that fits."""
    ask, folder = asked(end, torch, without_card()), CACHE / end
    place = folder.relative_to(ROOT)
    if is_whole(folder, ask):
        print(f"{place} is whole and is used again; `rm -r {place}` makes it from the releases of today", flush=True)
        return folder
    print(f"Making {place}, 2 GB and a few minutes, from", *ask["install"], flush=True)
    if ask["constraints"]:
        print("No NVIDIA card here: packages of CUDA are refused (TORCH=2.14.0 names another torch)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    (folder / "constraints.txt").write_text("".join(f"{line}\n" for line in ask["constraints"]))
    pip = [folder / "bin/python", "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
    command = [*pip, "-c", folder / "constraints.txt", *ask["install"], "-e", "."]
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"PIP_NO_INPUT": "1"}).returncode:
        raise SystemExit(
            f"pip could not make {place}, see above. Where it names triton, nvidia-nccl or cuda-toolkit, it found no "
            "torch without CUDA: point pip to wheels of torch for the CPU (PIP_FIND_LINKS), and call this again."
        )
    partial = folder / "made_from.json.part"
    partial.write_text(json.dumps(ask))
    partial.rename(folder / "made_from.json")
    return folder


def installed(folder: Path, ask: list[str]) -> str:
    """Packages of `ask` at the releases that an environment has."""
    command = [folder / "bin/python", "-m", "pip", "--disable-pip-version-check", "list", "--format=json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    names = {Requirement(line).name for line in ask}
    return " ".join(f"{each['name']}=={each['version']}" for each in found if each["name"].lower() in names)


def try_out(folder: Path, arguments: list[str]) -> None:
    """Tests, then a training of its own in an environment; raises CalledProcessError where one fails."""
    python = folder / "bin/python"
    subprocess.run([python, "-m", "pytest", "-q", *TESTS, *arguments], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory(dir=folder) as runs:  # a finished run in a folder that stays would only be loaded
        training = ["-m", "npo_core", "autonpo", "--preset", "smoke", "--root", runs, "--quiet"]
        subprocess.run([python, *training], cwd=ROOT, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ends", nargs="*", choices=ENDS, help="both, where none is named")
    parser.add_argument("--torch", default="", help="release of torch, for both ends")
    parser.add_argument("--pytest", default="", help="more arguments for pytest")
    given = parser.parse_args()
    for end in given.ends or ENDS:
        print(f"== {end} end of the ranges", flush=True)
        folder = make(end, given.torch)
        print("Installed:", installed(folder, wanted(end, given.torch, without_card())), flush=True)
        try:
            try_out(folder, shlex.split(given.pytest))
        except subprocess.CalledProcessError as failed:
            raise SystemExit(f"{end} end: `{shlex.join(map(str, failed.cmd))}` failed, see above.") from None
        print(f"== {end} end: passed", flush=True)
