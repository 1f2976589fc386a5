"""The measurement of both precisions: what it counts, what is chosen, and that it is made once for a machine."""

import json

import pytest
import torch
from foreign import byte_llama

from npo_core.runs.config import resolve_config
from npo_core.runs.measurement import plan_pairs
from npo_core.runs.settings import SignalSettings
from npo_core.stages import precision
from npo_core.stages import run as stages
from npo_core.stages.measure import Measurement
from npo_core.world.computing import Computing
from npo_core.world.policies import load_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return byte_llama(tmp_path_factory.mktemp("policy"))


def line(name, trained, sampled):
    return {"matrix products in": name, "trained tokens/s": trained, "sampled tokens/s": sampled}


def test_the_faster_one_takes_the_least_time_for_a_token_sampled_and_trained_on():
    """1/100 + 1/100 against 1/300 + 1/50: twice three thousandths of a second."""
    lines = [line("float32", 100, 100), line("bfloat16", 300, 50)]
    assert precision.faster(lines) == "float32" and precision.precision_setting(lines) == "no"
    lines[1] = line("bfloat16", 300, 80)
    assert precision.faster(lines) == "bfloat16" and precision.precision_setting(lines) == "bf16"


def test_both_are_measured_and_the_policy_computes_as_it_says(policy, monkeypatch):
    seen = []
    monkeypatch.setattr(precision, "load_policy", lambda folder, share: spied(folder, seen))
    before = torch.get_num_threads()
    lines = precision.compare_precisions(policy)
    assert [each["matrix products in"] for each in lines] == ["float32", "bfloat16"]
    assert all(each["trained tokens/s"] > 0 and each["sampled tokens/s"] > 0 for each in lines)
    assert seen[: len(seen) // 2] == [torch.float32] * (len(seen) // 2)
    assert seen[len(seen) // 2 :] == [torch.bfloat16] * (len(seen) // 2)
    assert torch.get_num_threads() == before


def spied(folder, seen):
    model = load_policy(folder, share=False)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    return model


def test_it_is_measured_once_for_a_processor(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("NPO_RUNS", str(tmp_path))
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(precision, "smollm_folder", lambda quiet: policy)
    made = []
    monkeypatch.setattr(precision, "compare_precisions", lambda folder: made.append(folder) or [line("float32", 1, 1)])
    assert precision.measured_precisions(quiet=True) == precision.measured_precisions(quiet=True)
    assert made == [policy]
    monkeypatch.setattr(precision, "_processor", lambda: "another")
    precision.measured_precisions(quiet=True)
    assert len(made) == 2
    assert json.loads((tmp_path / "base" / "precision.json").read_text())["machine"]["processor"] == "another"


@pytest.mark.parametrize(
    ("listed", "found"),
    [("fpu amx_bf16 sse", True), ("fpu avx512_bf16", True), ("fpu avx512f", False), (None, None)],
)
def test_what_the_processor_says_of_itself(listed, found, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if listed is not None:
        path.write_text(f"processor\t: 0\nmodel name\t: Some\nflags\t\t: {listed}\n\nflags\t\t: other\n")
    monkeypatch.setattr(precision, "CPUINFO", path)
    assert precision.bfloat16_in_hardware() is found


@pytest.mark.parametrize(("setting", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_evaluation_and_measurement_compute_as_training_does(policy, tmp_path, setting, dtype):
    small = {"policy": str(policy), "data": "letters:2-2", "train_problems": 8, "max_completion_length": 4}
    config = resolve_config("grpo", "smoke", 0, {**small, "mixed_precision": setting})
    world = stages.prepare(config, quiet=True)
    seen = []
    stages.evaluate_policy(config, spied(policy, seen), world, "base", quiet=True)
    assert set(seen) == {dtype}
    seen.clear()
    settings = SignalSettings(prompts=2, rollouts=2, max_new_tokens=4, gradients=0)
    Measurement(
        tmp_path / "signal",
        {"000000": policy, "000001": policy},
        plan_pairs([0, 1], [0]),
        world.processor,
        list(world.train.select(range(2))),
        world.verifier,
        settings,
        load=lambda folder: spied(folder, seen),
        quiet=True,
        computing=Computing.of(config),
    ).run()
    assert set(seen) == {dtype}
