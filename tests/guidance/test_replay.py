"""RLEP's pool and ExGRPO's memory: what they keep, how they draw, by hand numbers; and that a memory comes back."""

from collections import Counter

import numpy as np
import pytest
import scipy.stats

from npo_core.guidance.replay import MEMORY_FILE, OwnPast, ReplayPool, bucket_weights
from npo_core.guidance.sources import GuidanceWindow, ManyGuides, ReplaySource
from npo_core.guidance.trajectories import GuidanceRefused, Trajectory

EOS = 2


def of(uid: str, *tokens: int, correct: bool = True) -> Trajectory:
    ids = (*tokens, EOS)
    return Trajectory(uid, ids, tuple(-0.1 * (place + 1) for place in range(len(ids))), 30, correct, "text")


# RLEP's pool


def pool(*trajectories: Trajectory, seed: int = 0) -> ReplayPool:
    made = ReplayPool([EOS], 4, "digest", seed=seed)
    made.fill(trajectories)
    return made


FIVE = [of("p", token) for token in range(10, 15)]


def test_a_pool_keeps_every_usable_correct_trajectory_of_a_prompt():
    made = ReplayPool([EOS], 4, "digest", ["p", "q"])
    endless = Trajectory("p", (5,), (-1.0,), 0, True, "text")
    refused = made.fill([*FIVE, of("p", 9, correct=False), endless, of("p", 1, 2, 3, 4), of("stranger", 1), of("q", 1)])
    assert refused == 3, "without an end, too long, of an unknown prompt; a wrong one is no surprise"
    assert list(made) == [*FIVE, of("q", 1)]
    assert str(made.filled).startswith("of 10 responses 1 were wrong, 3 right but no guides (the first: Guide for 'p'")
    assert len(made) == 2 and "p" in made and "stranger" not in made
    with pytest.raises(GuidanceRefused, match="not verified correct"):
        made.add(of("p", 9, correct=False))


def test_two_are_drawn_without_return_anew_at_each_step_and_the_same_for_a_seed():
    def drawn(seed, steps=range(200)):
        return [tuple(FIVE.index(guide) for guide in pool(*FIVE, seed=seed).guides("p", step, 2)) for step in steps]

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert all(one != other for one, other in first)
    # each of the 20 ordered pairs is equally likely
    counts = Counter(drawn(0, range(1000)))
    assert len(counts) == 20
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01


def test_two_prompts_are_drawn_independently():
    made = pool(*FIVE, *(of("q", token) for token in range(10, 15)))
    same = sum(
        [guide.token_ids for guide in made.guides("p", step, 2)]
        == [guide.token_ids for guide in made.guides("q", step, 2)]
        for step in range(200)
    )
    assert same < 30, "one in twenty, not all"


def test_a_pool_gives_all_that_it_has_when_there_are_fewer_than_asked_for():
    assert set(pool(*FIVE[:2]).guides("p", 0, 3)) == set(FIVE[:2])
    assert pool(*FIVE).guide("p", 7) == pool(*FIVE).guides("p", 7, 1)[0]


def test_a_pool_read_from_a_file_draws_the_same(tmp_path):
    made = pool(*FIVE, of("q", 1), of("q", 3))
    made.save(tmp_path / "pool.parquet")
    again = ReplayPool.load(tmp_path / "pool.parquet", "digest")
    assert isinstance(again, ReplayPool) and len(again) == 2
    for uid in ("p", "q"):
        ids = [[guide.token_ids for guide in source.guides(uid, 3, 2)] for source in (made, again)]
        assert ids[0] == ids[1] and len(ids[0]) == 2


def test_a_pool_has_many_guides_and_a_window_on_one_has_not():
    assert isinstance(pool(), ManyGuides) and not isinstance(pool(), ReplaySource)
    assert not isinstance(GuidanceWindow(pool(), 0, 1), ManyGuides)


# ExGRPO's memory

N = 8


def memory(prompts: int = 8, **settings) -> OwnPast:
    return OwnPast({f"p{i}": {"uid": f"p{i}"} for i in range(prompts)}, N, **{"seed": 0, **settings})


def group(
    uid: str, solved: int, number: int = 0, *, guided: bool = False, lost: bool = False, ended=True
) -> list[dict]:
    """Rollout table of a group: `solved` correct own rollouts; with a guide, which took the place of one (`lost`)."""
    own = N - guided
    rows = [
        {
            "uid": uid,
            "group": number,
            "source": "policy",
            "token_ids": [10 * number + slot, EOS],
            "behaviour_logps": [-0.1 * slot, -0.25],
            "text": f"{uid} {slot}",
            "correct": slot < solved,
            "ended": ended,
            "overwritten_correct": None,
        }
        for slot in range(own)
    ]
    if guided:
        guide = {"source": "guide", "token_ids": [99, EOS], "correct": True, "overwritten_correct": lost}
        rows.append({**rows[0], **guide, "ended": True})
    return rows


def flat(rows, completions) -> list[float]:
    """Entropies of an indifferent policy."""
    return [1.0] * len(completions)


def filled(buckets: dict[int, int], **settings) -> OwnPast:
    """A memory that has begun, with some prompts in each bucket: "b3-0" is the first with 3 correct rollouts of 8."""
    uids = [f"b{solved}-{number}" for solved, count in buckets.items() for number in range(count)]
    made = OwnPast({uid: {"uid": uid} for uid in uids}, N, **{"seed": 0, "start": 0.0, **settings})
    made.observe(1, [row for i, uid in enumerate(uids) for row in group(uid, int(uid[1]), i)])
    assert made.begun and len(made) == len(uids)
    return made


WEIGHTS = [0.0044330, 0.0540055, 0.2420362, 0.3990503, 0.2420362, 0.0540055, 0.0044330]
"""N(k; 4, 1) over k = 1 … 7: e^-4.5, e^-2, e^-0.5, 1, e^-0.5, e^-2, e^-4.5 over their sum 2.5059495."""


def test_the_weight_of_a_bucket_is_the_normal_density_around_half_of_the_group():
    assert bucket_weights(np.arange(1, 8), 8) == pytest.approx(WEIGHTS, abs=1e-6)
    assert sum(WEIGHTS) == pytest.approx(1, abs=1e-6)
    # buckets that hold no prompt leave their weight to the others: 1 / (1 + e^-4.5)
    assert bucket_weights(np.array([4, 7]), 8) == pytest.approx([0.9890131, 0.0109869], abs=1e-6)
    assert bucket_weights(np.array([1]), 4).tolist() == [1.0]


def test_draws_follow_the_weights_of_the_buckets_and_are_even_within_one():
    """First a bucket, then a prompt: how many prompts a bucket holds does not matter."""
    made = filled({1: 3, 2: 5, 3: 9, 4: 2, 5: 1, 6: 7, 7: 4})
    steps = 4000
    drawn = Counter(row["uid"] for step in range(steps) for row in made.replay(["x", "y"], step, flat).values())
    assert drawn.total() == steps
    found = [sum(count for uid, count in drawn.items() if uid[1] == str(k)) for k in range(1, 8)]
    expected = np.array(WEIGHTS) / sum(WEIGHTS) * steps
    assert scipy.stats.chisquare(found, expected).pvalue > 0.01
    inside = [drawn[f"b3-{number}"] for number in range(9)]
    assert scipy.stats.chisquare(inside).pvalue > 0.01


def test_draws_depend_on_seed_and_step_alone():
    def drawn(seed, step):
        return filled({3: 9, 4: 9}, seed=seed).replay(list("uvwxyz"), step, flat)

    made = filled({3: 9, 4: 9})
    for step in (5, 2, 9):  # whatever was drawn before
        assert made.replay(list("uvwxyz"), step, flat) == drawn(0, step)
    assert drawn(0, 5) != drawn(0, 2) and drawn(0, 5) != drawn(1, 5)


@pytest.mark.parametrize(
    ("prompts", "share", "places"), [(8, 0.5, [4, 5, 6, 7]), (5, 0.5, [3, 4]), (8, 0.25, [6, 7]), (4, 0.0, [])]
)
def test_a_share_of_the_prompts_is_replaced_the_last_ones(prompts, share, places):
    chosen = filled({4: 9}, share=share).replay([f"x{i}" for i in range(prompts)], 1, flat)
    assert sorted(chosen) == places
    assert len({row["uid"] for row in chosen.values()}) == len(places)


@pytest.mark.parametrize("prompts", [2, 4, 5, 6, 8, 9])
def test_no_prompt_comes_twice_in_a_step(prompts):
    """Whether the memory holds enough prompts for half of a step, or few, or those that the step holds anyway."""
    made = filled({2: 2, 4: 2, 6: 1})
    for step in range(20):
        uids = [f"b2-{i}" for i in range(2)] + [f"b4-{i}" for i in range(2)] + ["b6-0", "x", "y", "z", "w"]
        uids = [uids[place] for place in np.random.default_rng(step).permutation(len(uids))][:prompts]
        chosen = made.replay(uids, step, flat)
        after = [chosen[place]["uid"] if place in chosen else uid for place, uid in enumerate(uids)]
        assert len(set(after)) == len(after), (uids, after)
        # and a prompt has a guide when, and only when, it was replayed
        guided = {uid for uid in (*uids, *after) if made.guide(uid, step) is not None}
        assert guided == {row["uid"] for row in chosen.values()}


def test_a_memory_with_too_few_prompts_replays_those():
    chosen = filled({4: 2}).replay(list("stuvwxyz"), 1, flat)
    assert sorted(chosen) == [6, 7] and {row["uid"] for row in chosen.values()} == {"b4-0", "b4-1"}


def test_replay_starts_after_a_step_whose_pass_rate_exceeds_the_start():
    made = memory()
    made.observe(1, [*group("p0", 2, 0), *group("p1", 3, 1)])  # 5 of 16 is 31 %
    assert not made.begun and made.replay(["p4", "p5"], 2, flat) == {}
    assert made.guide("p0", 2) is None and len(made) == 2
    made.observe(2, [*group("p2", 3, 0), *group("p3", 3, 1)])  # 6 of 16 is 37.5 %
    assert made.begun and len(made.replay(["p4", "p5"], 3, flat)) == 1
    made.observe(3, group("p4", 0))
    assert made.begun, "it does not stop again"


def test_a_pass_rate_of_exactly_the_start_does_not_start():
    made = memory(start=0.5)
    made.observe(1, [*group("p0", 4, 0), *group("p1", 4, 1)])
    assert not made.begun


def test_buckets_are_the_number_of_correct_rollouts_of_the_newest_group():
    made = memory()
    made.observe(1, [*group("p0", 1, 0), *group("p1", 7, 1), *group("p2", 0, 2), *group("p3", 8, 3)])
    assert made._solved == {"p0": 1, "p1": 7}
    assert [len(made._kept[uid]) for uid in ("p0", "p1")] == [1, 7]
    made.observe(2, [*group("p0", 5, 0), *group("p1", 0, 1)])
    assert made._solved == {"p0": 5, "p1": 7}, "an all-wrong group leaves its prompt as it was"
    assert len(made._kept["p1"]) == 7
    made.observe(3, group("p0", 8))
    assert "p0" not in made._solved and "p0" not in made._kept, "a solved prompt retires"


def test_the_newest_correct_rollouts_are_kept():
    made = memory(keep=3)
    made.observe(1, group("p0", 2, 0))
    made.observe(2, group("p0", 2, 1))
    assert [trajectory.token_ids for trajectory in made._kept["p0"]] == [(1, EOS), (10, EOS), (11, EOS)]
    assert [trajectory.source_step for trajectory in made._kept["p0"]] == [1, 2, 2]
    assert made._kept["p0"][0].logps == (-0.1, -0.25), "as they were sampled"


def test_guides_count_for_nothing_and_the_rollouts_that_they_replaced_do():
    made = memory()
    made.observe(1, [*group("p0", 3, 0, guided=True, lost=True), *group("p1", 3, 1, guided=True, lost=False)])
    assert made._solved == {"p0": 4, "p1": 3}, "of 8 rollouts of the policy"
    assert not any(99 in trajectory.token_ids for kept in made._kept.values() for trajectory in kept)
    assert [len(kept) for kept in made._kept.values()] == [3, 3]
    made.observe(2, group("p1", 7, guided=True, lost=True))
    assert "p1" not in made._solved, "7 fresh ones and the replaced one are all correct"


def test_a_solved_group_with_a_wrong_replaced_rollout_does_not_retire():
    made = memory()
    made.observe(1, group("p0", 7, guided=True, lost=False))
    assert made._solved == {"p0": 7}


def test_rollouts_without_an_end_are_not_kept():
    made = memory()
    made.observe(1, group("p0", 3, ended=False))
    assert len(made) == 0 and made._kept == {}
    made.observe(2, group("p0", 2))
    made.observe(3, group("p0", 3, 1, ended=False))
    assert [trajectory.token_ids for trajectory in made._kept["p0"]] == [(0, EOS), (1, EOS)]


def test_the_kept_rollout_with_the_lowest_entropy_guides():
    made = memory(start=0.0)
    made.observe(1, [*group("p0", 3, 0), *group("p1", 2, 1)])
    table = {(0, EOS): 0.9, (1, EOS): 0.2, (2, EOS): 0.5, (10, EOS): 0.1, (11, EOS): 0.7}
    asked = []

    def entropies(rows, completions):
        asked.extend(zip((row["uid"] for row in rows), completions, strict=True))
        return [table[completion] for completion in completions]

    made.replay(list("wxyz"), 1, entropies)
    assert sorted(asked) == [("p0", (0, EOS)), ("p0", (1, EOS)), ("p0", (2, EOS)), ("p1", (10, EOS)), ("p1", (11, EOS))]
    assert made.guide("p0", 1).token_ids == (1, EOS) and made.guide("p1", 1).token_ids == (10, EOS)
    table[1, EOS] = 0.6  # the policy has changed since
    made.replay(list("wxyz"), 2, entropies)
    assert made.guide("p0", 2).token_ids == (2, EOS)
    made.replay(["p0", "p1", "y", "z"], 3, entropies)
    assert made.guide("p0", 3) is None, "a prompt that comes by itself is not replayed"


def state(made: OwnPast):
    return made.begun, made._solved, made._kept


def test_a_memory_comes_back_from_its_file_to_the_bit(tmp_path):
    made = memory(start=0.0)
    logps = [float(value) for value in np.random.default_rng(0).normal(size=2).astype(np.float32)]
    rows = [*group("p0", 3, 0), *group("p1", 2, 1)]
    rows[0]["behaviour_logps"] = logps
    made.observe(4, rows)
    made.save(tmp_path)
    again = memory()
    again.restore(tmp_path)
    assert state(again) == state(made) and again._kept["p0"][0].logps == tuple(logps)
    assert again.replay(list("wxyz"), 7, flat) == made.replay(list("wxyz"), 7, flat)


@pytest.mark.parametrize("begun", [False, True])
def test_an_empty_memory_is_a_state_too(tmp_path, begun):
    made = memory(start=0.5)
    made.observe(1, group("p0", 8 if begun else 0))
    assert made.begun is begun and len(made) == 0
    made.save(tmp_path)
    again = filled({4: 1})
    again._chosen = {"b4-0": of("b4-0")}
    again.restore(tmp_path)
    assert state(again) == (begun, {}, {}) and again.guide("b4-0", 1) is None
    assert again.replay(["x", "y"], 2, flat) == {}


def test_a_checkpoint_without_a_memory_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{MEMORY_FILE} does not exist; a checkpoint of ExGRPO holds its"):
        memory().restore(tmp_path)


def test_a_memory_is_a_replaying_source():
    assert isinstance(memory(), ReplaySource) and not isinstance(memory(), ManyGuides)
