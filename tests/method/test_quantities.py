"""Names of what is measured: what stands in tables on disk, and what each member says of itself."""

import json

import pytest

from npo_core.method.quantities import (
    ESTIMATES,
    MEASURED_COSTS,
    PROXY_COSTS,
    SIGNALS,
    Cost,
    Divergence,
    Quality,
    Signal,
)

COLUMNS = [
    "quality", "quality_1", "token_kl", "token_kl_policy", "kl", "kl_policy", "second_moment", "second_moment_policy",
    "sequence", "sequence_policy", "gradient_current", "gradient_exact", "gradient_sequence",
]  # fmt: skip
"""Columns of every table that was ever written."""


def test_the_text_of_estimates_and_signals_is_that_of_tables_on_disk():
    assert [str(name) for name in ESTIMATES] == COLUMNS == json.loads(json.dumps(ESTIMATES))
    assert [signal.name for signal in SIGNALS] == [
        f"{head}_{cost}" for head in ("signal", "signal_1") for cost in COLUMNS[4:]
    ]
    assert Signal(Quality.ONE, Cost.GRADIENT_EXACT).name == "signal_1_gradient_exact"
    assert Signal(Quality.MANY, Cost.KL).name == "signal_kl"


def test_a_cost_knows_its_estimator_and_whose_tokens_it_is_from():
    assert (*PROXY_COSTS, *MEASURED_COSTS) == tuple(Cost)
    for cost in PROXY_COSTS:
        assert not cost.measured and cost == cost.proxy + ("_policy" if cost.side == "policy" else "")
    for cost in MEASURED_COSTS:
        assert cost.measured and cost.startswith("gradient_")
        with pytest.raises(ValueError, match=f"{cost} is measured; proxies are kl, kl_policy"):
            _ = cost.proxy


def test_a_name_that_is_none_is_refused():
    for kind in (Quality, Divergence, Cost):
        with pytest.raises(ValueError, match="is not a valid"):
            kind("variance")
