"""Parcels for `gpu-check` on a machine without a network: wheels of what it lacks, the model, and a script.

The machine has `BARE` and what they bring. All else travels as wheels, at the releases of requirements.txt, this
package and the model among them; a file that does not fit into a parcel is cut. The script joins, checks, installs.
"""

import hashlib
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import whole_folder
from ..runs.folder import checkout
from ..world import smollm

BARE = ("torch", "transformers", "accelerate", "peft", "pandas", "pyarrow", "pillow")
"""What the machine has, with what it needs itself."""

PACKAGES = (
    *("trl", "datasets", "dill", "multiprocess", "xxhash", "jaxtyping", "wadler_lindig", "scipy"),
    *("gguf", "requests", "charset-normalizer", "urllib3"),
)
"""What travels, beside this package and the model: all that they need and `BARE` does not bring."""

PARCEL_MIB = 64
"""Most that a parcel holds, unless another number is given."""

SPARE = 1 << 16
"""Bytes of a parcel that are kept for the script and the sums."""

PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)),
    *("manylinux2014_x86_64", "manylinux1_x86_64"),
)
"""Wheels that a Linux machine with an NVIDIA card can use, newest first."""

SUMS, SCRIPT, REVISION = "SHA256SUMS", "run.sh", "REVISION"
"""Files of the last parcel: sums of the whole wheels, what is started there, and the revision of the code."""


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of a file, which is whole if `number` is 0, else the part of this number, from 1."""

    file: Path
    start: int
    stop: int
    number: int

    @property
    def name(self) -> str:
        """Name in the parcel."""
        return self.file.name if not self.number else f"{self.file.name}.part-{self.number:02d}"


def here() -> str:
    """Release of Python that this is run by, as `--python` has it."""
    return ".".join(map(str, sys.version_info[:2]))


def pack(folder: Path, python: str, mib: int = PARCEL_MIB) -> list[Path]:
    """Fetch or build what travels, and write it as parcels.

    Args:
        folder: Where the parcels go; must not be there yet.
        python: Release of Python on that machine, such as "3.12".
        mib: Most that a parcel holds.

    Returns:
        Folders of the parcels, in order.

    Raises:
        ValueError: Not a release of Python, parcels too small, a folder that is there, an installed copy of this
            package (which has no requirements.txt), or a model that is not the pinned one.
        FileNotFoundError: pip does not get a package.
    """
    root = checkout()
    if root is None:
        raise ValueError("Parcels are made from a checkout: an installed copy does not have the pinned releases.")
    if not re.fullmatch(r"3\.\d+", python):
        raise ValueError(f"--python is {python!r}; give a release such as 3.12.")
    if mib < 1:
        raise ValueError(f"--parcel-mib is {mib}; a parcel holds at least 1 MiB.")
    if folder.exists():
        raise ValueError(f"{folder} is there already; give a new folder, or remove it.")
    with tempfile.TemporaryDirectory() as aside:
        wheels = Path(aside) / "wheels"
        wheels.mkdir()
        _build(root, Path(aside) / "source", wheels)
        for pinned in pins(root, PACKAGES):
            _download(pinned, python, wheels)
        model = smollm.fetch(Path(aside) / "model")
        return write_parcels([*sorted(wheels.glob("*.whl")), model], folder, mib, revision(root))


def pins(root: Path, names: Sequence[str]) -> list[str]:
    """`name==release` of packages, as requirements.txt has them.

    Raises:
        ValueError: One is not in there.
    """
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = {plain(line.partition("==")[0]): line.strip() for line in lines if "==" in line and line[0] != "#"}
    if missing := [name for name in names if plain(name) not in found]:
        raise ValueError(f"requirements.txt has no release of {', '.join(missing)}.")
    return [found[plain(name)] for name in names]


def plain(name: str) -> str:
    """A package's name as an index has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def revision(root: Path) -> str:
    """Revision of a checkout, with "-dirty" behind it where files were changed; "unknown" without git."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _build(root: Path, source: Path, wheels: Path) -> None:
    """This package's wheel, built from a copy, so that nothing is left in the checkout."""
    for name in ("npo_core", "data/base"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    _pip(["wheel", "--no-deps", "--wheel-dir", str(wheels), str(source)], "a wheel of npo_core")


def _download(pinned: str, python: str, wheels: Path) -> None:
    asked = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), pinned]
    other = ["--implementation", "cp", "--python-version", python]
    _pip([*asked, *other, *(word for name in PLATFORMS for word in ("--platform", name))], pinned)


def _pip(arguments: Sequence[str], what: str) -> None:
    command = [sys.executable, "-m", "pip", "--no-input", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise FileNotFoundError(f"pip does not get {what} ({lines[-1]}). Connect to a package registry.")


def cut(files: Sequence[Path], most: int) -> list[list[Piece]]:
    """Files as few parcels of about one size, in order; one that does not fit into what is left of a parcel is cut.

    Args:
        files: Files, none of them empty.
        most: Bytes that a parcel holds at most, at least 1.
    """
    whole = sum(file.stat().st_size for file in files)
    most = math.ceil(whole / math.ceil(whole / most))
    parcels: list[list[Piece]] = [[]]
    room = most
    for file in files:
        size, start, number = file.stat().st_size, 0, 0
        while start < size:
            if not room:
                parcels.append([])
                room = most
            stop = min(size, start + room)
            number = number + 1 if number or stop < size else 0
            parcels[-1].append(Piece(file, start, stop, number))
            room -= stop - start
            start = stop
    return parcels


def write_parcels(files: Sequence[Path], folder: Path, mib: int, made_from: str) -> list[Path]:
    """Write files as parcels, script and sums in the last; the folder appears when it is whole.

    Args:
        files: Wheels.
        folder: Where the parcels go.
        mib: Most that a parcel holds.
        made_from: Revision of the code.

    Returns:
        Folders of the parcels, in order.
    """
    places = []
    with whole_folder(folder, replace=False) as unfinished:
        for number, pieces in enumerate(cut(files, mib * 2**20 - SPARE), 1):
            place = unfinished / f"parcel-{number:02d}"
            place.mkdir(parents=True)
            places.append(place)
            for piece in pieces:
                with piece.file.open("rb") as stream:
                    stream.seek(piece.start)
                    (place / piece.name).write_bytes(stream.read(piece.stop - piece.start))
        sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
        (places[-1] / SUMS).write_text("".join(sums), encoding="utf-8")
        (places[-1] / REVISION).write_text(f"{made_from}\n", encoding="utf-8")
        shutil.copy(Path(__file__).with_name("gpu_run.sh"), places[-1] / SCRIPT)
    return [folder / place.name for place in places]
