"""A light progress bar: lines in a terminal, in a notebook an HTML display that is drawn anew and stays in the file.

No widget: the kernel is busy while a cell is, and a notebook that was saved, or run by papermill, shows the last state.
"""

import html
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

REDRAW = 0.5
"""Least seconds between two drawings of a bar in a notebook."""


def notebook_shell() -> Any | None:
    """IPython's shell if this process is the kernel of a notebook, else None."""
    ipython = sys.modules.get("IPython")  # what nobody has imported runs no notebook
    shell = None if ipython is None else ipython.get_ipython()
    return shell if shell is not None and shell.has_trait("kernel") else None


class ProgressBar(AbstractContextManager):
    """Progress over a known number of steps, with a few live values beside it.

    Args:
        total: Steps in all.
        label: Words before the bar.
        quiet: Draw nothing.
        start: Steps that are done already.
        stays: The bar stays when it ends; else it makes room.
    """

    def __init__(self, total: int, label: str, quiet: bool = False, start: int = 0, stays: bool = True):
        drawn = not quiet and notebook_shell() is not None
        self._page = _Page(total, label, start, stays) if drawn else None
        self._bar = tqdm(total=total, desc=label, initial=start, disable=quiet or drawn, mininterval=1.0, leave=stays)

    def advance(self, steps: int = 1, **values: object) -> None:
        """Move on by `steps` and show `values` beside the bar."""
        if self._page is not None:
            self._page.advance(steps, values)
            return
        if values:
            self._bar.set_postfix(values, refresh=False)
        self._bar.update(steps)

    def label(self, text: str) -> None:
        """Change the words before the bar."""
        if self._page is not None:
            self._page.name(text)
        self._bar.set_description(text)

    def say(self, text: str) -> None:
        """A line of its own, which stays."""
        if self._page is not None:
            print(text, flush=True)
        elif not self._bar.disable:
            self._bar.write(text)

    def __exit__(self, kind, *exception) -> None:
        if self._page is not None:
            self._page.end(stopped=kind is not None)
        self._bar.close()


class _Page:
    """The bar of a notebook: one HTML display, drawn again at most every `REDRAW` seconds."""

    def __init__(self, total: int, label: str, start: int, stays: bool):
        from IPython.display import display

        self.total, self.text, self.done, self.first, self.stays = total, label, start, start, stays
        self.values: Mapping[str, object] = {}
        self.began = self.drawn = time.monotonic()
        self.handle = display(self.drawing(), raw=True, display_id=True)

    def advance(self, steps: int, values: Mapping[str, object]) -> None:
        self.done += steps
        self.values = values or self.values
        if time.monotonic() - self.drawn >= REDRAW:
            self.draw()

    def name(self, label: str) -> None:
        self.text = label
        self.draw()

    def end(self, stopped: bool) -> None:
        if self.stays or stopped:
            self.draw("done" if self.done >= self.total else "stopped" if stopped else "ended")
        else:
            self.handle.update({"text/plain": "", "text/html": ""}, raw=True)

    def draw(self, state: str = "") -> None:
        self.drawn = time.monotonic()
        self.handle.update(self.drawing(state), raw=True)

    def drawing(self, state: str = "") -> dict[str, str]:
        """The bar as text and as HTML."""
        spent = time.monotonic() - self.began
        parts = [f"{self.done} of {self.total}", *(f"{name} {value}" for name, value in self.values.items())]
        if state:
            parts.append(f"{state}, {duration(spent)}")
        elif self.done > self.first:
            parts.append(f"{duration(spent * (self.total - self.done) / (self.done - self.first))} left")
        return bar_data(self.text, self.done / self.total if self.total else 1.0, ", ".join(parts))


def bar_data(label: str, share: float, text: str) -> dict[str, str]:
    """A bar as data of a display, as plain text and as HTML that needs no script and no style of its own.

    Args:
        label: Words before it.
        share: How much of it is full, from 0 to 1.
        text: Words behind it.
    """
    filled = f"width:{100 * min(share, 1):.1f}%;height:100%;background:#0173b2;border-radius:3px"
    trough = "flex:0 0 12em;height:0.7em;background:rgba(128,128,128,0.3);border-radius:3px"
    return {
        "text/plain": f"{label}: {text}",
        "text/html": (
            '<div style="display:flex;align-items:center;gap:0.8em;font-size:90%">'
            f'<span style="flex:0 0 14em;text-align:right">{html.escape(label)}</span>'
            f'<span style="{trough}"><span style="display:block;{filled}"></span></span>'
            f"<span>{html.escape(text)}</span></div>"
        ),
    }


def duration(seconds: float) -> str:
    """A time in words, to about a tenth: "42 s", "7 min", "3.1 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def tell(label: str, text: str) -> None:
    """A bar that is full at once, such as that of a run that is loaded; in a terminal a line.

    Args:
        label: Words before the bar.
        text: Words behind it.
    """
    if notebook_shell() is None:
        print(f"{label}: {text}", flush=True)
        return
    from IPython.display import display

    display(bar_data(label, 1.0, text), raw=True)


def progress(total: int, label: str, quiet: bool = False, start: int = 0, stays: bool = True) -> ProgressBar:
    """Open a `ProgressBar`."""
    return ProgressBar(total, label, quiet, start, stays)
