"""The committed figures: the idea always, those of a study from its results, all of them or none."""

import subprocess
import sys
from pathlib import Path

import pytest
from legible import assert_legible

from npo_core import figures
from npo_core.figures.estimates import signed
from npo_core.figures.style import ARM_LOOKS, arm_looks
from npo_core.study.arms import ARMS
from npo_core.study.real_results import REAL_ARMS
from npo_core.study.results import ABOUT

ROOT = Path(__file__).parents[2]


def test_the_idea_is_committed_as_it_is_drawn(tmp_path):
    [drawn] = figures.draw_study(tmp_path, tmp_path / "figures")
    assert drawn.with_suffix(".svg").read_bytes() == (ROOT / "figures" / "idea.svg").read_bytes(), "run make figures"


def test_the_idea_shows_the_advantages_of_the_method():
    figure = figures.guided_group()
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("−0.35") == 7
    assert texts.count("+2.47") == 1
    assert texts.count("0") == texts.count("✗") - 7 == 8
    assert_legible({"idea": figure}, ticks=False)


def test_without_a_study_the_command_says_so(tmp_path):
    command = [sys.executable, "-m", "npo_core", "figures", "--results", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        str(tmp_path / "out" / "idea.png"),
        f"{tmp_path} holds no results of a study; `make study` makes them.",
    ]


def test_nothing_is_drawn_from_half_a_study(tmp_path):
    (tmp_path / ABOUT).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"lacks .*; `python -m npo_core study`"):
        figures.draw_study(tmp_path, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_every_arm_has_a_look_of_its_own():
    assert set(ARM_LOOKS) == {*ARMS, *REAL_ARMS}
    assert len(set(ARM_LOOKS.values())) == len(ARM_LOOKS)


def test_an_arm_has_one_look_and_other_labels_take_what_is_free():
    looks = arm_looks(["GRPO", "my run", "AutoNPO", "another"])
    assert (looks["GRPO"], looks["AutoNPO"]) == (ARM_LOOKS["GRPO"], ARM_LOOKS["AutoNPO"])
    assert len({color for color, _ in looks.values()}) == 4
    assert list(looks) == ["GRPO", "my run", "AutoNPO", "another"]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(-0.0004, 3, "0.000"), (0.0004, 3, "0.000"), (-0.0006, 3, "−0.001"), (0.01, 2, "+0.01")],
)
def test_what_rounds_to_zero_has_no_sign(value, digits, text):
    assert signed(value, digits) == text
