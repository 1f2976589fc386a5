"""Sources that `data` names by a word: problems and verifier of a run, and their part in a real training."""

import json
import math
import re

import pyarrow.parquet as pq
import pytest
from foreign import boxed_policy, byte_llama, byte_tokenizer

from npo_core.__main__ import main
from npo_core.runs.config import resolve_config
from npo_core.runs.settings import SignalSettings
from npo_core.stages.factory import prepare
from npo_core.stages.run import run
from npo_core.stages.signal import measure_folder
from npo_core.world.gym import INSTRUCTION, GymVerifier
from npo_core.world.letters import ChainVerifier
from npo_core.world.policies import save_policy
from npo_core.world.sources import made_source, training_prompts

GCD = {"data": "reasoning_gym:gcd,max_numbers=2,max_value=50", "train_problems": 24, "eval_problems": 4}
LETTERS = {"data": "letters:2-3", "train_problems": 60, "eval_problems": 8}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(byte_llama(tmp_path_factory.mktemp("policy")))


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


@pytest.mark.parametrize("name", ["test_data", "columns", "image_root"])
@pytest.mark.parametrize("data", ["letters", "reasoning_gym:gcd"])
def test_settings_of_files_are_refused_with_what_is_made(policy, data, name):
    given = ("answer=a",) if name == "columns" else "somewhere"
    config = resolve_config("grpo", "cpu", 0, {"policy": policy, "data": data, name: given})
    with pytest.raises(ValueError, match=f"{name} is .* empty with data = '{data}', which is made"):
        made_source(config)


def test_an_instruction_and_a_longest_prompt_hold_for_what_is_made_too(policy):
    settings = {**LETTERS, "policy": policy, "instruction": "Be brief.", "max_prompt_length": 150}
    world = prepare(resolve_config("grpo", "smoke", 0, settings), quiet=True)
    assert all(row["prompt"][-1]["content"].endswith("?\nBe brief.") for row in (*world.train, *world.test))
    with pytest.raises(ValueError, match=r"60 of 60 rows break the rules \(prompt too long: 60\)"):
        prepare(resolve_config("grpo", "smoke", 0, {**settings, "max_prompt_length": 20}), quiet=True)


def test_too_few_test_problems_for_the_tasks_are_refused(policy):
    given = {"policy": policy, "data": "reasoning_gym:gcd+lcm+products", "eval_problems": 5}
    with pytest.raises(ValueError, match="eval_problems is 5; it must be at least two for each of the 3 tasks"):
        made_source(resolve_config("grpo", "smoke", 0, {**given, "suites": ("mmstar",)}))


@pytest.fixture(scope="module")
def gym_runs(tmp_path_factory):
    """GRPO, then NPO, through the command line, on a policy that boxes 1 or 2."""
    root, tokenizer = tmp_path_factory.mktemp("gym"), byte_tokenizer()
    save_policy(boxed_policy(tokenizer), tokenizer, root / "policy")
    settings = {
        **GCD, "policy": str(root / "policy"), "compute_steps": 8, "max_completion_length": 16, "scout_steps": 2,
        "early_window": 4, "late_step": 0, "cache_rollouts": 16,
    }  # fmt: skip
    changes = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    for method in ("grpo", "npo"):
        assert main([method, "--preset", "smoke", "--root", str(root / "runs"), "--quiet", *changes]) == 0
    return {path.name.partition("-")[0]: path for path in (root / "runs").glob("*-smoke-*")}


def divisor(question):
    """The greatest common divisor that a question asks for, by our own arithmetic."""
    return math.gcd(*map(int, re.search(r"numbers: ([\d, ]+)\.", question)[1].split(",")))


@pytest.mark.parametrize("method", ["grpo", "npo"])
def test_training_is_paid_by_the_score_of_the_task(gym_runs, method):
    rows = [
        row
        for path in sorted((gym_runs[method] / "rollouts").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    for row in rows:
        assert row["correct"] == (row["text"] == f"\\boxed{{{divisor(row['question'])}}}"), row
        assert row["question"].endswith("\n" + INSTRUCTION)
    assert len({row["correct"] for row in rows}) == 2
    result = json.loads((gym_runs[method] / "result.json").read_text())
    assert list(result["final"]["suites"]) == ["gcd"]


def test_guides_are_right_by_the_score_of_the_task(gym_runs):
    (cache,) = (gym_runs["npo"] / "guidance").glob("*.parquet")
    tables = sorted((gym_runs["npo"] / "rollouts").glob("*.parquet"))
    asked = {row["uid"]: row["question"] for path in tables for row in pq.read_table(path).to_pylist()}
    guides = [row for row in pq.read_table(cache).to_pylist() if row["uid"] in asked]
    assert guides
    for guide in guides:
        assert guide["text"].startswith(f"\\boxed{{{divisor(asked[guide['uid']])}}}"), guide


def test_test_problems_are_not_trained_on_and_stay_when_the_data_seed_changes(gym_runs):
    world, other = (
        prepare(
            resolve_config("grpo", "smoke", 0, {**GCD, "policy": str(gym_runs["grpo"].parents[1] / "policy"), **seed}),
            True,
        )
        for seed in ({}, {"data_seed": 1})
    )
    assert isinstance(world.verifier, GymVerifier)
    assert (len(world.train), len(world.test)) == (24, 4)
    assert not set(world.train["uid"]) & set(world.test["uid"])
    assert world.test["uid"][:] == other.test["uid"][:] and set(world.train["uid"]) != set(other.train["uid"])
    for row in (*world.train, *world.test):
        assert world.verifier(f"\\boxed{{{divisor(row['prompt'][-1]['content'])}}}", row).correct


def test_the_signal_of_somebodys_checkpoints_is_measured_on_a_source(gym_runs, tmp_path):
    """The policy boxes 1 or 2: whatever else is asked for fails, and of the others hardly one in all of 8 rollouts."""
    settings = SignalSettings(prompts=8, rollouts=8, gradients=0, max_new_tokens=16)
    base = gym_runs["grpo"].parents[1] / "policy"
    found = measure_folder(
        gym_runs["grpo"] / "branches" / "00", GCD["data"], tmp_path, settings, base=base, distances=1, quiet=True
    )
    assert found.pairs
    rows, _, _ = training_prompts(GCD["data"], settings.prompts, settings.seed)
    wanted = {row["uid"]: divisor(row["prompt"][-1]["content"]) for row in rows}
    failed = {
        row["uid"]: row["failed"] for row in pq.read_table(tmp_path / "pairs" / "000000--resample.parquet").to_pylist()
    }
    assert failed.keys() == wanted.keys()
    assert all(failed[uid] for uid, number in wanted.items() if number > 2)
    assert not all(failed.values())
