"""A light progress bar that works in a terminal, in JupyterLab and under papermill."""

from contextlib import AbstractContextManager

from tqdm.auto import tqdm


class ProgressBar(AbstractContextManager):
    """Progress over a known number of steps, with a few live values beside it.

    Args:
        total: Steps in all.
        label: Words before the bar.
        quiet: Draw nothing.
        start: Steps that are done already.
    """

    def __init__(self, total: int, label: str, quiet: bool = False, start: int = 0):
        self._bar = tqdm(total=total, desc=label, initial=start, disable=quiet, mininterval=1.0, leave=True)

    def advance(self, steps: int = 1, **values: object) -> None:
        """Move on by `steps` and show `values` beside the bar."""
        if values:
            self._bar.set_postfix(values, refresh=False)
        self._bar.update(steps)

    def label(self, text: str) -> None:
        """Change the words before the bar."""
        self._bar.set_description(text)

    def __exit__(self, *exception) -> None:
        self._bar.close()


def progress(total: int, label: str, quiet: bool = False, start: int = 0) -> ProgressBar:
    """Open a `ProgressBar`."""
    return ProgressBar(total, label, quiet, start)
