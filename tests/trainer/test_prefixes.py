"""Prefix guidance through TRL's real training step: what is given, what goes on from it, and what is trained on."""

import pytest
import torch
from worlds import Guides, SpyTrainer, correct_in, responses, rig, token_log_probs, trainer_of, world

from npo_core.guidance.fingerprints import tokenizer_of
from npo_core.guidance.replay import OwnPast
from npo_core.guidance.trajectories import Trajectory
from npo_core.trainer import prefixes
from npo_core.trainer.config import NPOConfig
from npo_core.trainer.prefixes import beginning, continued


@pytest.mark.parametrize(
    ("tokens", "share", "given"),
    [
        ((1, 2, 3, 4, 9), 0.5, [1, 2]),
        ((1, 2, 3, 9), 0.5, [1]),  # a half of three, rounded down
        ((1, 2, 3, 9), 0.1, [1]),  # at least one
        ((1, 2, 3, 4, 9), 0.99, [1, 2, 3]),
        ((1, 9), 0.5, [1]),  # never the end of sequence
    ],
)
def test_the_beginning_of_a_guide(tokens, share, given):
    assert beginning(Trajectory("a", tokens, (0.0,) * len(tokens), 3, True, ""), share) == given


@pytest.mark.parametrize("name", ["text", "words", "pictures"])
def test_going_on_from_the_beginning_of_an_own_greedy_response_ends_as_it_did(tmp_path, name):
    """Prompts and prefixes of different lengths stand beside each other: neither may change what follows."""
    tiny = world(name)
    trainer = trainer_of(tiny, tmp_path, n=4, guidance=None)
    trainer.generation_config.do_sample = False
    with torch.no_grad():  # larger weights: a fresh policy says the same whatever it reads
        for weight in trainer.model.parameters():
            weight.mul_(10 if weight.dim() > 1 else 1)
    rows = list(tiny.dataset)[:6]
    whole = continued(trainer, rows, [[] for _ in rows])
    assert len({tuple(ids) for ids in whole}) > 1, "prompts are told apart"
    cuts = [1 + place % (len(ids) - 1) for place, ids in enumerate(whole)]
    assert continued(trainer, rows, [ids[:cut] for ids, cut in zip(whole, cuts, strict=True)]) == whole


def test_a_response_is_cut_at_the_longest_length_its_prefix_included(tmp_path):
    tiny = world("text")
    trainer = trainer_of(tiny, tmp_path, guidance=None, max_completion_length=5)
    never_ends = [tiny.solution(uid)[:3] for uid in tiny.dataset["uid"][:2]]
    trainer.eos_token_ids = []
    trainer.generation_config.eos_token_id = None
    assert [len(ids) for ids in continued(trainer, list(tiny.dataset)[:2], never_ends)] == [5, 5]


def guided(tiny, tmp_path, monkeypatch, ends, **arguments):
    """A step whose rollouts are all wrong; each prefix is gone on from as `ends(uid)` says. First uid has no guide."""
    rig(monkeypatch, correct_in(tiny, {}))
    uids = tiny.dataset["uid"][:4]
    asked = []

    def scripted(trainer, rows, begun):
        asked.extend(zip([row["uid"] for row in rows], begun, strict=True))
        return [[*prefix, *ends(row["uid"])[len(prefix) :]] for row, prefix in zip(rows, begun, strict=True)]

    monkeypatch.setattr(prefixes, "continued", scripted)
    source = Guides({uid: tiny.guide(uid) for uid in uids[1:]})
    trainer = trainer_of(tiny, tmp_path, SpyTrainer, guidance=source, guide_prefix=0.5, **arguments)
    trainer.train()
    return trainer, uids, asked


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_what_was_given_is_masked_and_what_follows_is_judged_and_trained_on(tmp_path, monkeypatch, loss_type):
    tiny = world("text")
    solved = tiny.dataset["uid"][1]
    trainer, uids, asked = guided(
        tiny,
        tmp_path,
        monkeypatch,
        lambda uid: tiny.solution(uid) if uid == solved else tiny.mistake(uid),
        loss_type=loss_type,
    )
    (batch,) = trainer.generated
    rows = {uid: 4 * place + 3 for place, uid in enumerate(uids)}
    assert asked == [(uid, beginning(tiny.guide(uid), 0.5)) for uid in uids[1:]]
    mask = batch["tool_mask"]
    for uid in uids[1:]:
        given = len(beginning(tiny.guide(uid), 0.5))
        assert mask[rows[uid]].tolist() == [0] * given + [1] * (mask.shape[1] - given)
    assert mask[[row for row in range(16) if row not in [rows[uid] for uid in uids[1:]]]].all()
    # one of three went on to the right answer: its group learns, the others have nothing to compare
    advantages = batch["advantages"].view(4, 4)
    assert advantages[1].tolist() == pytest.approx([-0.5] * 3 + [1.5], abs=1e-3)
    assert advantages[[0, 2, 3]].abs().max() == 0
    assert not batch["is_guide"].any()
    assert (~batch["is_own"]).nonzero().flatten().tolist() == [rows[uid] for uid in uids[1:]]
    line = trainer.state.log_history[0]
    assert (line["npo/replaced_slots"], line["npo/prefix_solved"]) == (3, pytest.approx(1 / 3))
    assert line["npo/pass_rate"] == 0, "on-policy, over the rollouts that were overwritten"
    # the loss by hand: token means over what is left of each row, ratio 1
    ((weights, inputs),) = trainer.loss_calls
    model = tiny.build()
    model.load_state_dict(weights)
    logps = token_log_probs(model, inputs)
    kept = (inputs["completion_mask"] * inputs["tool_mask"]).double()
    weighted = -(logps * inputs["advantages"].unsqueeze(1)).double() * kept
    by_hand = (weighted.sum(1) / kept.sum(1)).mean() if loss_type == "grpo" else weighted.sum() / kept.sum()
    by_hand.backward()
    trainer.model.load_state_dict(weights)
    trainer.model.zero_grad()
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs).backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    found = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_a_real_step_goes_on_from_what_the_guides_began(tmp_path):
    tiny = world("text")
    source = Guides({uid: tiny.guide(uid) for uid in tiny.dataset["uid"]})
    trainer = trainer_of(tiny, tmp_path, SpyTrainer, guidance=source, guide_prefix=0.5)
    trainer.train()
    (batch,) = trainer.generated
    texts = responses(batch)
    replaced = (~batch["is_own"]).nonzero().flatten().tolist()
    assert replaced == [3, 7, 11, 15]
    for row in replaced:
        given = beginning(tiny.guide(batch["uids"][row]), 0.5)
        assert texts[row][: len(given)] == given
        assert len(texts[row]) > len(given), "at least one token is the policy's own"
        assert len(texts[row]) <= trainer.args.max_completion_length
        ends = [place for place, token in enumerate(texts[row]) if token == tokenizer_of(tiny.processor).eos_token_id]
        assert ends in ([], [len(texts[row]) - 1])


@pytest.mark.parametrize(
    "wrong", [{"guide_prefix": 0.0}, {"guide_prefix": 1.5}, {"guide_prefix": 0.5, "ratio_mode": "exact"}], ids=str
)
def test_prefixes_that_make_no_sense_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="guide_prefix"):
        NPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **wrong)


def test_a_replaying_source_gives_whole_guides(tmp_path):
    with pytest.raises(ValueError, match=r"guide_prefix is 0\.5; beginnings of guides come from a cache"):
        trainer_of(world("text"), tmp_path, guidance=OwnPast({}, 4, seed=0), guide_prefix=0.5)


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_policy_in_parts_gives_whole_guides(tmp_path, sharded):
    """A process without a guide in its groups would not sample, and the others would wait for its part."""
    trainer = trainer_of(world("text"), tmp_path, guide_prefix=0.5)
    trainer.guidance = Guides()
    setattr(trainer, sharded, True)
    with pytest.raises(ValueError, match=r"guide_prefix is 0\.5; .* whole in every process"):
        trainer.guidance = Guides()


def test_a_guide_that_ends_at_once_gives_nothing_and_its_row_is_the_policys(tmp_path):
    tiny, told = world("text"), []
    eos = tiny.guide(tiny.dataset["uid"][0]).token_ids[-1]
    guides = {uid: tiny.guide(uid, token_ids=(eos,)) for uid in tiny.dataset["uid"]}
    trainer = trainer_of(
        tiny, tmp_path, guidance=Guides(guides), guide_prefix=0.5, tau_gate=1.0, verifier=lambda text, row: True
    )
    trainer.guided_sink = lambda step, rows, refused: told.extend(rows)
    trainer.train()
    begun = [row for row in told if row["slot"] == 3]
    assert len(begun) == 4 and all((row["source"], row["prefix"]) == ("prefix", 0) for row in begun)
    assert all(len(row["behaviour_logps"]) == len(row["token_ids"]) for row in begun)
