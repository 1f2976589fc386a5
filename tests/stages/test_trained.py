"""A stranger's folder is measured in the precision of its run: what its checkpoints tell, and what is made of it."""

import json
import logging
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import THINKING, byte_tokenizer, tiny_model
from trl import GRPOConfig, GRPOTrainer
from worlds import trainer_of, world

from npo_core.files import read_table
from npo_core.guidance.verdicts import Verdict
from npo_core.runs.settings import SignalSettings
from npo_core.stages import trained
from npo_core.stages.signal import describe, measure_folder
from npo_core.stages.trained import trained_dtype, trained_products
from npo_core.trainer.gradients import own_gram
from npo_core.trainer.sampling import completion_logps
from npo_core.world import policies
from npo_core.world.policies import load_policy, load_processor, save_policy

SETTINGS = SignalSettings(prompts=4, rollouts=2, scored=1, gradients=2, max_new_tokens=6, resamples=5)


def never(text, row):
    return Verdict.WRONG


def checkpoint(folder: Path, dtype="float32", **arguments) -> Path:
    """What is read of a checkpoint: its configuration, and TRL's arguments as transformers' Trainer saves them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"dtype": dtype}))
    if arguments:
        torch.save(GRPOConfig(**{"output_dir": "out", "use_cpu": True, **arguments}), folder / "training_args.bin")
    return folder


# What checkpoints tell


@pytest.mark.parametrize(
    ("arguments", "launched", "told"),
    [
        ({"bf16": True}, None, "bf16"),
        ({"bf16": False}, None, "no"),
        ({"bf16": False}, "bf16", "bf16"),
        ({"bf16": False}, "no", "no"),
        ({"fp16": True}, "bf16", "fp16"),
        ({"bf16": True, "run_name": "mixed_precision", "hub_model_id": "bf16"}, None, "bf16"),
    ],
)
def test_the_precision_is_read_from_the_arguments_of_a_run(tmp_path, monkeypatch, arguments, launched, told):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert trained_products([checkpoint(tmp_path / "checkpoint-1", **arguments)]) == told


@pytest.mark.parametrize(("arguments", "told"), [({"bf16": True}, "bf16"), ({"bf16": False, "fp16": False}, "no")])
def test_an_older_trainer_wrote_no_mixed_precision(tmp_path, arguments, told):
    folder = checkpoint(tmp_path / "checkpoint-1", bf16=False)
    torch.save(arguments, folder / "training_args.bin")
    assert trained_products([folder]) == told


def test_without_arguments_nothing_is_told(tmp_path):
    assert trained_products([checkpoint(tmp_path / "checkpoint-1")]) is None


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return Path.mkdir, (self.sign,)


def test_a_hostile_file_of_arguments_executes_nothing(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-1")
    torch.save({"mixed_precision": "bf16", "more": Payload(tmp_path / "executed")}, folder / "training_args.bin")
    assert trained_products([folder]) == "bf16"
    assert not (tmp_path / "executed").exists()
    torch.load(folder / "training_args.bin", weights_only=False)
    assert (tmp_path / "executed").exists(), "or this test could not fail"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "cannot be read"),
        ({"data.pkl": b"garbage"}, "cannot be read"),
        ({"data.pkl": b"\x80\x02X\xff\xff\x00\x00cut"}, "cannot be read"),
        ({"data.pkl": b"\x80\x02N."}, r"says nothing .*\(nothing\)"),
        ({"data.pkl": b"\x80\x02X\x0f\x00\x00\x00mixed_precisionX\x03\x00\x00\x00fp8."}, r"says nothing .*\(fp8\)"),
        ({"data.pkl": b"N" * (trained.LARGEST + 1)}, "bytes of arguments"),
        ({"other": b""}, "cannot be read"),
    ],
)
def test_arguments_that_cannot_be_read_ask_for_the_setting(tmp_path, content, message):
    folder = checkpoint(tmp_path / "checkpoint-1")
    if isinstance(content, bytes):
        (folder / "training_args.bin").write_bytes(content)
    else:
        with zipfile.ZipFile(folder / "training_args.bin", "w") as archive:
            for name, data in content.items():
                archive.writestr(f"training_args/{name}", data)
    with pytest.raises(ValueError, match=rf"training_args\.bin .*{message}.* set mixed_precision to one of 'no' or"):
        trained_products([folder])


def test_checkpoints_that_differ_ask_for_the_setting(tmp_path):
    found = [checkpoint(tmp_path / "checkpoint-1", bf16=True), checkpoint(tmp_path / "checkpoint-2", bf16=False)]
    with pytest.raises(ValueError, match=r"\(checkpoint-1: bf16, checkpoint-2: no\); set mixed_precision"):
        trained_products(found)
    with pytest.raises(ValueError, match=r"types \(checkpoint-1: float32, checkpoint-3: bfloat16\); set dtype"):
        trained_dtype([found[0], checkpoint(tmp_path / "checkpoint-3", "bfloat16")])


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({}, "float32"),
        ({"dtype": "float8_e4m3fn"}, "float32"),
    ],
)
def test_the_weights_are_of_the_type_that_the_configuration_names(tmp_path, config, dtype):
    folder = checkpoint(tmp_path / "checkpoint-1")
    (folder / "config.json").write_text(json.dumps(config))
    assert trained_dtype([folder]) == dtype


# What is made of it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of GRPO with products in bfloat16, as its Trainer leaves it, and the policy that it began with."""
    folder = tmp_path_factory.mktemp("run")
    tiny = world("text")
    trainer = trainer_of(
        tiny, folder, GRPOTrainer, steps=2, save_strategy="steps", save_steps=1, save_only_model=True, bf16=True
    )
    trainer.train()
    save_policy(tiny.build(), tiny.processor, folder / "base")
    return folder


@pytest.fixture
def seen(monkeypatch):
    """Types of the weights of the policies that are loaded, and of what a layer makes of them."""
    found = set()

    def load(*given, **named):
        model = load_policy(*given, **named)
        layer = next(part for part in model.model.modules() if isinstance(part, torch.nn.Linear))
        layer.register_forward_hook(lambda part, _, out: found.add((part.weight.dtype, out.dtype)))
        return model

    monkeypatch.setattr(policies, "load_policy", load)
    return found


def measured(run, out, tmp_path, **given):
    rows = [{"uid": row["uid"], "prompt": row["prompt"], "answer": row["answer"]} for row in world("text").dataset]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return measure_folder(run, data, out, SETTINGS, verifier=never, base=run / "base", quiet=True, **given)


BOTH = {"bf16": torch.bfloat16, "no": torch.float32}


@pytest.mark.parametrize(
    ("given", "weights", "products"),
    [
        ({}, torch.float32, torch.bfloat16),
        ({"mixed_precision": "no"}, torch.float32, torch.float32),
        ({"mixed_precision": "no", "dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_folder_is_measured_as_its_run_computed_or_as_asked(run, tmp_path, seen, caplog, given, weights, products):
    with caplog.at_level(logging.WARNING):
        found = measured(run, tmp_path / "out", tmp_path, **given)
    assert seen == {(weights, products)} and not caplog.records
    names = [str(kind).removeprefix("torch.") for kind in (weights, products)]
    assert describe(found).endswith("Computed with weights in {}, matrix products in {}.".format(*names))
    kept = read_table(found.folder / "samples" / "000001.parquet")[:: SETTINGS.rollouts]
    policy = load_policy(run / "checkpoint-1", dtype=names[0]).eval()
    rows = list(world("text").dataset)[: SETTINGS.prompts]
    scored = {}
    for kind in BOTH.values():
        with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
            tokens = [row["token_ids"] for row in kept]
            scored[kind] = completion_logps(policy, load_processor(run / "base"), rows, tokens)
    right = [logp for row in kept for logp in row["logps"]]
    assert right == pytest.approx([logp for row in scored[products] for logp in row], abs=1e-5)
    if given.get("dtype") is None:
        (other,) = set(BOTH.values()) - {products}
        assert right != pytest.approx([logp for row in scored[other] for logp in row], abs=1e-4)


def test_what_was_measured_in_another_precision_is_not_gone_on_with(run, tmp_path):
    measured(run, tmp_path / "out", tmp_path)
    with pytest.raises(
        ValueError, match=r"was measured with computing \{.*'bf16'\}, now it is \{.*'no'\}; give another folder"
    ):
        measured(run, tmp_path / "out", tmp_path, mixed_precision="no")
    told = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert told["computing"] == {"dtype": "float32", "mixed_precision": "bf16"}


def test_where_nothing_tells_it_is_said(run, tmp_path, caplog, seen):
    """As with adapters that were merged, or checkpoints of another trainer."""
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("training_args.bin"))
    with caplog.at_level(logging.WARNING):
        measured(bare, tmp_path / "out", tmp_path)
    assert seen == {(torch.float32, torch.float32)}
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("No checkpoint has a training_args.bin") and "set mixed_precision to 'bf16'" in line


def test_prompts_are_those_of_the_run_s_template_arguments(tmp_path):
    """Rollouts, log-probs and gradients; Qwen3's template, for one, ends a prompt otherwise without thinking."""
    tokenizer = byte_tokenizer(template=THINKING)
    for step in (1, 2):
        model = tiny_model("Llama", tokenizer)
        model.lm_head.weight.data.mul_(step)
        save_policy(model, tokenizer, tmp_path / f"run/checkpoint-{step}")
    rows = [{"uid": f"{n}", "prompt": f"{'half of ' * n}two?", "answer": "1"} for n in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"verifier": never, "quiet": True, "mixed_precision": "no"}
    template = {"enable_thinking": False}
    found = measure_folder(tmp_path / "run", data, tmp_path / "out", SETTINGS, **given, chat_template_kwargs=template)
    kept = read_table(found.folder / "samples" / "000001.parquet")[:: SETTINGS.rollouts]
    tokens, right = [row["token_ids"] for row in kept], np.concatenate([row["logps"] for row in kept])
    policy = load_policy(tmp_path / "run/checkpoint-1").eval()
    asked = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    for arguments, same in ((template, True), ({}, False)):
        about = {"chat_template_kwargs": arguments}
        scored = np.concatenate(completion_logps(policy, tokenizer, asked, tokens, **about))
        assert bool(np.abs(right - scored).max() < 1e-4) is same
        gram = own_gram(policy, tokenizer, asked[:1], tokens[:1], **about)[0].flatten()
        (row, *_) = read_table(found.folder / "own" / "000001.parquet")
        assert np.allclose(row["gram"], gram, rtol=1e-3) is same
    with pytest.raises(ValueError, match=r"with chat_template_kwargs \{'enable_thinking': False\}, now it is \{\}"):
        measure_folder(tmp_path / "run", data, tmp_path / "out", SETTINGS, **given)


def test_a_precision_that_is_none_is_refused_before_anything_is_sampled(run, tmp_path):
    for name, value in (("dtype", "float64"), ("mixed_precision", "half")):
        with pytest.raises(ValueError, match=rf"{name} is '{value}'; it must be one of"):
            measured(run, tmp_path / "out", tmp_path, **{name: value})
    assert not (tmp_path / "out").exists()
