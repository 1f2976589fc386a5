"""What `make test-range` installs, and when it makes an environment anew. The ends are tried by calling it."""

import json
import subprocess
import sys

import pytest
import ranges
from packaging.requirements import Requirement


def test_the_lowest_end_is_the_lower_bound_of_every_range():
    found = {Requirement(line).name: str(Requirement(line).specifier) for line in ranges.wanted("lowest", "", False)}
    for requirement in map(Requirement, ranges.project()["dependencies"]):
        (lowest,) = [part.version for part in requirement.specifier if part.operator == ">="]
        assert found[requirement.name] == f"=={lowest}"


def test_the_newest_end_is_the_range_itself_so_that_pip_takes_its_newest():
    found = ranges.wanted("newest", "", False)
    assert [line for line in found if "==" not in line] == [
        str(Requirement(line)) for line in ranges.project()["dependencies"]
    ]


@pytest.mark.parametrize("end", ranges.ENDS)
def test_without_a_card_torch_is_the_pinned_one_and_cuda_is_refused(end):
    ask = ranges.asked(end, "", no_card=True)
    (torch,) = [line for line in ask["install"] if Requirement(line).name == "torch"]
    assert torch in (ranges.ROOT / "requirements.txt").read_text().splitlines()
    assert ask["constraints"] and ranges.asked(end, "", no_card=False)["constraints"] == []


def test_a_torch_can_be_named_inside_of_the_range():
    assert "torch==2.14.0" in ranges.wanted("newest", "2.14.0", True)
    with pytest.raises(SystemExit, match=r"torch==2\.12\.0 lies outside of the range"):
        ranges.wanted("newest", "2.12.0", True)


def test_the_tests_tools_are_pinned_at_both_ends():
    for end in ranges.ENDS:
        names = [Requirement(line).name for line in ranges.wanted(end, "", False) if "==" in line]
        assert set(ranges.TOOLS) <= set(names)


def test_an_environment_that_was_cut_off_or_made_for_other_ranges_is_not_used_again(tmp_path):
    ask = ranges.asked("lowest", "", no_card=True)
    assert not ranges.is_whole(tmp_path, ask), "a folder that pip left half way"
    (tmp_path / "made_from.json").write_text(json.dumps(ask))
    assert ranges.is_whole(tmp_path, ask)
    for other in (ranges.asked("newest", "", True), ranges.asked("lowest", "", False), ask | {"python": "3.10.1"}):
        assert not ranges.is_whole(tmp_path, other)


def test_pip_itself_refuses_what_asks_for_cuda(tmp_path):
    """A package that requires what torch's CUDA wheels do, and the constraints of a machine without a card."""
    package = tmp_path / "torch_with_cuda"
    package.mkdir()
    (package / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        "[project]\nname = 'torch-with-cuda'\nversion = '1'\ndependencies = ['triton==3.4.0']\n"
    )
    (tmp_path / "constraints.txt").write_text("\n".join(ranges.NO_CUDA))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation"]
    asked = subprocess.run(
        [*command, "-c", tmp_path / "constraints.txt", package], capture_output=True, text=True, cwd=tmp_path
    )
    assert asked.returncode != 0 and "triton<0" in asked.stdout + asked.stderr
