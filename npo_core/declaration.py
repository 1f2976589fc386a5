"""What a setting is: declared once, with default, meaning, source, group and bounds, and checked from its declaration.

`RunConfig`, `NPOConfig` and `SignalSettings` are made of such declarations. A bad value is refused early, in one
sentence: what was given, what is allowed, and what comes nearest.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class Bounds:
    """Numbers that a setting may have: from `low` to `high`, either of them None for no limit.

    Attributes:
        low: Smallest number.
        high: Largest number.
        low_open: `low` itself is not allowed.
        high_open: `high` itself is not allowed.
    """

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low is None or number > self.low or (number == self.low and not self.low_open)
        below = self.high is None or number < self.high or (number == self.high and not self.high_open)
        return above and below

    def __str__(self) -> str:
        low = "" if self.low is None else f"{'above' if self.low_open else 'at least'} {self.low:g}"
        high = "" if self.high is None else f"{'below' if self.high_open else 'at most'} {self.high:g}"
        if low and high and not (self.low_open or self.high_open):
            return f"a number from {self.low:g} to {self.high:g}"
        return " and ".join(part for part in (low, high) if part)


SHARE = Bounds(0, 1)
"""A share or a rate."""
COUNT = Bounds(1)
"""How many, at least one."""
WHOLE = Bounds(0)
"""How many, or how much, 0 included."""
POSITIVE = Bounds(0, low_open=True)
"""A size that must not vanish."""


class _Metadata(dict):
    """What a field carries. Parsers of arguments (transformers, TRL) hand a copy of it to argparse, which knows no
    declarations."""

    def copy(self) -> dict:
        return {name: value for name, value in self.items() if name != "setting"}


Acts = Literal["start", "guidance", "plan"]
"""When a setting first decides what a run computes: from the start, where it first guides, or as part of its plan."""


@dataclass(frozen=True)
class Setting:
    """Declaration of one setting.

    Attributes:
        default: Value that it has unless another is given.
        help: Meaning, a sentence.
        group: Title of the settings that it is listed among.
        source: "paper", or "ours" where the paper leaves the choice open.
        bounds: Allowed numbers, None for a setting that is no number or has none.
        names_run: It decides what a run computes, and so is part of the run's name.
        later: It came after runs were named: at what they had it is no part of the name, and they keep theirs.
        before: What those earlier runs had, where that is not its default.
        makes_base: It decides the weights of the small world's base policy.
        acts: When it first decides what a run computes.
    """

    default: Any
    help: str
    group: str
    source: Literal["paper", "ours"] = "ours"
    bounds: Bounds | None = None
    names_run: bool = True
    later: bool = False
    before: Any = None
    makes_base: bool = False
    acts: Acts = "start"

    @property
    def had(self) -> Any:
        """Value of the runs that were made before a later setting was."""
        return self.default if self.before is None else self.before

    def field(self) -> Any:
        """The setting as a field of a dataclass; a declaration may serve in several."""
        return field(default=self.default, metadata=_Metadata(setting=self, help=self.help))


def declared_field(
    group: str, default: Any, help: str, source: Literal["paper", "ours"] = "ours", **properties: Any
) -> Any:
    """A field of a dataclass with its declaration; `functools.partial` gives the group to all fields of a section."""
    return Setting(default, help, group, source, **properties).field()


def declarations(settings: Any) -> dict[str, Setting]:
    """Declarations of a dataclass or of an instance, by name; fields of other origin are left out."""
    return {one.name: one.metadata["setting"] for one in fields(settings) if "setting" in one.metadata}


def allowed_text(setting: Field) -> str:
    """What a declared field may be, in words: its bounds, its choices, or its type."""
    kind, bounds = setting.type, setting.metadata["setting"].bounds
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    if bounds is not None:
        return f"a whole number, {bounds}" if kind is int else str(bounds)
    return {bool: "true or false", str: "a text", tuple: "a list of texts"}.get(get_origin(kind) or kind, str(kind))


def check_declared(settings: Any) -> None:
    """Give every declared field of a dataclass its declared type, and refuse what its declaration does not allow.

    Raises:
        ValueError: A value out of bounds, or none of the choices.
        TypeError: A value of another type.
    """
    for one in fields(settings):
        if "setting" not in one.metadata:
            continue
        value = typed(one, getattr(settings, one.name))
        bounds = one.metadata["setting"].bounds
        require(bounds is None or value in bounds, one.name, value, str(bounds))
        object.__setattr__(settings, one.name, value)


def require(condition: bool, name: str, given: Any, allowed: str) -> None:
    """Raise ValueError with what was given and what is allowed, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {given!r}; it must be {allowed}.")


def closest(name: str, names: Iterable[str]) -> str | None:
    """The valid name that comes nearest, if one is close; whether letters are capital does not count."""
    small = {known.lower(): known for known in reversed(list(names))}
    found = difflib.get_close_matches(str(name).lower(), list(small), n=1, cutoff=0.5)
    return small[found[0]] if found else None


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that names the closest valid name, if one is close."""
    found = closest(name, names)
    return f"; did you mean {found!r}?" if found else "."


def refuse_unknown(values: Mapping[str, Any], settings: type) -> None:
    """Refuse a name that is no field of a declared dataclass, with the nearest one, what it may be, and its default."""
    known = {one.name: one for one in fields(settings)}
    for name in values:
        if name not in known:
            near = closest(name, known)
            meant = f" {near}: {allowed_text(known[near])}; default {known[near].default!r}." if near else ""
            raise ValueError(
                f"Unknown setting {name!r}{nearest(name, known)}{meant} `python -m npo_core settings` lists all."
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
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{setting.name} is {value!r}; it must be a finite number.")
    # numpy's numbers are numbers too
    number = {float: Real, int: Integral}.get(kind)
    if number is not None and isinstance(value, number) and not isinstance(value, bool):
        return kind(value)
    if type(value) is not kind:
        raise TypeError(
            f"{setting.name} is {value!r} of type {type(value).__name__}; it must be {kind.__name__}"
            + (f", {allowed_text(setting)}." if "setting" in setting.metadata else ".")
        )
    return value
