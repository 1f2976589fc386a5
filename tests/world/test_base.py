"""The shipped base policy of the small world: what it solves, and that no fact is out of reach. Exact, unsampled."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from npo_core.guidance.fingerprints import tokenizer_of
from npo_core.runs.config import resolve_config
from npo_core.stages.factory import TEST_SEED
from npo_core.trainer.sampling import completion_logps
from npo_core.world.policies import load_policy, load_processor
from npo_core.world.tasks import FAMILIES, SUITES, make_dataset, sample_problems, write_response
from npo_core.world.warmstart import base_policy_folder

PROBLEMS = 768


@pytest.fixture(scope="module")
def solved() -> dict[str, Any]:
    """Probability of the exact solution of test problems, and of the right state of each fact that they use."""
    folder = base_policy_folder(resolve_config("grpo", "cpu"))
    processor, policy = load_processor(folder), load_policy(folder).eval()
    tokenizer = tokenizer_of(processor)
    problems = sample_problems("test", PROBLEMS, TEST_SEED)
    tokens = [
        [*tokenizer(write_response(problem, problem.states()))["input_ids"], tokenizer.eos_token_id]
        for problem in problems
    ]
    logps = completion_logps(policy, processor, list(make_dataset(problems)), tokens)
    rates, facts = defaultdict(list), defaultdict(list)
    for problem, found in zip(problems, logps, strict=True):
        rates[problem.suite].append(np.exp(np.sum(found)))
        before = [problem.start, *problem.states()[:-1]]
        for state, glyph, logp in zip(before, problem.glyphs, found[1:-2], strict=True):  # between box and its end
            facts[problem.suite, state, glyph].append(np.exp(logp))
    return {"rates": {suite: np.mean(rates[suite]) for suite in SUITES}, "facts": facts}


def test_the_base_policy_solves_some_of_every_suite_and_little_of_all(solved):
    rates = solved["rates"]
    assert 0.05 <= np.mean(list(rates.values())) <= 0.20, rates
    assert all(0.01 <= rate <= 0.4 for rate in rates.values()), rates  # at temperature 1; see docs/log.md


def test_no_fact_is_out_of_the_base_policys_reach(solved):
    """What a policy never writes, no exploration and no guide of the same run finds."""
    facts = solved["facts"]
    assert set(facts) == {fact for family in FAMILIES for fact in family.facts}
    chances = {fact: float(np.mean(found)) for fact, found in facts.items()}
    below = {fact: chance for fact, chance in chances.items() if chance < 0.02}
    assert len(below) <= 1 and min(chances.values()) >= 0.01, below  # docs/log.md names the one fact
    assert max(chances.values()) > 0.9
