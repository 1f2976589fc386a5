"""Rollouts for a reader: a group before and after its guide took a slot, and sampled responses with their pictures."""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..method.groups import group_advantages
from .style import COLORS, GREY, WIDTH, canvas, settle, style

RIGHT, WRONG, GUIDE = COLORS[2], COLORS[3], COLORS[1]
TEXT_WIDTH, TEXT_LINES = 27, 2
"""Characters in a line of a completion, and lines, in the table of a group."""
QUESTION_WIDTH = 78
"""Characters in a line of a question."""
LINE = 0.165
"""Height of a line of text in inches."""
GALLERY_RESPONSES = 4

COLUMNS = [
    *("group", "slot", "source", "guide_step", "text", "reward", "advantage", "overwritten_text"),
    *("overwritten_correct", "question", "answer", "picture"),
]
"""Columns of a rollout table that are read; token ids and log-probs are not."""


def group_before_after(run: str | Path) -> Figure:
    """One guided group before and after the guide took its slot, with rewards and advantages (paper: mixed group).

    The first guided group that was all wrong is shown; without one, the first with a pass rate below a half, else the
    first. Before: rewards of the `n` on-policy rollouts, 1 for a correct overwritten one and 0 for a wrong one, and
    their group advantages. After: rewards and advantages that the update used.

    Args:
        run: Run folder.

    Raises:
        ValueError: No guided group.
    """
    tables, found = _tables(Path(run)), None
    for place, rows in ((path, rows) for path in tables for rows in _guided_groups(path)):
        rate = sum(_rewards_before(rows)) / len(rows)
        rank = 0 if rate == 0 else 1 if rate < 0.5 else 2
        if found is None or rank < found[0]:
            found = rank, place, rows
        if rank == 0:
            break
    if found is None:
        raise ValueError(
            f"There is no guided group in any of the {len(tables)} rollout tables of {run}; give a run that replayed "
            "with guidance."
        )
    return _draw_group(found[1], found[2])


def _tables(run: Path) -> list[Path]:
    """Rollout tables of a run in the order they were written: by branch, then by policy step."""
    return sorted((run / "rollouts").glob("step-*-b*.parquet"), key=lambda path: path.stem.split("-")[::-1])


def _guided_groups(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Groups of a table that hold a guide or its beginning, each in the order of its slots."""
    rows = pq.read_table(path, columns=COLUMNS).to_pylist()
    for group in dict.fromkeys(row["group"] for row in rows if row["source"] != "policy"):
        yield sorted((row for row in rows if row["group"] == group), key=lambda row: row["slot"])


def _rewards_before(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(row["reward"] if row["source"] == "policy" else row["overwritten_correct"]) for row in rows]


def _draw_group(path: Path, rows: Sequence[Mapping[str, Any]]) -> Figure:
    rewards = _rewards_before(rows)
    advantages = group_advantages(torch.tensor([rewards]))[0].tolist()
    guided = [row["source"] != "policy" for row in rows]
    before, after = [], []
    for row, is_guide, reward, advantage in zip(rows, guided, rewards, advantages, strict=True):
        text = row["overwritten_text"] if is_guide else row["text"]
        before.append((row["slot"], [*_lines(text)], reward, advantage))
        words = "begun by a guide" if row["source"] == "prefix" else "guide"
        label = [f"← {words}, from step {row['guide_step']}"] if is_guide else []
        after.append((row["slot"], [*_lines(row["text"]), *label], row["reward"], row["advantage"]))
    # the same height on both sides, so that a slot stands in one line across the figure
    heights = [max(len(a[1]), len(b[1])) for a, b in zip(before, after, strict=True)]
    step, branch = path.stem.removeprefix("step-").split("-b")
    question = textwrap.wrap(rows[0]["question"], QUESTION_WIDTH)
    top = max(1.1, LINE * (len(question) + 4))
    size = (WIDTH, top + LINE * 1.15 * (sum(heights) + 3.2))
    with style():
        mosaic = {"height_ratios": [top, size[1] - top], "layout": "constrained"}
        figure, axes = plt.subplot_mosaic("PPQQQQQQ;BBBBAAAA", figsize=size, **mosaic)
        plt.close(figure)
        _show_picture(axes["P"], rows[0]["picture"])
        head = [f"Policy step {int(step)}, branch {int(branch)}", "", *question, f"Answer: {rows[0]['answer']}"]
        axes["Q"].axis("off")
        axes["Q"].text(0, 0.95, "\n".join(head), va="top", parse_math=False, linespacing=1.3)
        for place, title, table, values, color in [
            (axes["B"], "Before: on-policy rollouts", before, rewards, GREY),
            (axes["A"], "After: mixed group", after, [row["reward"] for row in rows], GUIDE),
        ]:
            rate = f", mean reward {sum(values) / len(values):.3g}"
            _draw_table(place, title + rate, table, heights, guided, color)
    return settle(figure)


def _draw_table(
    axes: Axes,
    title: str,
    table: Sequence[tuple[int, list[str], float, float]],
    heights: Sequence[int],
    highlighted: Sequence[bool],
    color: str,
) -> None:
    """A table of slot, completion, reward and advantage; the y axis counts lines of text."""
    axes.set(xlim=(-0.01, 1.03), ylim=(sum(heights) + 1.6, 0))
    axes.axis("off")
    axes.set_title(title, loc="left")
    for x, name, side in [(0, "slot", "left"), (0.1, "completion", "left"), (0.77, "reward", "right")]:
        axes.text(x, 0.7, name, ha=side, va="center", weight="bold")
    axes.text(1, 0.7, "advantage", ha="right", va="center", weight="bold")
    axes.axhline(1.3, color=GREY, lw=0.8)
    y = 1.5
    for (slot, text, reward, advantage), height, marked in zip(table, heights, highlighted, strict=True):
        if marked:
            axes.axhspan(y, y + height, color=color, alpha=0.25, lw=0)
        for x, value, side in [(0.02, f"{slot}", "left"), (0.77, f"{reward:g}", "right")]:
            axes.text(x, y + 0.5, value, ha=side, va="center")
        signed = f"{advantage:+.2f}".replace("-", "−") if advantage else "0.00"
        axes.text(1, y + 0.5, signed, ha="right", va="center")
        for index, line in enumerate(text):
            axes.text(0.1, y + index + 0.5, line, va="center", family="DejaVu Sans Mono", parse_math=False)
        y += height


def sample_gallery(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Problems with their pictures and up to four responses each, marked right (✓) or wrong (✗).

    Args:
        rows: Mappings with `picture` (PIL image or None), `question`, `answer` and `responses`, a list of
            (text, correct).

    Raises:
        ValueError: No rows.
    """
    if not rows:
        raise ValueError("rows is empty; give at least one problem with its responses.")
    texts = []
    for row in rows:
        lines = [(line, "black", "bold") for line in textwrap.wrap(row["question"], 84)]
        lines.append((f"Answer: {row['answer']}", "black", "normal"))
        for text, correct in row["responses"][:GALLERY_RESPONSES]:
            mark, color = ("✓", RIGHT) if correct else ("✗", WRONG)
            lines.append((f"{mark} {_shorten(text, 78)}", color, "normal"))
        texts.append(lines)
    heights = [len(lines) + 1.0 for lines in texts]
    with style():
        ratios = {"height_ratios": heights, "width_ratios": [1, 4.6]}
        figure, grid = canvas(len(rows), 2, (WIDTH, LINE * sum(heights)), **ratios)
        for (left, right), row, lines, height in zip(grid, rows, texts, heights, strict=True):
            _show_picture(left, row["picture"])
            right.set(xlim=(0, 1), ylim=(height, 0))
            right.axis("off")
            for index, (line, color, weight) in enumerate(lines):
                family = "DejaVu Sans Mono" if line[0] in "✓✗" else "DejaVu Sans"
                right.text(
                    0, index + 0.5, line, va="center", color=color, weight=weight, family=family, parse_math=False
                )
    return settle(figure)


def _show_picture(axes: Axes, picture: Image.Image | bytes | None) -> None:
    """Show a picture with hard pixel edges; a text-only problem leaves the place empty."""
    axes.axis("off")
    axes.set_anchor("NW")
    if picture is not None:
        opened = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        axes.imshow(opened.convert("RGB"), interpolation="nearest")


def _lines(text: str) -> list[str]:
    """A completion in at most `TEXT_LINES` lines; where it is longer, the last line is its end: the answer is there."""
    flat = " ".join(text.split()) or "(empty)"
    lines = textwrap.wrap(flat, TEXT_WIDTH)
    return lines if len(lines) <= TEXT_LINES else [*lines[: TEXT_LINES - 1], "…" + flat[1 - TEXT_WIDTH :]]


def _shorten(text: str, width: int) -> str:
    """A text in one line of at most `width` characters; the middle of a longer one is left out."""
    flat = " ".join(text.split()) or "(empty)"
    return flat if len(flat) <= width else f"{flat[: width // 2]}…{flat[width // 2 - width + 1 :]}"
