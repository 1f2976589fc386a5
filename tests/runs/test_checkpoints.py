"""Checkpoints: what counts as complete, what stays when older ones are slimmed, and how much disk they take."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from npo_core.runs.checkpoints import (
    ADAM_COPIES,
    MARKER,
    CheckpointError,
    checkpoint_folder,
    checkpoint_step,
    complete_checkpoints,
    mark_complete,
    require_complete,
    retain,
    retention_bytes,
    slim,
)

WEIGHTS = "model.safetensors"
FULL_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def write_checkpoint(branch, step, mark=True, files=(WEIGHTS, "config.json", "training_args.bin", *FULL_STATE)):
    """A folder with the files that transformers' Trainer writes."""
    folder = checkpoint_folder(branch, step)
    folder.mkdir(parents=True)
    for size, name in enumerate(files, start=1):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    if mark:
        mark_complete(folder)
    return folder


def test_the_step_is_in_the_name(tmp_path):
    assert checkpoint_folder(tmp_path, 120).name == "checkpoint-120"
    assert checkpoint_step(checkpoint_folder(tmp_path, 120)) == 120


def test_a_complete_checkpoint_is_given_back(tmp_path):
    folder = write_checkpoint(tmp_path, 10)
    assert require_complete(folder) == folder
    assert require_complete(str(folder), resumable=False) == folder
    assert json.loads((folder / MARKER).read_text())[WEIGHTS] == 1
    assert [path.name for path in folder.glob(".*")] == []


def test_a_missing_folder_and_a_half_written_one_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        require_complete(tmp_path / "checkpoint-10")
    folder = write_checkpoint(tmp_path, 20, mark=False)
    for resumable in (True, False):
        with pytest.raises(CheckpointError, match="half written"):
            require_complete(folder, resumable)
    assert complete_checkpoints(tmp_path) == {}


@pytest.mark.parametrize("name", [WEIGHTS, *FULL_STATE])
def test_a_file_of_another_size_or_gone_is_damage(tmp_path, name):
    folder = write_checkpoint(tmp_path, 10)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match=f"{name} is missing or not {len(whole)} bytes"):
        require_complete(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        require_complete(folder)
    # damage to the optimiser does not spoil a guide, damage to the weights does
    if name == WEIGHTS:
        with pytest.raises(CheckpointError):
            require_complete(folder, resumable=False)
    else:
        assert require_complete(folder, resumable=False) == folder


def test_marking_again_after_a_change_makes_it_complete_again(tmp_path):
    folder = write_checkpoint(tmp_path, 10)
    (folder / WEIGHTS).write_bytes(b"other weights")
    mark_complete(folder)
    assert require_complete(folder) == folder
    assert MARKER not in json.loads((folder / MARKER).read_text())


STRANGERS = (
    "checkpoint-best", "checkpoint-2-copy", "checkpoint-2 (copy)", "checkpoint-02", "checkpoint-", "checkpoint-٣",
    "checkpoint--1", "checkpoint-2.5", "checkpoint-1e3", "checkpoint-2\n",
)  # fmt: skip


def test_what_lies_beside_the_checkpoints_is_passed_over(tmp_path):
    whole = write_checkpoint(tmp_path, 2)
    for name in STRANGERS:
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "checkpoint-7").write_text("a file")
    (tmp_path / "checkpoint-4").symlink_to(write_checkpoint(tmp_path / "other disk", 4))
    (tmp_path / "checkpoint-6").symlink_to(tmp_path / "gone")
    assert list(complete_checkpoints(tmp_path)) == [2, 4]
    retain(tmp_path, newest=4, keep=1)
    for name in STRANGERS:
        assert {path.name for path in (tmp_path / name).iterdir()} == {path.name for path in whole.iterdir()} | {
            "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"
        }  # fmt: skip
        with pytest.raises(CheckpointError, match="named checkpoint-<step>"):
            checkpoint_step(tmp_path / name)
    assert list(complete_checkpoints(tmp_path)) == [4], "the older one was slimmed"


LOADED = ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
          "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "vocab.json")  # fmt: skip
"""Files of a checkpoint that vLLM or transformers read where they load it as a policy."""


def test_a_slimmed_checkpoint_guides_but_does_not_resume(tmp_path):
    folder = write_checkpoint(tmp_path, 10, files=(WEIGHTS, "training_args.bin", *LOADED, *FULL_STATE))
    slim(folder)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, *LOADED, MARKER}
    assert require_complete(folder, resumable=False) == folder
    with pytest.raises(CheckpointError, match="slimmed"):
        require_complete(folder)
    slim(folder)
    assert require_complete(folder, resumable=False) == folder


LAYOUTS = {
    "adapter": (("adapter_model.safetensors", "adapter_config.json"), FULL_STATE),
    "shards": (
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        FULL_STATE,
    ),
    "two processes": ((WEIGHTS,), ("rng_state_0.pth", "rng_state_1.pth", *FULL_STATE[:2], FULL_STATE[3])),
    "FSDP": (
        (WEIGHTS,),
        ("pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "trainer_state.json"),
    ),
    "FSDP in shards": (
        (WEIGHTS,),
        ("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "scheduler.pt", "rng_state_0.pth",
         "trainer_state.json"),
    ),
}  # fmt: skip
"""Files that hold the weights, and those that a resume needs, as each way of training names them."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_training_has_its_checkpoints(tmp_path, layout):
    weights, state = LAYOUTS[layout]
    folder = write_checkpoint(tmp_path, 10, files=("config.json", *weights, *state))
    for name in (*weights, *state):
        if name == "adapter_config.json":
            continue
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match="damaged"):
            require_complete(folder)
        (folder / name).write_bytes(whole)
    assert require_complete(folder) == folder
    slim(folder)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {"config.json", *weights, MARKER}
    assert require_complete(folder, resumable=False) == folder
    with pytest.raises(CheckpointError, match="slimmed"):
        require_complete(folder)


def test_weights_that_are_not_safetensors_are_none(tmp_path):
    folder = write_checkpoint(tmp_path, 10, files=("pytorch_model.bin", *FULL_STATE))
    with pytest.raises(CheckpointError, match="no weights in safetensors"):
        require_complete(folder, resumable=False)


def test_a_kill_while_slimming_leaves_a_checkpoint_that_claims_no_more_than_it_holds(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, 10)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            slim(folder)
    assert complete_checkpoints(tmp_path) == {}
    assert complete_checkpoints(tmp_path, resumable=False) == {10: folder}


def test_complete_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (100, 20, 3):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 200, mark=False)
    slim(checkpoint_folder(tmp_path, 3))
    (tmp_path / "checkpoint-of-somebody").mkdir()
    assert list(complete_checkpoints(tmp_path)) == [20, 100]
    assert list(complete_checkpoints(tmp_path, resumable=False)) == [3, 20, 100]
    assert complete_checkpoints(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("newest", "keep", "resumable"),
    [
        (100, 2, [80, 100]),
        (100, 1, [100]),
        (100, 9, [20, 40, 60, 80, 100]),
        (100, 0, [20, 40, 60, 80, 100]),
        (60, 2, [40, 60, 80, 100]),  # later ones, of an abandoned future, are not touched
    ],
)
def test_the_newest_stay_resumable_and_the_others_keep_their_weights(tmp_path, newest, keep, resumable):
    steps = [20, 40, 60, 80, 100]
    for step in steps:
        write_checkpoint(tmp_path, step)
    for _ in range(2):
        retain(tmp_path, newest, keep)
        assert list(complete_checkpoints(tmp_path)) == resumable
        assert list(complete_checkpoints(tmp_path, resumable=False)) == steps


def test_retaining_step_by_step_is_a_sliding_window(tmp_path):
    for step in range(1, 7):
        write_checkpoint(tmp_path, step)
        retain(tmp_path, step, keep=3)
        assert list(complete_checkpoints(tmp_path)) == list(range(max(1, step - 2), step + 1))


@pytest.mark.parametrize(
    ("checkpoints", "keep", "expected"),
    [
        (40, 0, 40 * 12_000),  # all of them: 4 bytes for the weight and for each of two moments
        (40, 10, 10 * 12_000 + 30 * 4_000),
        (5, 10, 5 * 12_000),
        (1, 1, 12_000),
        (0, 3, 0),
    ],
)
def test_retention_in_hand_numbers(checkpoints, keep, expected):
    assert retention_bytes(1000, 4, checkpoints, keep) == expected


def test_retention_of_the_papers_run():
    # 8 B parameters in float32: 32 GB of weights, 96 GB resumable, 40 checkpoints, a horizon of ten
    assert retention_bytes(8 * 10**9, 4, 40, 10) == 10 * 96 * 10**9 + 30 * 32 * 10**9


def test_retention_is_near_the_bytes_on_disk(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Linear(256, 128))
    optimizer = torch.optim.AdamW(model.parameters())
    steps, keep = 5, 2
    for step in range(1, steps + 1):
        model(torch.ones(1, 128)).sum().backward()
        optimizer.step()
        folder = checkpoint_folder(tmp_path, step)
        folder.mkdir()
        save_file(model.state_dict(), folder / WEIGHTS)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        for name in FULL_STATE[1:]:
            (folder / name).write_bytes(b"{}")
        mark_complete(folder)
        retain(tmp_path, step, keep)
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert retention_bytes(parameters, 4, steps, keep) == pytest.approx(on_disk, rel=0.02)
    assert ADAM_COPIES == 3
