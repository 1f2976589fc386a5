"""The explorer in a notebook: the page in a frame that is saved with the notebook."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .page import write_page


@dataclass(frozen=True)
class Shown:
    """The page of a run, as a notebook shows it.

    Attributes:
        path: The page on disk.
        height: Height of the frame in pixels.
    """

    path: Path
    height: int = 900

    def _repr_html_(self) -> str:
        # srcdoc carries the page itself: it is there when the notebook is opened elsewhere, without the run
        content = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return (
            f'<iframe srcdoc="{content}" width="100%" height="{self.height}" style="border:0" '
            'sandbox="allow-scripts" title="Explorer of a run"></iframe>'
        )


def show(*runs: str | Path, out: str | Path | None = None, limit_mb: float = 2.0, live: bool = False) -> Any:
    """Write the page of one or several runs, print where it is, and show it.

    Args:
        runs: As for `write_page`.
        out: As for `write_page`.
        limit_mb: As for `write_page`.
        live: A widget, whose `selected` is the group that is looked at, in place of the frame; needs the extra
            `explore`. The frame needs no kernel and is saved with the notebook.

    Returns:
        What a notebook shows: `Shown`, or with `live` a `widget.Explorer`.

    Raises:
        ValueError: As for `write_page`.
        ImportError: `live` without anywidget.
    """
    path, shown = write_page(*runs, out=out, limit_mb=limit_mb)
    print(f"Explorer: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    if live:
        from .widget import Explorer

        return Explorer(runs, shown, limit_mb)
    return Shown(path)
