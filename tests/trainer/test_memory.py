"""Batches off line follow from memory and vocabulary, and less memory changes no result."""

import logging
from types import SimpleNamespace

import pytest
import torch
from foreign import byte_tokenizer, tiny_model

from npo_core.trainer import memory, sampling
from npo_core.trainer.memory import SHARE, device_memory, fitting, sampling_bytes, scoring_bytes
from npo_core.trainer.sampling import completion_logps, sample_rollouts

ROWS = [{"uid": n * "a", "prompt": [{"role": "user", "content": n * "a"}], "answer": "1"} for n in (1, 5, 9)]


def policy(**text) -> SimpleNamespace:
    """What is asked of a model, in the size of Qwen3-0.6B."""
    size = {"vocab_size": 151_936, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    size |= {"num_hidden_layers": 28, "hidden_size": 1024, **text}
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**size))
    return SimpleNamespace(config=config, dtype=torch.float32)


def test_a_default_of_the_small_policy_is_no_default_of_a_real_one():
    """512 responses of 512 tokens over Qwen's vocabulary are the 430 GiB that no machine here has."""
    assert 512 * scoring_bytes(policy(), 512) / 2**30 == pytest.approx(430, rel=0.01)
    assert scoring_bytes(policy(vocab_size=260), 16) < 2**20


def test_keys_and_values_are_counted_by_heads_that_are_kept():
    cached = 2 * 8 * 128 * 28 * 2 * 512 * 4
    assert sampling_bytes(policy(), 512) == cached + 4 * 4 * 151_936
    # as GPT-2's configuration: every head is kept, and its width follows
    every = policy(num_key_value_heads=None, head_dim=None)
    assert sampling_bytes(every, 512) - 4 * 4 * 151_936 == 2 * 1024 * 28 * 2 * 512 * 4


def test_a_batch_takes_its_share_and_the_limit_holds(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(memory, "device_memory", lambda device: 1000)
    memory._say.cache_clear()
    assert fitting(8, 10, "cpu", "scored") == 8 and not caplog.records
    assert [fitting(asked, 10, "cpu", "scored") for asked in (512, 512, 26)] == [int(SHARE * 100)] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "25 responses are scored at a time, not 512: one takes 0 MiB.",
        "25 responses are scored at a time, not 26: one takes 0 MiB.",
    ], "said once"
    assert fitting(512, 900, "cpu", "scored") == 1, "more than its share, but it fits"
    with pytest.raises(
        ValueError, match=r"One response that is sampled takes .* GiB, and cpu has .* shorter responses"
    ):
        fitting(1, 1001, "cpu", "sampled")


def test_a_container_has_what_it_is_allowed(monkeypatch, tmp_path):
    """In the form of control groups of today, in which a container sees itself as the top."""
    monkeypatch.setattr(memory, "CONTROL", tmp_path)
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "own")
    whole = device_memory("cpu")
    assert whole > 2**28, "no such file, as on other systems"
    (tmp_path / "own").write_text("0::/\n")
    for text, expected in (("max\n", whole), ("268435456\n", 2**28), (f"{2 * whole}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert device_memory("cpu") == expected
    monkeypatch.setattr(memory, "process_count", lambda: 4)
    assert device_memory("cpu") == whole // 4


@pytest.mark.parametrize("job", ["/slurm/job_7/step_0", "/"])
def test_a_job_has_what_the_groups_around_it_are_allowed(monkeypatch, tmp_path, job):
    """Batch systems put a job into a group inside of others, and older systems have a tree for each controller."""
    monkeypatch.setattr(memory, "CONTROL", tmp_path)
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "own")
    whole = device_memory("cpu")
    for lines, top, name in (
        (f"0::{job}\n", tmp_path, "memory.max"),
        (f"5:cpu,cpuacct:/elsewhere\n4:memory:{job}\n0::/\n", tmp_path / "memory", "memory.limit_in_bytes"),
    ):
        (tmp_path / "own").write_text(lines)
        group = top / job.strip("/")
        group.mkdir(parents=True, exist_ok=True)
        assert device_memory("cpu") == whole
        (group / name).write_text(f"{2**29}\n")
        assert device_memory("cpu") == 2**29
        (top / name).write_text(f"{2**28}\n")
        assert device_memory("cpu") == 2**28, "the smallest on the way to the top"
        (group / name).unlink(missing_ok=True)
        (top / name).unlink(missing_ok=True)


def test_less_memory_changes_no_score_and_k_may_be_more_than_fits(monkeypatch):
    tokenizer = byte_tokenizer()
    model = tiny_model("Qwen3", tokenizer).eval()
    tokens = [tokenizer("ab")["input_ids"], tokenizer("b")["input_ids"], tokenizer("abc")["input_ids"]]
    whole = completion_logps(model, tokenizer, ROWS, tokens)
    calls = []
    drawn = sampling._drawn
    monkeypatch.setattr(sampling, "_drawn", lambda *args, **kw: calls.append(len(args[2])) or drawn(*args, **kw))
    monkeypatch.setattr(memory, "device_memory", lambda device: int(2 * scoring_bytes(model, 3) / SHARE))
    apart = completion_logps(model, tokenizer, ROWS, tokens)
    assert [pytest.approx(row, abs=1e-5) for row in whole] == apart
    monkeypatch.setattr(memory, "device_memory", lambda device: int(2 * sampling_bytes(model, 3) / SHARE))
    groups = sample_rollouts(
        model, tokenizer, ROWS, 5, lambda *_: True, seed=0, max_new_tokens=3, score=False
    )  # fmt: skip
    assert calls == [2, 2, 1] * 3
    assert [[trajectory.uid for trajectory in group] for group in groups] == [[row["uid"]] * 5 for row in ROWS]


def test_what_cannot_be_scored_is_said_before_anything_is_sampled(monkeypatch):
    tokenizer = byte_tokenizer()
    model = tiny_model("Qwen3", tokenizer)
    monkeypatch.setattr(sampling, "_drawn", lambda *args, **kw: pytest.fail("sampled"))
    monkeypatch.setattr(memory, "device_memory", lambda device: scoring_bytes(model, 64) - 1)
    with pytest.raises(ValueError, match="One response that is scored takes"):
        sample_rollouts(model, tokenizer, ROWS, 2, lambda *_: True, seed=0, max_new_tokens=64)
