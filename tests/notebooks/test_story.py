"""The notebooks as one story: each opens with the last one, ends with a computed sentence, and hands on a question."""

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
CHAPTERS = sorted(path.stem for path in FOLDER.glob("0[0-7]_*.ipynb"))


@pytest.fixture(scope="module")
def sources():
    """Cells of each notebook as (kind, text)."""
    read = {name: nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells for name in CHAPTERS}
    return {name: [(cell.cell_type, cell.source) for cell in cells] for name, cells in read.items()}


@pytest.mark.parametrize(("before", "name"), list(pairwise(CHAPTERS)))
def test_a_notebook_opens_with_what_the_last_one_left_open(sources, before, name):
    assert f"`{before}`" in sources[name][0][1]
    assert f"`{name}" in sources[before][-1][1], "the last one names it"


@pytest.mark.parametrize("name", CHAPTERS[1:])
def test_a_notebook_ends_with_a_sentence_from_its_runs_and_a_question(sources, name):
    (place,) = [place for place, (_, text) in enumerate(sources[name]) if text.startswith("## What came out")]
    (kind, code), (last, question) = sources[name][place + 1 :]
    assert (kind, last) == ("code", "markdown") and "Markdown(" in code
    assert question.startswith("**Left open.**") and "?" in question


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_notebook_says_what_to_expect_before_it_shows_it(sources, name):
    cells = sources[name]
    told = [place for place, (kind, text) in enumerate(cells) if kind == "markdown" and "xpect" in text]
    assert len(told) >= 2
    assert all(any(kind == "code" for kind, _ in cells[place + 1 :]) for place in told)


@pytest.mark.parametrize("name", CHAPTERS)
def test_formulas_need_no_script(sources, name):
    """A page of the book loads nothing, so a formula between dollar signs would stay as it is written."""
    markdown = "\n".join(re.sub(r"`[^`]*`", "", text) for kind, text in sources[name] if kind == "markdown")
    assert re.findall(r"\$[^$\n]+\$", markdown) == []
