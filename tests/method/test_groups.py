"""Groups: pass rate, gate, guide rows and advantages against hand numbers and against TRL."""

import math

import pytest
import torch

from npo_core.method.groups import empty_places, gate, group_advantages, pass_rate, place_guides

# Under the runtime shape checks, jaxtyping refuses a wrong shape or type before the function's own check does.
REFUSED = (ValueError, TypeError)


def _group(correct: int, n: int) -> torch.Tensor:
    return torch.arange(n) < correct


def test_pass_rate_counts_every_rollout_the_last_one_too():
    correct = torch.tensor([[True, True, False, False], [False, False, False, True], [False] * 4, [True] * 4])
    assert pass_rate(correct).tolist() == [0.5, 0.25, 0.0, 1.0]


@pytest.mark.parametrize("correct", [torch.ones(4, dtype=torch.bool), torch.ones(2, 4), torch.ones(2, 0) > 0])
def test_pass_rate_refuses_what_is_not_a_table_of_verdicts(correct):
    with pytest.raises(REFUSED):
        pass_rate(correct)


@pytest.mark.parametrize("n", [3, 5, 7, 8, 10, 16, 48])
def test_gate_agrees_with_exact_fractions_at_every_threshold(n):
    correct = torch.stack([_group(k, n) for k in range(n + 1)])
    everything = torch.ones(n + 1, dtype=torch.bool)
    for numerator in range(n + 1):
        gated = gate(pass_rate(correct), everything, tau=numerator / n)
        assert gated.tolist() == [k <= numerator for k in range(n + 1)]


def test_gate_is_inclusive_at_three_of_five_and_needs_a_guide():
    rate = pass_rate(torch.stack([_group(3, 5), _group(3, 5), _group(4, 5), _group(0, 5)]))
    has_guide = torch.tensor([True, False, True, True])
    assert float(rate[0]) > 0.6  # the rounding that a plain comparison would fall for
    assert gate(rate, has_guide).tolist() == [True, False, False, True]


@pytest.mark.parametrize("tau", [-0.1, 1.1, math.nan])
def test_gate_refuses_a_threshold_that_is_no_pass_rate(tau):
    with pytest.raises(ValueError, match="tau"):
        gate(torch.zeros(1), torch.ones(1, dtype=torch.bool), tau=tau)


@pytest.mark.parametrize("rate", [1.5, -0.5, math.nan])
def test_gate_refuses_values_that_are_no_pass_rate(rate):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        gate(torch.tensor([rate]), torch.ones(1, dtype=torch.bool))


def test_gate_refuses_to_broadcast():
    with pytest.raises(REFUSED):
        gate(torch.zeros(3), torch.ones(1, dtype=torch.bool))


# One line a case: gated groups, guides offered to each, n, count -> {row: guide}
PLACED = [
    ([1, 0, 1, 1], [1, 1, 1, 1], 8, 1, {7: 0, 23: 0, 31: 0}),  # the last slot of each gated group
    ([1, 0, 1], [2, 2, 2], 10, 2, {8: 0, 9: 1, 28: 0, 29: 1}),  # two: the last two, in the order of the offer
    ([1, 0, 1], [3, 3, 3], 4, 3, {1: 0, 2: 1, 3: 2, 9: 0, 10: 1, 11: 2}),
    ([1, 1, 1], [1, 0, 2], 5, 2, {3: 0, 13: 0, 14: 1}),  # fewer guides than slots: the very last stays a rollout
    ([1], [7], 4, 2, {2: 0, 3: 1}),  # more than fit: the first ones
    ([0, 0], [1, 1], 4, 1, {}),
    ([1, 1], [0, 0], 4, 1, {}),
    ([], [], 4, 1, {}),
    ([1], [1], 2, 1, {1: 0}),  # the smallest group
]


@pytest.mark.parametrize(("gated", "offered", "n", "count", "placed"), PLACED)
def test_guides_take_the_last_slots_of_gated_groups(gated, offered, n, count, placed):
    found = place_guides(torch.tensor(gated, dtype=torch.bool), torch.tensor(offered, dtype=torch.int64), n, count)
    assert found.shape == (len(placed), 2)
    assert dict(found.tolist()) == placed
    assert found[:, 0].tolist() == sorted(placed)


@pytest.mark.parametrize(
    ("guided", "groups", "n", "count", "empty"),
    [
        ([], 2, 4, 0, []),  # guides replace rollouts: no row is kept
        ([3], 2, 4, 0, []),
        ([], 2, 4, 1, [3, 7]),  # appended, none taken: as without a source
        ([7], 2, 4, 1, [3]),
        ([8, 9], 2, 10, 2, [18, 19]),
        ([8], 2, 10, 2, [9, 18, 19]),  # a second guide was refused, or there is one only
        ([2], 1, 3, 1, []),
        ([], 0, 4, 1, []),
    ],
)
def test_places_for_appended_guides_that_none_takes_are_empty(guided, groups, n, count, empty):
    assert empty_places(torch.tensor(guided, dtype=torch.int64), groups, n, count).tolist() == empty


@pytest.mark.parametrize(("n", "count"), [(1, 1), (4, 0), (4, 4), (4, 5)])
def test_guides_that_leave_no_rollout_or_are_none_are_refused(n, count):
    with pytest.raises(ValueError, match=f"n is {n} and count {count}"):
        place_guides(torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.int64), n, count)


@pytest.mark.parametrize(
    ("gated", "offered"), [(torch.ones(2), torch.ones(2).long()), (torch.ones(2) > 0, torch.ones(3).long())]
)
def test_groups_that_do_not_match_are_refused(gated, offered):
    with pytest.raises(REFUSED):
        place_guides(gated, offered, 4)


def test_two_guides_appended_to_an_all_wrong_group_of_eight():
    # RLEP: mean 2/10, unbiased variance (8·0.04 + 2·0.64)/9 = 1.6/9: 0.8/0.421637 and -0.2/0.421637.
    advantages = group_advantages(torch.tensor([[0.0] * 8 + [1.0] * 2]), eps=0.0)
    assert advantages[0].tolist() == pytest.approx([-0.4743416] * 8 + [1.8973666] * 2, abs=1e-5)


def test_luffys_advantages_in_an_all_wrong_group_of_eight():
    advantages = group_advantages(torch.tensor([[0.0] * 7 + [1.0]]), scale="none")
    assert advantages[0].tolist() == [-1 / 8] * 7 + [7 / 8]


def test_one_guide_in_an_all_wrong_group_of_eight():
    # mean 1/8, unbiased variance (1/8)(7/8)(8/7) = 1/8: (7/8)/sqrt(1/8) = 2.4749 and (-1/8)/sqrt(1/8) = -0.3536.
    rewards = torch.tensor([[0.0] * 7 + [1.0]])
    advantages = group_advantages(rewards, eps=0.0)
    assert advantages[0, -1].item() == pytest.approx(2.4748737, abs=1e-5)
    assert advantages[0, :-1].tolist() == pytest.approx([-0.3535534] * 7, abs=1e-5)


def test_advantages_by_hand_with_the_default_epsilon():
    # mean 2, squared deviations 1 + 1 + 0 + 4 = 6, unbiased variance 2.
    advantages = group_advantages(torch.tensor([[1.0, 3.0, 2.0, 2.0], [0.0, 4.0, 2.0, 2.0]]))
    first, second = math.sqrt(2 / 3) + 1e-4, math.sqrt(8 / 3) + 1e-4
    expected = [[-1 / first, 1 / first, 0.0, 0.0], [-2 / second, 2 / second, 0.0, 0.0]]
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_without_scaling_advantages_are_centred_rewards():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    expected = torch.tensor([[-0.25, -0.25, -0.25, 0.75], [0.5, 0.5, -0.5, -0.5]])
    assert torch.equal(group_advantages(rewards, scale="none"), expected)


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_equal_rewards_give_no_advantage(eps):
    assert group_advantages(torch.tensor([[1.0] * 4, [0.0] * 4]), eps=eps).abs().max() == 0.0


@pytest.mark.parametrize("unscorable", [False, True])
def test_equal_to_trl_bit_for_bit(unscorable):
    """The lines of GRPOTrainer._generate_and_score_completions, with TRL's own nanstd."""
    from trl.trainer.utils import nanstd

    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(64 * 8, generator=generator)
    flat[: 32 * 8] = (flat[: 32 * 8] > 0).float()
    if unscorable:
        flat[torch.rand(64 * 8, generator=generator) < 0.4] = torch.nan
        flat[-8:] = torch.nan
        flat[-1] = 1.0
    mean = torch.nanmean(flat.view(-1, 8), dim=1).repeat_interleave(8, dim=0)
    std = nanstd(flat.view(-1, 8), dim=1).repeat_interleave(8, dim=0)
    centred = flat - mean
    rewards = flat.view(-1, 8)
    assert torch.equal(group_advantages(rewards), torch.nan_to_num(centred / (std + 1e-4), nan=0.0).view(-1, 8))
    assert torch.equal(group_advantages(rewards, scale="none"), torch.nan_to_num(centred, nan=0.0).view(-1, 8))


def test_an_unscorable_rollout_does_not_shift_the_others():
    with_gap = group_advantages(torch.tensor([[0.0, 1.0, math.nan, 1.0]]))
    without = group_advantages(torch.tensor([[0.0, 1.0, 1.0]]))
    assert with_gap[0, 2] == 0.0
    torch.testing.assert_close(with_gap[0, [0, 1, 3]], without[0])


@pytest.mark.parametrize(
    ("rewards", "options"),
    [
        (torch.zeros(2, 1), {}),
        (torch.zeros(8), {}),
        (torch.tensor([[0.0, math.inf]]), {}),
        (torch.zeros(2, 4), {"scale": "batch"}),
        (torch.zeros(2, 4), {"eps": -1e-4}),
    ],
)
def test_advantages_refuse_bad_input(rewards, options):
    with pytest.raises(REFUSED):
        group_advantages(rewards, **options)
