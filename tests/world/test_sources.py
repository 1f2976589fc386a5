"""Sources that `data` names by a word: problems and verifier of a run, and their part in a real training."""

import pytest
from foreign import byte_tokenizer, tiny_model

from npo_core.runs.config import resolve_config
from npo_core.stages.factory import prepare
from npo_core.stages.run import run
from npo_core.world.letters import ChainVerifier
from npo_core.world.policies import save_policy
from npo_core.world.sources import made_source

LETTERS = {"data": "letters:2-3", "train_problems": 60, "eval_problems": 8}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = byte_tokenizer()
    save_policy(tiny_model("Llama", tokenizer, initializer_range=0.02), tokenizer, folder)
    return str(folder)


def test_files_and_hub_names_are_none_of_these(policy):
    assert made_source(resolve_config("grpo", "cpu", 0, {"policy": policy, "data": "rows.jsonl"})) is None
    assert made_source(resolve_config("grpo", "cpu")) is None


def test_a_run_gets_problems_and_their_verifier(policy):
    world = prepare(resolve_config("grpo", "smoke", 0, {"policy": policy, **LETTERS}), quiet=True)
    assert isinstance(world.verifier, ChainVerifier)
    assert len(world.train) == len(world.rows) == 60 and len(world.test) == 8
    assert not {uid[2:] for uid in world.train["uid"]} & {uid[2:] for uid in world.test["uid"]}
    assert sorted(set(world.test["suite"])) == ["02 letters", "03 letters"]


def test_too_few_test_problems_for_an_interval_are_refused(policy):
    config = resolve_config("grpo", "cpu", 0, {"policy": policy, "data": "letters:1-10", "eval_problems": 18})
    with pytest.raises(ValueError, match="eval_problems is 18; at least two for each of the 10 lengths"):
        made_source(config)


def test_a_run_is_paid_by_the_chain_and_scored_by_length(policy, tmp_path):
    """A training on the task by the real trainer: nothing that this policy says is right, and it is told so."""
    small = {**LETTERS, "policy": policy, "compute_steps": 2, "max_completion_length": 8, "checkpoint_every": 2}
    folder = run(resolve_config("grpo", "smoke", 0, small), tmp_path, quiet=True)
    result = folder.result()
    assert list(result["final"]["suites"]) == ["02 letters", "03 letters"]
    assert [line["npo/pass_rate"] for line in folder.metrics()] == [0.0, 0.0]
