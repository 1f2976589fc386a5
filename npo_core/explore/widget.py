"""The explorer as a notebook widget: the page's own module, with a way back to Python (extra `explore`)."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise ImportError("explore(live=True) needs anywidget: pip install 'npo_core[explore]'.") from error

from .page import asset, module, within
from .reading import read_run


class Explorer(anywidget.AnyWidget):
    """A widget over runs.

    Args:
        runs: Run folders.
        shown: What `read_run` says of them.
        limit_mb: Size of what is sent to the browser, in megabytes; see `write_page`.

    Attributes:
        chosen: Where the reader is: `run`, `policy_step`, `compute_step`, `branch`, `group`, `uid`.
    """

    _esm = module()
    _css = asset("explorer.css")
    data = traitlets.Dict().tag(sync=True)
    wanted = traitlets.Dict().tag(sync=True)
    chosen = traitlets.Dict().tag(sync=True)

    def __init__(self, runs: Sequence[str | Path], shown: Sequence[Mapping[str, Any]], limit_mb: float = 2.0):
        self._runs, self._limit_mb = list(runs), limit_mb
        super().__init__(data={"runs": within(shown, limit_mb)})

    @property
    def selected(self) -> pd.DataFrame:
        """The group that is looked at, a row a slot; empty where only its pass rate was kept."""
        columns = ["slot", "source", "text", "correct", "reward", "advantage", "guide_step", "overwritten_text"]
        rows = []
        for run in self.data["runs"]:
            if run["name"] != self.chosen.get("run"):
                continue
            for step in run["steps"]:
                if (step["s"], step["b"]) == (self.chosen["policy_step"], self.chosen["branch"]):
                    named = {run["prompts"][group["p"]]["uid"]: group for group in step["groups"]}
                    group = named.get(self.chosen["uid"], {"slots": []})
                    rows = [self._row(place, slot) for place, slot in enumerate(group["slots"])] or rows
        return pd.DataFrame(rows, columns=columns)

    @staticmethod
    def _row(place: int, slot: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "slot": place,
            "source": "prefix" if "begun" in slot else "guide" if "guide" in slot else "policy",
            "text": slot["t"],
            "correct": slot["ok"],
            "reward": slot["r"],
            "advantage": slot["a"],
            "guide_step": slot.get("guide"),
            "overwritten_text": slot.get("lost"),
        }

    def select(self, step: int, group: int | None = None, branch: int | None = None) -> None:
        """Lead the reader to a policy step, of the newest branch that has it unless one is given, and a group."""
        self.wanted = {"step": step, "group": group, "branch": branch}

    def refresh(self) -> None:
        """Read the runs again, as far as they are by now; the reader stays where he is."""
        self.data = {"runs": within([read_run(run) for run in self._runs], self._limit_mb)}

    async def follow(self, seconds: float = 10.0) -> None:
        """Refresh for ever: `asyncio.create_task(ex.follow())` in a cell, and `.cancel()` on what it returns."""
        while True:
            self.refresh()
            await asyncio.sleep(seconds)
