"""`python -m npo_core book`: every notebook executed, as pages that are read without installing anything (ours).

The runs behind them are those of the notebooks: finished ones are loaded, interrupted ones go on. A notebook that fails
has its page, with the error in it, and the others are executed all the same.
"""

import argparse
import ast
import html
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from ..files import read_json, write_json, write_text
from ..progress import duration
from ..runs.config import preset_names
from ..runs.folder import checkout, environment

ENDING = "## What came out"
"""Heading in a notebook after which it prints what its runs came to."""

SHELF = "book.json"
"""What the index is made from."""

STYLE = "<style>.highlight pre { font-family: var(--jp-code-font-family); line-height: 1.4; }</style>"
"""Source code that a notebook shows, which nbconvert sets as text."""

NEEDED = ("papermill", "nbconvert")

INDEX = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>npo_core: the notebooks, executed</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
li { margin: 0 0 1rem; } .dim { opacity: .7; } .failed { color: #b3261e; }
@media (prefers-color-scheme: dark) { .failed { color: #ff8a80; } a { color: #8ab4f8; } }
</style></head><body>
<h1>The notebooks, executed</h1>
<p>Near-Future Policy Optimization, as one story: each notebook opens with what the last one left open, and ends with
what its own runs came to. A <em>student</em> reads from the top, a <em>reviewer</em> may go up from the end.</p>
<ol>
$chapters
</ol>
<p class="dim">$about</p>
</body></html>
""")


@dataclass(frozen=True)
class Chapter:
    """An executed notebook.

    Attributes:
        name: Of the notebook, without ending.
        title: Its first heading.
        ending: What it printed of its runs; empty where it prints nothing.
        seconds: That its execution took.
        failed: Why it did not come to its end, or empty.
        parameters: What it was given.
    """

    name: str
    title: str
    ending: str
    seconds: float
    failed: str
    parameters: Mapping[str, Any]


def add_stage(stages) -> None:
    """Add the stage to the command line's."""
    text = (
        "Execute the notebooks in their order, and write each as a page into one folder with an index. The pages open "
        "from disk and ask for nothing. Finished runs are loaded; a second call goes on where the first stopped."
    )
    stage = stages.add_parser("book", help="Execute all notebooks, and write them as pages.", description=text)
    stage.set_defaults(stage=_book)
    stage.add_argument("--preset", default="cpu", help=f"one of {', '.join(preset_names())} (default: cpu)")
    stage.add_argument("--seed", type=int, default=0, help="seed of sampling during training (default: 0)")
    stage.add_argument("--out", type=Path, default=Path("build/book"), help="folder to write (default: build/book)")
    stage.add_argument("--only", nargs="+", default=[], metavar="NAME", help="notebooks to execute, such as 03_autonpo")
    stage.add_argument("--quiet", action="store_true", help="no progress bars")


def _book(options: argparse.Namespace) -> int:
    chapters = make_book(options.out, options.preset, options.seed, options.only, options.quiet)
    print(f"Book: {options.out / 'index.html'}")
    failed = [chapter.name for chapter in chapters if chapter.failed]
    if failed:
        print(f"Not executed to the end: {', '.join(failed)}; the index says why.")
    return 1 if failed else 0


def make_book(
    out: Path, preset: str = "cpu", seed: int = 0, only: Sequence[str] = (), quiet: bool = False
) -> list[Chapter]:
    """Execute notebooks, and write their pages and the index.

    Args:
        out: Folder of the pages; made if it is not there.
        preset: Preset of every notebook of the small world; others have theirs, see `preset_for`.
        seed: Seed of every notebook that has one.
        only: Names of notebooks to execute; empty for all. Others that were executed before stay in the index.
        quiet: Without progress bars.

    Returns:
        The notebooks of this call in their order.

    Raises:
        ValueError: No checkout, packages that are not there, an unknown preset, or an unknown notebook.
    """
    notebooks = _notebooks(only)
    if preset not in preset_names():
        raise ValueError(f"Unknown preset {preset!r}. Allowed: {', '.join(preset_names())}.")
    out.mkdir(parents=True, exist_ok=True)
    shelf, done = _earlier(out), []
    order = sorted({*shelf, *(path.stem for path in notebooks)})
    for place, path in enumerate(notebooks):
        print(f"{path.stem} ({place + 1} of {len(notebooks)})", flush=True)
        chapter = _chapter(path, out, {"preset": preset, "seed": seed}, order, quiet)
        print(f"{path.stem}: {chapter.failed or 'done'}, {duration(chapter.seconds)}", flush=True)
        done.append(chapter)
        shelf[path.stem] = chapter
        # what is there can be read before the rest is done
        write_json(out / SHELF, [asdict(shelf[name]) for name in order if name in shelf])
        write_text(out / "index.html", _index([shelf[name] for name in order if name in shelf]))
    return done


def _earlier(out: Path) -> dict[str, Chapter]:
    """Notebooks that an earlier call executed into this folder, by name, whose pages are still there."""
    if not (out / SHELF).is_file():
        return {}
    found = [Chapter(**entry) for entry in read_json(out / SHELF)]
    return {chapter.name: chapter for chapter in found if (out / f"{chapter.name}.html").is_file()}


def _notebooks(only: Sequence[str]) -> list[Path]:
    root = checkout()
    if root is None:
        raise ValueError("An installed copy carries no notebooks; the book is made in a checkout of the repository.")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"The book needs {' and '.join(missing)}; pip install 'npo_core[lab]'.")
    known = {path.stem: path for path in sorted((root / "notebooks").glob("*.ipynb"))}
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"There is no notebook {unknown[0]!r}. Allowed: {', '.join(known)}.")
    return [path for name, path in known.items() if not only or name in only]


def _chapter(path: Path, out: Path, given: dict[str, Any], order: Sequence[str], quiet: bool) -> Chapter:
    import nbformat
    import papermill

    executed, started, failed = out / f"{path.stem}.ipynb", time.monotonic(), ""
    declared = papermill.inspect_notebook(str(path))
    parameters = {name: value for name, value in given.items() if name in declared}
    if "preset" in declared:
        parameters["preset"] = preset_for(ast.literal_eval(declared["preset"]["default"]), given["preset"])
    try:
        papermill.execute_notebook(str(path), str(executed), parameters=parameters, progress_bar=not quiet)
    except papermill.PapermillExecutionError as error:
        failed = f"{error.ename}: {error.evalue}"
    notebook = nbformat.read(executed, as_version=4)
    place = order.index(path.stem)
    neighbours = ["".join(order[max(0, place - 1) : place]), "".join(order[place + 1 : place + 2])]
    write_text(out / f"{path.stem}.html", _page(notebook, path.stem, neighbours))
    executed.unlink()
    return Chapter(path.stem, _title(notebook), _ending(notebook), time.monotonic() - started, failed, parameters)


def preset_for(own: str, asked: str) -> str:
    """Preset of a notebook: the one asked for, or for a notebook with a policy of its own that one's, small for smoke.

    Args:
        own: Preset that the notebook declares; "cpu" for those of the small world.
        asked: Preset of the book.
    """
    if own == "cpu" or asked.startswith(own):
        return asked
    small = f"{own}-smoke"
    return small if asked == "smoke" and small in preset_names() else own


def _page(notebook: Any, name: str, neighbours: Sequence[str]) -> str:
    """The notebook as one page without anything from elsewhere, with a way on."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(mathjax_url="", require_js_url="")
    exporter.log.setLevel("ERROR")  # it asks for a text beside each figure
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})
    before, later = (
        f'<a href="{near}.html">{sign} {near}</a>' if near else "" for near, sign in zip(neighbours, "←→", strict=True)
    )
    way = (
        f'<nav style="padding:8px;font-family:sans-serif">{before} <a href="index.html">all notebooks</a> {later}</nav>'
    )
    page = page.replace("</head>", f"{STYLE}</head>", 1)
    return re.sub(r"(<body[^>]*>)", lambda body: body.group() + way, page, count=1)


def _title(notebook: Any) -> str:
    first = next(
        cell.source for cell in notebook.cells if cell.cell_type == "markdown" and cell.source.startswith("# ")
    )
    return first.splitlines()[0].removeprefix("# ")


def _ending(notebook: Any) -> str:
    """What the cells after the heading `ENDING` say: what they print, and Markdown that they show."""
    places = [place for place, cell in enumerate(notebook.cells) if cell.source.startswith(ENDING)]
    if not places:
        return ""
    outputs = [output for cell in notebook.cells[places[0] :] for output in cell.get("outputs", [])]
    return " ".join(_said(output).strip() for output in outputs).strip()


def _said(output: Any) -> str:
    return output.text if output.output_type == "stream" else output.get("data", {}).get("text/markdown", "")


def _index(chapters: Sequence[Chapter]) -> str:
    found = environment()
    about = (
        f"Python {found['python']}, "
        + ", ".join(f"{name} {number}" for name, number in found["packages"].items())
        + (f", revision {found['git_revision'][:10]}" if found["git_revision"] else "")
        + ". Seconds are those of this machine; finished runs were loaded."
    )
    entries = []
    for chapter in chapters:
        given = ", ".join(f"{name} {value}" for name, value in chapter.parameters.items())
        parts = [
            f'<li value="{int(chapter.name[:2])}"><a href="{chapter.name}.html">{html.escape(chapter.title)}</a>',
            f'<span class="dim">{html.escape(given)}; {duration(chapter.seconds)}</span>',
            f"<br>{html.escape(chapter.ending)}" if chapter.ending else "",
            f'<br><span class="failed">Stopped: {html.escape(chapter.failed)}</span>' if chapter.failed else "",
        ]
        entries.append(" ".join(parts) + "</li>")
    return INDEX.substitute(chapters="\n".join(entries), about=html.escape(about))
