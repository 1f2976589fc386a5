"""A policy that is spread over two processes (FSDP 2, gloo on the CPU) is trained as one that is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import launched
import pytest
import torch
from launched_own_sharded import trained
from safetensors.torch import load_file
from worlds import world

from npo_core.runs.config import resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.stages import run as stages
from npo_core.trainer.fsdp import reduced_each_pass, reshard, train_sharded
from npo_core.world.policies import load_policy, load_processor, save_policy
from npo_core.world.warmstart import base_policy_folder

SCRIPT = Path(__file__).parents[1] / "launched_sharded.py"
OWN_SCRIPT = SCRIPT.with_name("launched_own_sharded.py")
LAYOUT = {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}
SETTINGS = {
    "micro_batch": 4,  # four passes of one process, two of each of two
    "freeze_vision": False,
    "gradient_checkpointing": True,
    "learning_rate": 1.0e-3,
    "compute_steps": 6,
    "temperature": 1.2,
    "checkpoint_every": 1,
    "cache_rollouts": 16,
    "eval_problems": 4,
}
"""AutoNPO with the settings of preset paper that matter here, and a roll-back within six steps."""

WARNS_EVERY = 3
"""Steps between the warnings of its trigger."""

CLOSE = 5e-7
"""Weights of sharded and of whole policies, the mean of a tensor: the same gradients, added in another order."""

ASTRAY = SETTINGS["learning_rate"] / 10
"""The same of one weight: Adam divides by the gradient's size, so where that is nearly zero rounding decides."""


def untied(folder: Path) -> Path:
    """The small base policy with a head of its own, as the 8B has it; the head of the smaller ones is the embedding."""
    base = base_policy_folder(resolve_config("autonpo", "smoke"), quiet=True)
    policy = load_policy(base)
    policy.config.tie_word_embeddings = policy.config.text_config.tie_word_embeddings = False
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone())
    policy._tied_weights_keys, policy._keys_to_ignore_on_save = {}, None
    save_policy(policy, load_processor(base), folder)
    return folder


def launch(processes: int, script: Path, *arguments: object, **changes: object) -> None:
    """Run a script in processes over which accelerate shards, by its settings for layers with some changed."""
    settings = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": "true", **changes}
    settings |= {name.removeprefix("fsdp_"): str(value) for name, value in LAYOUT.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, "--master_port", str(launched.free_port()), str(script), *map(str, arguments)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(SCRIPT.parents[1]),
            "ACCELERATE_USE_CPU": "true",
            "ACCELERATE_TORCH_DEVICE": "cpu",
            "ACCELERATE_USE_FSDP": "true",
            **{f"FSDP_{name.upper()}": str(value) for name, value in settings.items()},
        },
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same AutoNPO run on a whole policy and on one that two processes share."""
    folder = tmp_path_factory.mktemp("sharded")
    layout = folder / "two.yaml"
    layout.write_text(
        "distributed_type: FSDP\nnum_machines: 1\nnum_processes: 2\nfsdp_config:\n"
        + "".join(f"  {name}: {value}\n" for name, value in LAYOUT.items())
    )
    whole = resolve_config("autonpo", "smoke", overrides={**SETTINGS, "policy": str(untied(folder / "policy"))})
    shared = whole.with_changes(launcher=str(layout))
    (folder / "config.json").write_text(shared.to_json())
    launch(2, SCRIPT, folder / "config.json", folder, WARNS_EVERY)
    with pytest.MonkeyPatch.context() as patch:
        launched.rig_process(WARNS_EVERY, patch.setattr)
        one = stages.run(whole, folder, quiet=True)
    return one, RunFolder(shared, folder)


def weights(run: RunFolder) -> dict[Path, dict[str, torch.Tensor]]:
    return {
        path.relative_to(run.path): load_file(path) for path in sorted(run.path.glob("branches/*/*/model.safetensors"))
    }


@pytest.mark.slow
def test_a_sharded_policy_is_trained_rolled_back_and_guided_as_a_whole_one(both):
    one, two = (weights(run) for run in both)
    assert one.keys() == two.keys() and len({place.parts[1] for place in one}) == 2
    base = load_file(both[0].path.parent / "policy" / "model.safetensors")
    for place, found in one.items():
        assert found.keys() == two[place].keys() == base.keys()
        for name, weight in found.items():
            apart = (weight - two[place][name]).abs()
            assert apart.mean() < CLOSE and apart.max() < ASTRAY, (place, name)
    for name in ("lm_head.weight", "model.visual.patch_embed.proj.weight"):
        assert (base[name] - one[max(one)][name]).abs().mean() > 100 * CLOSE, f"{name} hardly moved"


@pytest.mark.slow
def test_a_sharded_run_decides_and_measures_as_a_whole_one(both):
    one, two = ([e["event"] for e in run.events()] for run in both)
    assert one == two and "rollback" in one
    for first, second in zip(*(run.metrics() for run in both), strict=True):
        for name in ("npo/reward", "npo/entropy", "npo/guide_kl", "grad_norm"):
            assert first.get(name) == pytest.approx(second.get(name), abs=1e-5), name
    assert any(line["npo/replaced_slots"] for line in both[0].metrics()), "no guide was used"
    assert both[0].result()["final"] == both[1].result()["final"]


@pytest.mark.slow
def test_products_in_16_bits_leave_gradients_and_log_probs_in_32(both):
    found = json.loads((both[1].path.parent / "half.json").read_text())
    assert found["gradients"] == ["torch.float32"] and found["without"] == 0, "gradients were kept whole between passes"
    assert found["logps"] == ["torch.float32"]


@pytest.mark.slow
def test_the_weights_that_vllm_is_sent_after_a_scoring_pass_are_whole(both):
    found = json.loads((both[1].path.parent / "half.json").read_text())
    assert found["same"] and found["sent"] == len(load_file(both[0].path.parent / "policy" / "model.safetensors"))


@pytest.mark.slow
def test_a_script_of_ones_own_shards_a_policy_from_which_tokens_are_left_out(tmp_path):
    """TRL's head, which takes its bias to be sharded as its weight is, where FSDP gathers the head alone."""
    world("text").build().save_pretrained(tmp_path / "policy")
    launch(1, OWN_SCRIPT, tmp_path / "policy", tmp_path, transformer_cls_to_wrap="Qwen3DecoderLayer,Linear")
    sharded = load_file(tmp_path / "sharded.safetensors")
    whole, base = trained(tmp_path / "policy", tmp_path), world("text").build().state_dict()
    assert sharded.keys() == whole.keys() == base.keys()
    for name, weight in whole.items():
        assert (weight - sharded[name]).abs().mean() < CLOSE, name
    assert (whole["lm_head.weight"] - base["lm_head.weight"]).abs().mean() > 100 * CLOSE


def test_a_model_that_is_not_sharded_is_left_alone():
    model = torch.nn.Linear(2, 2)
    before = model.weight
    reshard(model)
    assert model.weight is before


def test_processes_that_were_not_started_to_shard_are_refused():
    with pytest.raises(ValueError, match=r"not started for that.*accelerate launch --config_file"):
        train_sharded(SimpleNamespace(is_fsdp_enabled=False))


def test_accelerate_gets_settings_of_its_own_to_write_into():
    assert reduced_each_pass() == reduced_each_pass() and reduced_each_pass() is not reduced_each_pass()
    assert (
        reduced_each_pass()["gradient_accumulation_kwargs"] is not reduced_each_pass()["gradient_accumulation_kwargs"]
    )
