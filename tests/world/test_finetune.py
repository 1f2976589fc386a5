"""The supervised start of the real model: where it stops, what its checks mean, and what its folder hangs on."""

import json
import math

import pytest
import torch
from foreign import byte_llama

from npo_core.runs.config import resolve_config
from npo_core.trainer.inputs import encode_prompts
from npo_core.world import finetune, letters
from npo_core.world.policies import load_policy, load_processor

REAL = {
    "policy": "smollm2",
    "data": "letters:2-3",
    "warmstart_pass_rate": 0.2,
    "warmstart_steps": 40,
    "warmstart_batch": 4,
    "warmstart_learning_rate": 0.01,
    "eval_problems": 16,
}


def config_of(**changes):
    return resolve_config("grpo", "cpu", 0, {**REAL, **changes})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return byte_llama(tmp_path_factory.mktemp("pretrained"))


def test_a_check_is_the_probability_of_the_right_response_token_by_token(pretrained):
    processor, model = load_processor(pretrained), load_policy(pretrained)
    rows = letters.make_dataset(letters.sample_words("test", 3, 0, (2, 3)))
    found = finetune.check(model, processor, rows, step=7)
    chances = []
    for row in rows:
        prompt = encode_prompts(processor, [row])["input_ids"][0].tolist()
        answer = processor(row["answer"])["input_ids"] + [processor.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
        chances.append(
            math.exp(sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer)))
        )
    assert found.step == 7
    assert found.pass_rate == pytest.approx(sum(chances) / 3, rel=1e-3)
    assert found.all_wrong == pytest.approx(sum((1 - chance) ** 8 for chance in chances) / 3)


def test_it_stops_at_the_first_check_that_gets_there_and_learns_on_the_way(pretrained, tmp_path):
    config = config_of(warmstart_pass_rate=1e-16, data="letters:2-2", eval_problems=16)
    checks = finetune.warm_start(config, pretrained, tmp_path / "made", quiet=True)
    assert checks[-1].pass_rate >= 1e-16 and all(check.pass_rate < 1e-16 for check in checks[:-1])
    assert len(checks) > 1 and checks[-1].step < config.warmstart_steps
    assert json.loads((tmp_path / "made" / finetune.TRAIL).read_text())[-1]["pass_rate"] == checks[-1].pass_rate
    before, after = (
        finetune.check(
            load_policy(folder),
            load_processor(folder),
            letters.make_dataset(letters.sample_words("test", finetune.CHECKED, 0, (2, 2))),
            0,
        )
        for folder in (pretrained, tmp_path / "made")
    )
    assert after.pass_rate == pytest.approx(checks[-1].pass_rate, rel=1e-3) and after.pass_rate > 100 * before.pass_rate


def test_it_is_the_same_each_time(pretrained, tmp_path):
    config = config_of(warmstart_pass_rate=1e-200)
    for name in ("one", "two"):
        finetune.warm_start(config, pretrained, tmp_path / name, quiet=True)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_steps_that_do_not_get_there_are_said_and_leave_nothing(pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"After warmstart_steps = 3 .* warmstart_pass_rate is 0.2"):
        finetune.warm_start(config_of(warmstart_steps=3), pretrained, tmp_path / "made", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_what_decides_the_weights_names_the_folder():
    digest = finetune.real_digest(config_of())
    changed = {
        "policy_seed": 1,
        "data": "letters:2-4",
        "warmstart_pass_rate": 0.1,
        "warmstart_batch": 8,
        "warmstart_learning_rate": 0.02,
        "mixed_precision": "bf16",
    }
    assert changed.keys() == {*finetune.DECIDING, "data"}
    for name, value in changed.items():
        assert finetune.real_digest(config_of(**{name: value})) != digest, name
    assert finetune.real_digest(config_of(compute_steps=7, learning_rate=0.5, warmstart_steps=7)) == digest


def test_it_is_made_once_and_then_loaded(pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv("NPO_RUNS", str(tmp_path))
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(finetune, "smollm_folder", lambda quiet: pretrained)
    made = []
    start = finetune.warm_start
    monkeypatch.setattr(finetune, "warm_start", lambda *a: made.append(1) or start(*a))
    config = config_of(warmstart_pass_rate=1e-200)
    folder = finetune.real_policy_folder(config, quiet=True)
    assert finetune.real_policy_folder(config, quiet=True) == folder and made == [1]
    assert finetune.real_policy_folder(config.with_changes(warmstart_pass_rate=0.0), quiet=True) == pretrained


@pytest.mark.parametrize("changes", [{"policy": "somewhere"}, {"data": "rows.jsonl"}])
def test_a_start_on_another_task_or_model_is_refused(changes):
    with pytest.raises(ValueError, match="warmstart_pass_rate"):
        config_of(**changes)
