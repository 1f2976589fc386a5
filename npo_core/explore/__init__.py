"""The explorer: one page made from a run folder, which opens anywhere.

The room is callable: `npo_core.explore(run)` writes the page and shows it in a notebook; see `notebook.show`.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """A package that is called by its name, as the face of npo_core offers it."""

    def __call__(self, *runs: Any, **options: Any) -> Any:
        from .notebook import show

        return show(*runs, **options)


explore = sys.modules[__name__]
explore.__class__ = _Room
