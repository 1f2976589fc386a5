"""The book: notebooks executed into pages that ask for nothing, with an index that says what came out."""

import re

import nbformat
import pytest

from npo_core.__main__ import main
from npo_core.stages import book


def notebook(*cells) -> nbformat.NotebookNode:
    kinds = {"#": nbformat.v4.new_markdown_cell}
    made = nbformat.v4.new_notebook(cells=[kinds.get(text[0], nbformat.v4.new_code_cell)(text) for text in cells])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return made


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A checkout of three small notebooks: one that ends with a sentence, one that fails, one without parameters."""
    (tmp_path / "notebooks").mkdir()
    parameters = nbformat.v4.new_code_cell('preset: str = "cpu"\nseed: int = 0', metadata={"tags": ["parameters"]})
    first = notebook("# One & only", 'print("before")', "## What came out", 'print(f"{preset} and {seed} < 9")')
    first.cells.insert(1, parameters)
    failing = notebook("# Two", 'raise ValueError("no study <yet>")', "## What came out", 'print("never")')
    for name, made in {"00_one": first, "01_two": failing, "02_three": notebook("# Three", "1 + 1")}.items():
        nbformat.write(made, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(book, "checkout", lambda: tmp_path)
    return tmp_path


def outside(page: str) -> list[str]:
    """What a page would load from elsewhere."""
    return re.findall(r"(?:src|href)=[\"'](?:https?:)?//[^\"']+", page)


@pytest.mark.slow
def test_each_notebook_has_a_page_and_one_that_fails_stops_nothing(shelf, capsys):
    out = shelf / "out"
    chapters = book.make_book(out, "smoke", 3, quiet=True)
    assert [(each.name, each.title, bool(each.failed)) for each in chapters] == [
        ("00_one", "One & only", False), ("01_two", "Two", True), ("02_three", "Three", False),
    ]  # fmt: skip
    assert chapters[0].ending == "smoke and 3 < 9" and chapters[1].ending == ""
    assert chapters[1].failed == "ValueError: no study <yet>"
    pages = {path.name: path.read_text() for path in out.iterdir()}
    assert set(pages) == {"00_one.html", "01_two.html", "02_three.html", "index.html", "book.json"}
    assert all(outside(page) == [] for page in pages.values())
    assert "smoke and 3 &lt; 9" in pages["index.html"] and "no study &lt;yet&gt;" in pages["index.html"]
    assert "One &amp; only" in pages["index.html"] and "no study" in pages["01_two.html"]
    assert 'href="00_one.html"' in pages["01_two.html"] and 'href="02_three.html"' in pages["01_two.html"]
    assert "3 of 3" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_says_what_failed_and_makes_chosen_notebooks_alone(shelf, capsys):
    assert main(["book", "--preset", "smoke", "--out", str(shelf / "out"), "--only", "01_two", "--quiet"]) == 1
    assert "Not executed to the end: 01_two" in capsys.readouterr().out
    assert main(["book", "--preset", "smoke", "--out", str(shelf / "out"), "--only", "02_three", "--quiet"]) == 0
    index = (shelf / "out" / "index.html").read_text()
    assert "Three" in index and "no study" in index, "what was executed before stays in the index"
    assert 'href="01_two.html"' in (shelf / "out" / "02_three.html").read_text()
    (shelf / "out" / "01_two.html").unlink()
    assert main(["book", "--preset", "smoke", "--out", str(shelf / "out"), "--only", "02_three", "--quiet"]) == 0
    assert "no study" not in (shelf / "out" / "index.html").read_text(), "a page that is gone is not listed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "07_moon"], r"There is no notebook '07_moon'. Allowed: 00_one, 01_two, 02_three."),
        (["--preset", "smok"], r"Unknown preset 'smok'. Allowed: .*smoke"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_runs(shelf, capsys, options, words):
    assert main(["book", "--out", str(shelf / "out"), *options]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (shelf / "out").exists()


@pytest.mark.parametrize(
    ("own", "asked", "given"),
    [
        ("cpu", "cpu", "cpu"),
        ("cpu", "smoke", "smoke"),
        ("real", "cpu", "real"),
        ("real", "smoke", "real-smoke"),
        ("real", "real-smoke", "real-smoke"),
        ("gpu", "smoke", "gpu"),
    ],
)
def test_a_notebook_with_a_policy_of_its_own_keeps_it(own, asked, given):
    assert book.preset_for(own, asked) == given


def test_an_installed_copy_says_why_it_has_no_book(monkeypatch, capsys):
    monkeypatch.setattr(book, "checkout", lambda: None)
    assert main(["book"]) == 2
    assert "made in a checkout" in capsys.readouterr().err


def test_without_the_notebooks_packages_the_extra_is_named(shelf, monkeypatch, capsys):
    monkeypatch.setattr(book, "find_spec", lambda name: None if name == "nbconvert" else object())
    assert main(["book", "--out", str(shelf / "out")]) == 2
    assert "The book needs nbconvert; pip install 'npo_core[lab]'." in capsys.readouterr().err
