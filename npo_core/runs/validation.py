"""Checks of settings: refuse early, say what was given, what is allowed, and what comes nearest."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any, Literal, get_args, get_origin

SUITES = ("mmmu_pro", "mathvista", "mathvision", "zerobench", "wemath", "mmbench", "mmstar", "mathverse")
"""Suites of the paper's Table 1, in its order."""

DATA_COLUMNS = ("uid", "prompt", "image", "images", "answer", "suite", "difficulty")
"""Columns of the rows of a data set, in our names; prompt and answer must be there."""


def require(condition: bool, name: str, given: Any, allowed: str) -> None:
    """Raise ValueError with what was given and what is allowed, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {given!r}; it must be {allowed}.")


def check_suites(suites: tuple[str, ...]) -> None:
    """Refuse unknown, repeated or no suites."""
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"Unknown suite {suite!r}{nearest(suite, SUITES)} Allowed: {', '.join(SUITES)}.")
    require(bool(suites) and len(set(suites)) == len(suites), "suites", suites, "one or more distinct suites")


def nearest(name: str, names) -> str:
    """The end of a sentence that names the closest valid name, if one is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def refuse_unknown(values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a setting that does not exist, with the nearest one that does."""
    for name in values:
        if name not in names:
            raise ValueError(
                f"Unknown setting {name!r}{nearest(name, names)} `python -m npo_core settings` lists all settings."
            )


def typed(setting: Field, value: Any) -> Any:
    """Value of a setting in its declared type; an int serves as a float, nothing else is converted."""
    kind = setting.type
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            near = nearest(value, allowed)
            raise ValueError(f"{setting.name} is {value!r}{near} Allowed: {', '.join(map(repr, allowed))}.")
        return value
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise TypeError(f"{setting.name} is {value!r}; it must be a list of strings.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{setting.name} is {value!r}; it must be a finite number.")
    if type(value) is not kind:
        raise TypeError(f"{setting.name} is {value!r} of type {type(value).__name__}; it must be {kind.__name__}.")
    if kind is float and value != value:
        raise ValueError(f"{setting.name} is not a number.")
    return value
