"""Guides that cost no more rollouts than they need: turns, what a probe knows, and what is counted."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from foreign import byte_tokenizer, tiny_model

from npo_core.control import offline
from npo_core.control.offline import Offline
from npo_core.guidance.trajectories import GuidanceCache, Trajectory
from npo_core.runs.config import resolve_config
from npo_core.streams import CACHE

EOS = 9
SOLVED_AT = {"a": 1, "b": 2, "c": 4, "d": 8, "never": 99, "cut": 1}
"""Rollout of each prompt that is the first correct one; that of "cut" has no end of sequence."""


class Scripted(Offline):
    """Off-line work whose policy solves each prompt at a rollout known beforehand."""

    def __init__(self, rollouts):
        config = resolve_config("npo", "smoke", overrides={"cache_stop": True, "cache_rollouts": rollouts})
        super().__init__(None, config, {uid: {} for uid in SOLVED_AT}, None, None)
        self.asked, self.tried = [], dict.fromkeys(SOLVED_AT, 0)

    def _empty_cache(self, guide, kind=GuidanceCache):
        return kind([EOS], 4, "", self.rows)

    def _sample(self, policy, uids, k, step, stream, place, generate=None):
        assert stream is CACHE and place[0] == step
        self.asked.append((list(uids), k, *place[1:]))
        groups = []
        for uid in uids:
            numbers = range(self.tried[uid] + 1, self.tried[uid] + k + 1)
            self.tried[uid] += k
            groups.append([rollout(uid, number, number >= SOLVED_AT[uid]) for number in numbers])
        return groups


def rollout(uid, number, correct):
    tokens = (number,) if uid == "cut" else (number, EOS)
    return Trajectory(uid, tokens, (-0.1,) * len(tokens), 7, correct, str(number))


def test_a_prompt_is_sampled_in_growing_turns_and_no_further_than_its_first_correct_rollout():
    work = Scripted(8)
    cache, spent = work._fill_cache(None, list(SOLVED_AT), 7, None)
    assert work.asked == [
        (["a", "b", "c", "d", "never", "cut"], 1, 0),
        (["b", "c", "d", "never", "cut"], 1, 1),
        (["c", "d", "never", "cut"], 2, 2),
        (["d", "never", "cut"], 4, 3),
    ]
    assert spent == 6 + 5 + 8 + 12 == sum(len(uids) * k for uids, k, *_ in work.asked)
    assert {guide.uid: guide.token_ids[0] for guide in cache} == {"a": 1, "b": 2, "c": 4, "d": 8}


@pytest.mark.parametrize(("rollouts", "turns"), [(1, [1]), (3, [1, 1, 1]), (5, [1, 1, 2, 1]), (6, [1, 1, 2, 2])])
def test_turns_add_up_to_the_limit(rollouts, turns):
    work = Scripted(rollouts)
    work._fill_cache(None, ["never"], 7, None)
    assert [k for _, k, *_ in work.asked] == turns


def test_what_a_probe_sampled_is_not_sampled_again():
    work = Scripted(2)
    wrong = [rollout("c", number, False) for number in (1, 2)]
    known = [rollout("a", 3, False), rollout("a", 4, True), *wrong, rollout("stranger", 1, True)]
    cache, spent = work._fill_cache(None, ["a", "b", "c"], 7, None, known=known)
    assert [uids for uids, *_ in work.asked] == [["b"], ["b"]]
    assert spent == 2
    assert {guide.uid: guide.token_ids[0] for guide in cache} == {"a": 4, "b": 2}


def test_a_prompt_that_a_probe_sampled_joins_when_the_others_have_had_as_many():
    """A probe of two rollouts does not use up the eight that a prompt may have."""
    work = Scripted(8)
    known = [rollout("d", number, False) for number in (1, 2)]
    work.tried["d"] = 2
    cache, spent = work._fill_cache(None, ["b", "d"], 7, None, known=known)
    assert [(uids, k) for uids, k, *_ in work.asked] == [(["b"], 1), (["b"], 1), (["d"], 2), (["d"], 4)]
    assert spent == 8 and {guide.uid: guide.token_ids[0] for guide in cache} == {"b": 2, "d": 8}


def test_nothing_is_sampled_when_a_probe_knows_all():
    work = Scripted(8)
    cache, spent = work._fill_cache(None, ["a"], 7, None, known=[rollout("a", 1, True)])
    assert (work.asked, spent, len(cache)) == ([], 0, 1)


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_off_line_products_have_the_type_of_training(half):
    work = Scripted(1)
    assert work.training.half is None
    work.training = replace(work.training, half=half)
    with work._precision():
        assert torch.is_autocast_enabled("cpu") is (half is not None)
        assert half is None or torch.get_autocast_dtype("cpu") is half


@pytest.mark.parametrize(("device", "kept"), [("cpu", True), ("meta", False)])
def test_off_a_cpu_nothing_of_a_second_policy_is_trainable(monkeypatch, device, kept):
    """Autocast keeps a copy in 16 bits of each weight that is: with Qwen3-VL-2B 3.5 GiB beside the policy (an H200)."""
    monkeypatch.setattr(offline, "own_device", lambda: torch.device(device))
    work = Scripted(1)
    work.make_trainer = SimpleNamespace(policy=lambda folder: tiny_model("Llama", byte_tokenizer()))
    policy = work._learner(None)
    assert {(weight.device.type, weight.requires_grad) for weight in policy.parameters()} == {(device, kept)}
    assert not policy.training
