"""A setting is declared once, and checked from its declaration."""

import math
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Literal, get_origin

import numpy as np
import pytest

from npo_core.declaration import (
    COUNT,
    POSITIVE,
    SHARE,
    WHOLE,
    Bounds,
    check_declared,
    declarations,
    declared_field,
    refuse_unknown,
)
from npo_core.runs.config import RunConfig, resolve_config
from npo_core.runs.settings import SignalSettings
from npo_core.trainer.config import NPOConfig

_one = partial(declared_field, "Ours")


@dataclass(frozen=True)
class Ours:
    share: float = _one(0.5, "A share.", bounds=SHARE)
    count: int = _one(3, "How many.", bounds=COUNT)
    kind: Literal["red", "green"] = _one("red", "A colour.")
    other: dict | None = None

    def __post_init__(self):
        check_declared(self)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        (SHARE, [0, 0.5, 1], [-1e-9, 1 + 1e-9], "a number from 0 to 1"),
        (COUNT, [1, 1e9], [0, -1], "at least 1"),
        (WHOLE, [0, 7], [-1], "at least 0"),
        (POSITIVE, [1e-300], [0, -1], "above 0"),
        (Bounds(0, 1, high_open=True), [0, 0.999], [1], "at least 0 and below 1"),
        (Bounds(0, 1, low_open=True), [1, 1e-9], [0], "above 0 and at most 1"),
        (Bounds(high=3), [3, -9], [3.1], "at most 3"),
    ],
)
def test_bounds_hold_their_ends_or_not_and_say_so(bounds, inside, outside, text):
    assert all(number in bounds for number in inside) and not any(number in bounds for number in outside)
    assert str(bounds) == text


@pytest.mark.parametrize(
    ("given", "error", "complaint"),
    [
        ({"share": 1.5}, ValueError, "share is 1.5; it must be a number from 0 to 1."),
        ({"share": math.nan}, ValueError, "share is nan; it must be a finite number."),
        ({"share": "0.5"}, TypeError, "share is '0.5' of type str; it must be float, a number from 0 to 1."),
        ({"share": True}, TypeError, "share is True of type bool; it must be float, a number from 0 to 1."),
        ({"count": 0}, ValueError, "count is 0; it must be at least 1."),
        ({"count": 2.0}, TypeError, "count is 2.0 of type float; it must be int, a whole number, at least 1."),
        ({"kind": "gren"}, ValueError, "kind is 'gren'; did you mean 'green'? Allowed: 'red', 'green'."),
    ],
    ids=str,
)
def test_what_a_declaration_does_not_allow_is_refused_with_what_it_allows(given, error, complaint):
    with pytest.raises(error) as caught:
        Ours(**given)
    assert str(caught.value) == complaint


def test_an_unknown_name_is_answered_with_the_nearest_its_bounds_and_its_default():
    with pytest.raises(ValueError) as caught:
        refuse_unknown({"cuont": 3}, Ours)
    wanted = "Unknown setting 'cuont'; did you mean 'count'? count: a whole number, at least 1; default 3. "
    assert str(caught.value).startswith(wanted)
    with pytest.raises(ValueError, match=r"Unknown setting 'zzzz'\. `python"):
        refuse_unknown({"zzzz": 3}, Ours)


def test_numbers_of_numpy_become_plain_ones():
    found = Ours(share=np.float32(0.25), count=np.int64(4))
    assert (found.share, found.count) == (0.25, 4) and type(found.share) is float and type(found.count) is int


def test_a_field_without_declaration_is_left_alone():
    assert set(declarations(Ours)) == {"share", "count", "kind"}
    assert Ours(other={"any": 1}).other == {"any": 1}


@pytest.mark.parametrize("settings", [RunConfig, SignalSettings])
def test_every_setting_is_declared_whole(settings):
    assert is_dataclass(settings) and set(declarations(settings)) == {one.name for one in fields(settings)}
    for one in fields(settings):
        setting = one.metadata["setting"]
        assert setting.source in ("paper", "ours") and setting.group, one.name
        assert len(setting.help) > 10 and setting.help.endswith((".", ")")), one.name
        assert one.default == setting.default is not MISSING, one.name
        number = one.type in (int, float)
        without = {"temperature", "top_p", "top_k"} if settings is SignalSettings else set()
        assert (setting.bounds is not None) == (number and one.name not in without), f"{one.name} has no bounds"
        assert not number or setting.bounds is None or setting.default in setting.bounds, one.name


NUMBERS = [name for name, setting in declarations(RunConfig).items() if setting.bounds is not None]


def test_every_number_of_a_run_is_held_to_its_declaration():
    """No second list of bounds: each end that is declared is refused by RunConfig itself."""
    config = resolve_config("grpo", "cpu")
    for name in NUMBERS:
        bounds, kind = declarations(RunConfig)[name].bounds, type(getattr(config, name))
        beyond = [] if bounds.low is None else [bounds.low if bounds.low_open else bounds.low - 1]
        beyond += [] if bounds.high is None else [bounds.high if bounds.high_open else bounds.high + 1]
        assert beyond, name
        for value in beyond:
            with pytest.raises(ValueError, match=f"^{name} is .*it must be {bounds}"):
                replace(config, **{name: kind(value)})


def test_what_the_trainer_and_a_run_share_is_one_declaration(tmp_path):
    shared = declarations(NPOConfig)
    assert set(shared) == {
        "tau_gate", "ratio_mode", "ratio_truncation", "ratio_gamma", "guide_behaviour", "placement", "guides_per_group",
        "guide_prefix", "mask_unsampled",
    }  # fmt: skip
    types = {one.name: one.type for one in fields(RunConfig)}
    for one in fields(NPOConfig):
        if one.name in shared:
            assert declarations(RunConfig)[one.name] is shared[one.name] and types[one.name] == one.type, one.name
            assert getattr(RunConfig(), one.name) == one.default, one.name
            if get_origin(one.type) is not Literal and one.type is not bool:
                given = {one.name: type(one.default)(-1)}
                with pytest.raises(ValueError, match=f"^{one.name} is .*it must be {shared[one.name].bounds}"):
                    NPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **given)
