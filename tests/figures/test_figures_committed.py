"""The committed figures: drawn from the committed results, all of them or none."""

import shutil
from pathlib import Path

import pytest

from npo_core import figures
from npo_core.study.findings import results_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_committed_figure_of_the_study_is_drawn_from_the_committed_results(tmp_path):
    drawn = figures.draw_study(results_folder(), tmp_path)
    assert len(drawn) == 7
    for path in drawn:
        assert path.stat().st_size > 10_000 and path.with_suffix(".svg").is_file()
        assert (ROOT / "figures" / path.name).is_file(), "run make figures"


def test_nothing_is_drawn_from_half_a_study(tmp_path):
    shutil.copytree(results_folder(), tmp_path / "results")
    (tmp_path / "results" / "evidence.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks evidence.csv; `python -m npo_core study`"):
        figures.draw_study(tmp_path / "results", tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
