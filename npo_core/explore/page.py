"""The page: one HTML file with code, style and data in it, that asks for nothing from anywhere."""

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence, Set
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from ..files import write_text
from .reading import find_run, read_run
from .still import still_figure

MODULES = ("maths", "dom", "model", "runline", "board", "text", "group", "tokens", "decision", "pool", "explorer")
"""Parts of the page's ES module, in the order in which they use each other."""

PAGE = "explorer.html"


def write_page(
    *runs: str | Path, out: str | Path | None = None, limit_mb: float = 2.0
) -> tuple[Path, list[dict[str, Any]]]:
    """Write the page of one run, or of several laid over each other.

    Args:
        runs: Run folders, or names of runs in `runs_folder()`; folders of TRL's log_completions too.
        out: File to write; None is `explorer.html` in the first run's folder.
        limit_mb: Size of the page in megabytes (10⁶ bytes). What does not fit is left out, rollout tables first and
            older steps before newer ones, and the page says so; curves, pass rates and decisions always stay.

    Returns:
        The file, and what it shows.

    Raises:
        ValueError: No run given, no run in a folder, or a limit that is no positive number.
    """
    if not runs:
        raise ValueError("no run given; give at least one run folder.")
    if not limit_mb > 0:
        raise ValueError(f"limit_mb is {limit_mb}; a size above 0 is needed, such as 2.")
    shown = [read_run(run) for run in runs]
    target = find_run(runs[0]) / PAGE if out is None else Path(out)
    text = page(shown, limit_mb)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return target, shown


def page(runs: Sequence[Mapping[str, Any]], limit_mb: float = 2.0) -> str:
    """The page's HTML."""
    return _assembled(within(runs, limit_mb))


def _assembled(runs: Sequence[Mapping[str, Any]]) -> str:
    title = " and ".join(run["name"] for run in runs)
    return Template(asset("page.html")).substitute(
        title=html.escape(title),
        style=asset("explorer.css"),
        still=still_figure(runs),
        data=packed({"runs": runs}),
        module=module(),
    )


def packed(content: Any) -> str:
    """JSON, compressed, in an alphabet that no markup can be made of."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), mtime=0)).decode()


def within(runs: Sequence[Mapping[str, Any]], limit_mb: float) -> list[dict[str, Any]]:
    """Runs whose data fits in a page of a size.

    Guided groups come before whole tables, newer before older; a step that fits without its pictures goes without.
    """
    bare = [{**run, "steps": [], "prompts": [_without(prompt) for prompt in run["prompts"]]} for run in runs]
    left = limit_mb * 1e6 - len(_assembled(bare).encode())
    kept: list[list[dict[str, Any]]] = [[] for _ in runs]
    shown: list[set[int]] = [set() for _ in runs]
    order = [(step["whole"], -step["c"], number, step) for number, run in enumerate(runs) for step in run["steps"]]
    for _, _, number, step in sorted(order, key=lambda entry: entry[:3]):
        prompts = runs[number]["prompts"]
        new = {group["p"] for group in step["groups"]} - shown[number]
        pictures = sum(len(prompts[place].get("picture", "")) for place in new)
        size = len(packed(step))
        if size > left:
            continue
        kept[number].append(step)
        left -= size
        if pictures <= left:
            shown[number] |= new
            left -= pictures
    return [_fitted(run, kept[number], shown[number], limit_mb) for number, run in enumerate(runs)]


def _without(prompt: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in prompt.items() if name != "picture"}


def _fitted(
    run: Mapping[str, Any], steps: Sequence[dict[str, Any]], shown: Set[int], limit_mb: float
) -> dict[str, Any]:
    """A run with some of its steps and the pictures of some of its prompts, and a note on what is left out."""
    prompts = [
        prompt if place in shown else _without(prompt) | ({"left": True} if "picture" in prompt else {})
        for place, prompt in enumerate(run["prompts"])
    ]
    missing = {
        "rollouts of {} recorded steps": len(run["steps"]) - len(steps),
        "pictures of {} prompts": sum("left" in prompt for prompt in prompts),
    }
    words = " and the ".join(text.format(count) for text, count in missing.items() if count)
    left_out = [f"Left out to keep this page within {limit_mb:g} MB (--limit-mb): the {words}."] if words else []
    ordered = sorted(steps, key=lambda step: (step["c"], step["whole"]))
    return {**run, "notes": [*run["notes"], *left_out], "steps": ordered, "prompts": prompts}


def asset(name: str) -> str:
    """Text of a file that the page is made of."""
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def module() -> str:
    """The page's one ES module: `render({model, el})`, made of parts that import each other by name."""
    parts = []
    for name in MODULES:
        lines = asset(f"{name}.mjs").splitlines()
        kept = [line for line in lines if not line.startswith("import ")]
        parts.append("\n".join(line.removeprefix("export ") for line in kept))
    return "\n".join([*parts, "export { render };", "export default { render };", ""])
