"""Imports of large packages, and what Python's search for garbage has to do with them. Ours."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(own: bool) -> Iterator[None]:
    """Imports, done here, that make a million objects and no garbage: it is not looked for, which saves a fifth.

    Args:
        own: The process is ours, and the imports are its first work: what is there afterwards stays, and no later
            search goes through it. A run searches several times, so that a policy is freed before the next one comes.
    """
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if own:
            gc.freeze()
        if searching:
            gc.enable()
