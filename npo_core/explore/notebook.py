"""The explorer in a notebook: the page in a frame that is saved with the notebook."""

import html
from dataclasses import dataclass
from pathlib import Path

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


def show(*runs: str | Path, out: str | Path | None = None, limit_mb: float = 2.0) -> Shown:
    """Write the page of one or several runs, print where it is, and show it; arguments are those of `write_page`."""
    path, _ = write_page(*runs, out=out, limit_mb=limit_mb)
    print(f"Explorer: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    return Shown(path)
