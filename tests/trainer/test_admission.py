"""What a trainer takes as guidance: sources that cannot be right are refused at once, a single wrong guide is not."""

import logging
import math
from dataclasses import replace

import pytest
from worlds import VERIFIER, WIDTH, Guides, TinyWorld, correct_in, responses, rig, trainer_of, world

from npo_core.guidance.fingerprints import image_digest, tokenizer_digest, tokenizer_of
from npo_core.guidance.replay import OwnPast
from npo_core.guidance.sources import GuidanceWindow
from npo_core.guidance.trajectories import GuidanceCache, GuidanceRefused
from npo_core.guidance.verdicts import Verdict
from npo_core.trainer.admission import ALL_REFUSED, RefusedGuides
from npo_core.trainer.sampling import sample_rollouts
from npo_core.trainer.trainer import NPOTrainer
from npo_core.world.policies import build_tokenizer
from npo_core.world.tasks import vocabulary

THINKS = "{% if think is defined %}0 0 0 {% endif %}"
NEEDS_Q = [{"ratio_mode": mode} for mode in ("exact", "truncated", "shaped")]
DOES_NOT = [{"ratio_mode": "current"}, {"ratio_mode": "shaped", "guide_behaviour": "one"}]


def _cache(tiny: TinyWorld, digest: str = "", longest: int = WIDTH, **changes) -> GuidanceCache:
    cache = GuidanceCache([tokenizer_of(tiny.processor).eos_token_id], longest, digest)
    for uid in tiny.dataset["uid"]:
        cache.add(tiny.guide(uid, **changes))
    return cache


# Sources


def test_a_cache_of_other_picture_settings_is_refused_as_when_it_is_loaded(tmp_path):
    """Read without its fingerprint being compared, it would guide with answers to other pictures."""
    tiny = world("pictures")
    cache = _cache(tiny)
    for digest, fits in ((image_digest(tiny.processor), True), ("", True), ("0123456789abcdef", False)):
        cache.image_digest = digest
        if fits:
            trainer_of(tiny, tmp_path, NPOTrainer, guidance=cache)
        else:
            with pytest.raises(ValueError, match=rf"other picture settings \({digest}\) than this policy's"):
                trainer_of(tiny, tmp_path, NPOTrainer, guidance=cache)


def test_a_cache_of_another_tokenizer_is_refused_wherever_it_is(tmp_path):
    """Token ids of a vocabulary in another order would be injected as other words."""
    tiny = world("text")
    other = tokenizer_digest(build_tokenizer(vocabulary()[::-1]))
    window = GuidanceWindow(_cache(tiny, other), 0, 9)
    for source in (_cache(tiny, other), window, GuidanceWindow(window, 0, 5)):
        with pytest.raises(ValueError, match=rf"another tokenizer \({other}\) than this policy's"):
            trainer_of(tiny, tmp_path, NPOTrainer, guidance=source)
    for digest in ("", tokenizer_digest(tiny.processor)):
        trainer_of(tiny, tmp_path, NPOTrainer, guidance=_cache(tiny, digest))


def test_a_cache_with_a_guide_that_is_too_long_is_refused_at_once(tmp_path):
    tiny = world("text")
    longest = max(len(guide.token_ids) for guide in _cache(tiny))
    with pytest.raises(ValueError, match=f"a guide of {longest} tokens, and max_completion_length is {longest - 1}"):
        trainer_of(tiny, tmp_path, NPOTrainer, guidance=_cache(tiny), max_completion_length=longest - 1)


@pytest.mark.parametrize("end", ["none", "in the middle"])
def test_a_cache_whose_guides_end_otherwise_is_refused_at_once(tmp_path, end):
    tiny = world("text")
    cache = _cache(tiny)
    uid, eos = tiny.dataset["uid"][0], tokenizer_of(tiny.processor).eos_token_id
    right = cache.guide(uid, 0)
    tokens = (*right.token_ids[:-1], right.token_ids[0]) if end == "none" else (eos, *right.token_ids[1:])
    assert right.token_ids[0] != eos and len(right.token_ids) > 1
    cache._guides[uid] = replace(right, token_ids=tokens)
    with pytest.raises(ValueError, match=rf"holds 1 guides, such as that of '{uid}', that do not end with one of"):
        trainer_of(tiny, tmp_path, NPOTrainer, guidance=cache)


def test_a_replaying_source_chooses_once_in_a_step(tmp_path):
    layout = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    for batches, fits in ((2, False), (4, True), (8, True)):
        past = OwnPast({}, 4, seed=0)
        settings = {"steps_per_generation": batches, **layout}
        if fits:
            trainer_of(world("text"), tmp_path, NPOTrainer, guidance=past, **settings)
        else:
            with pytest.raises(
                ValueError, match="steps_per_generation is 2 with gradient_accumulation_steps 4: OwnPast"
            ):
                trainer_of(world("text"), tmp_path, NPOTrainer, guidance=past, **settings)


def test_a_length_that_is_left_open_is_refused_where_guides_must_fit(tmp_path):
    """TRL takes None, and then samples to the end of the context."""
    tiny = world("text")
    for source in (_cache(tiny), Guides()):
        with pytest.raises(ValueError, match="max_completion_length is None; a guide may be as long as a rollout"):
            trainer_of(tiny, tmp_path, NPOTrainer, guidance=source, max_completion_length=None)
    trainer = trainer_of(tiny, tmp_path, NPOTrainer, max_completion_length=None)
    with pytest.raises(ValueError, match="max_completion_length is None"):
        trainer.new_cache()


@pytest.mark.parametrize("settings", NEEDS_Q)
def test_guides_scored_at_another_temperature_are_refused_where_the_ratio_needs_them(tmp_path, settings):
    tiny = world("text")
    with pytest.raises(ValueError, match=r"cache are at temperature 1.0, and training is at 0.6, .* biased"):
        trainer_of(tiny, tmp_path, NPOTrainer, guidance=_cache(tiny), temperature=0.6, **settings)
    trainer_of(tiny, tmp_path, NPOTrainer, guidance=_cache(tiny, temperature=0.6), temperature=0.6, **settings)
    # a source of one's own is seen through guide by guide
    uid = tiny.dataset[0]["uid"]
    source = Guides({uid: tiny.guide(uid)})
    trainer = trainer_of(tiny, tmp_path, NPOTrainer, guidance=source, temperature=0.6, prompts=1, **settings)
    with pytest.raises(GuidanceRefused, match=f"{uid}' are at temperature 1.0, and training is at 0.6"):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.4], ids=["nan", "infinite", "probability"])
@pytest.mark.parametrize("settings", NEEDS_Q, ids=str)
def test_log_probs_that_are_none_are_refused_where_the_ratio_needs_them(tmp_path, settings, value):
    """A NaN in the denominator would be in every weight after one step."""
    tiny = world("text")
    uid = tiny.dataset[0]["uid"]
    length = len(tiny.solution(uid))
    bad = tiny.guide(uid, logps=(-1.0,) * (length - 1) + (value,))
    cache = _cache(tiny)
    cache.add(bad)
    with pytest.raises(ValueError, match=f"holds 1 guides whose log-probs are none, such as that of '{uid}'"):
        trainer_of(tiny, tmp_path, NPOTrainer, guidance=cache, **settings)
    trainer = trainer_of(tiny, tmp_path, NPOTrainer, guidance=Guides({uid: bad}), prompts=1, **settings)
    with pytest.raises(GuidanceRefused, match=f"guide of '{uid}' run from .* finite and at most 0"):
        trainer.train()
    trainer_of(tiny, tmp_path, NPOTrainer, guidance=cache, ratio_mode="current")


def test_an_exact_ratio_beyond_any_float_leaves_the_weights_finite(tmp_path):
    """e^100 is infinite in float32, and so is its gradient where the clip takes the other branch: infinity times 0."""
    tiny = world("text")
    uid = tiny.dataset[0]["uid"]
    far = tiny.guide(uid, logps=(-100.0, *tiny.guide(uid).logps[1:]))
    trainer = trainer_of(tiny, tmp_path, guidance=Guides({uid: far}), prompts=1, ratio_mode="exact")
    trainer.train()
    assert trainer.state.log_history[0]["npo/replaced_slots"] == 1
    assert math.isfinite(trainer.state.log_history[0]["grad_norm"])
    assert all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())


@pytest.mark.parametrize("settings", DOES_NOT)
def test_where_the_ratio_does_not_need_them_they_guide_with_a_warning(tmp_path, caplog, settings):
    tiny = world("text")
    trainer = trainer_of(tiny, tmp_path, guidance=_cache(tiny), temperature=0.6, prompts=1, **settings)
    assert "npo/guide_kl" in caplog.text and "0.6" in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["npo/replaced_slots"] == 1


def test_a_cache_for_other_prompts_is_told(tmp_path, caplog):
    tiny = world("text")
    trainer_of(tiny, tmp_path, NPOTrainer, guidance=_cache(tiny))
    assert caplog.text == ""
    strangers = GuidanceCache([tiny.processor.eos_token_id], WIDTH, "")
    strangers.add(replace(tiny.guide(tiny.dataset[0]["uid"]), uid="stranger"))
    trainer_of(tiny, tmp_path, NPOTrainer, guidance=strangers)
    assert "None of the 1 prompts of the guidance cache is in the training data" in caplog.text
    caplog.clear()
    empty = GuidanceCache([tiny.processor.eos_token_id], WIDTH, "")
    empty.fill([replace(tiny.guide(tiny.dataset[0]["uid"]), correct=False)])
    trainer_of(tiny, tmp_path, NPOTrainer, guidance=empty)
    assert "The guidance cache is empty (of 1 responses 1 were wrong, 0 right but no guides), so" in caplog.text


def test_a_data_set_needs_an_answer_for_our_verifier_only(tmp_path):
    tiny = world("text")
    dataset = tiny.dataset.rename_column("answer", "solution")
    with pytest.raises(ValueError, match=r"not \['answer'\]"):
        trainer_of(tiny, tmp_path, NPOTrainer, guidance=Guides(), dataset=dataset)
    trainer = trainer_of(
        tiny,
        tmp_path,
        dataset=dataset,
        guidance=_cache(tiny),
        reward=lambda completions, **_: [0.0] * len(completions),
        verifier=lambda text, row: VERIFIER(text, {"answer": row["solution"]}).correct,  # a bool
    )
    trainer.train()
    assert trainer.state.log_history[0]["npo/replaced_slots"] == 4


def test_a_data_set_whose_columns_are_taken_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns is True, which takes uid"):
        trainer_of(world("text"), tmp_path, NPOTrainer, remove_unused_columns=True)
    trainer_of(world("text"), tmp_path, NPOTrainer, remove_unused_columns=True, verifier=None)


@pytest.mark.parametrize("name", ["text", "pictures"])
def test_a_new_cache_fits_its_trainer(tmp_path, name):
    tiny = world(name)
    trainer = trainer_of(tiny, tmp_path, NPOTrainer)
    trainer.eos_token_ids = [*trainer.eos_token_ids, 7]
    cache = trainer.new_cache()
    uid = tiny.dataset[0]["uid"]
    cache.add(tiny.guide(uid, token_ids=[6, 7]))
    with pytest.raises(GuidanceRefused, match="unknown prompt"):
        cache.add(replace(tiny.guide(uid), uid="stranger"))
    with pytest.raises(GuidanceRefused, match=f"at most {WIDTH}"):
        cache.add(tiny.guide(uid, token_ids=[6] * WIDTH + [7]))
    assert bool(cache.image_digest) == (name == "pictures")
    trainer.guidance = cache
    assert tokenizer_digest(tiny.processor) == cache.tokenizer_digest


# Off-line rollouts of the policy itself: q is π, whatever the settings of training


@pytest.mark.parametrize("mode", ["exact", "truncated", "shaped"])
@pytest.mark.parametrize(
    ("settings", "of_sampling"),
    [
        ({}, {}),
        ({"temperature": 0.6}, {"temperature": 0.6, "score_temperature": 0.6}),
        ({"temperature": 1.3}, {"temperature": 1.0, "score_temperature": 1.3}),
        ({"chat_template_kwargs": {"think": True}}, {"chat_template_kwargs": {"think": True}}),
    ],
    ids=["plain", "cooler", "hotter", "template"],
)
def test_an_own_resample_has_the_ratio_one(tmp_path, monkeypatch, mode, settings, of_sampling):
    tiny = world("text")
    monkeypatch.setattr(tiny.processor, "chat_template", tiny.processor.chat_template + THINKS)
    trainer = trainer_of(
        tiny, tmp_path, tau_gate=1.0, ratio_mode=mode, verifier=lambda text, row: bool(text), **settings
    )
    rows = tiny.dataset.select(range(4))
    sampled = sample_rollouts(
        trainer.model, tiny.processor, rows, 24, trainer.verifier, seed=1, max_new_tokens=WIDTH, **of_sampling
    )
    cache = trainer.new_cache()
    cache.fill(trajectory for group in sampled for trajectory in group)
    trainer.guidance = cache
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["npo/replaced_slots"] >= 2
    assert log["npo/guide_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert log["npo/guide_kl"] == pytest.approx(0.0, abs=1e-4)


def test_without_the_template_arguments_of_training_it_has_not(tmp_path, monkeypatch):
    tiny = world("text")
    monkeypatch.setattr(tiny.processor, "chat_template", tiny.processor.chat_template + THINKS)
    trainer = trainer_of(
        tiny, tmp_path, tau_gate=1.0, verifier=lambda text, row: True, chat_template_kwargs={"think": True}
    )
    sampled = sample_rollouts(
        trainer.model, tiny.processor, tiny.dataset, 24, trainer.verifier, seed=1, max_new_tokens=WIDTH
    )
    trainer.guidance = cache = trainer.new_cache()
    cache.fill(trajectory for group in sampled for trajectory in group)
    trainer.train()
    assert abs(trainer.state.log_history[0]["npo/guide_kl"]) > 0.01


def test_own_past_keeps_the_temperature_of_its_log_probs():
    row = {"group": 0, "source": "policy", "uid": "a", "token_ids": [5, 2], "behaviour_logps": [-1.0, -1.0]}
    row |= {"text": "", "ended": True, "overwritten_correct": None}
    memory = OwnPast({"a": {"uid": "a"}}, 2, 0, temperature=0.6)
    memory.observe(1, [{**row, "correct": True}, {**row, "correct": False}])
    memory.replay(["a"], 1, lambda rows, ids: [0.0] * len(ids))
    assert {guide.temperature for kept in memory._kept.values() for guide in kept} == {0.6}


# A single wrong guide, and all of them


def _failing(tiny: TinyWorld, *wrong: str) -> Guides:
    """Guides of all prompts; those of some are mistakes that are marked correct."""
    uids = tiny.dataset["uid"]
    return Guides(
        {uid: tiny.guide(uid, token_ids=(tiny.mistake if uid in wrong else tiny.solution)(uid)) for uid in uids}
    )


@pytest.mark.parametrize("placement", ["replace", "append"])
def test_a_guide_that_is_wrong_at_injection_is_left_out_and_counted(tmp_path, monkeypatch, caplog, placement):
    tiny = world("text")
    bad = tiny.dataset["uid"][0]
    rig(monkeypatch, correct_in(tiny, {bad: [3]}))
    trainer = trainer_of(
        tiny, tmp_path, prompts=2, steps=2, guidance=_failing(tiny, bad), placement=placement, learning_rate=0.0
    )
    trainer.rollout_sink, trainer.record_rollouts = (tables := {}).__setitem__, True
    trainer.train()
    first = trainer.generated[0]
    assert first["is_guide"].nonzero().flatten().tolist() == [7]
    kept = tiny.solution(bad) if placement == "replace" else [tiny.processor.eos_token_id]
    assert responses(first)[3] == kept, "the policy's own rollout stays"
    one, two = trainer.state.log_history[:2]
    assert (one["npo/replaced_slots"], one["npo/refused_guides"], one["npo/gated_groups"]) == (1, 1, 1)
    assert (two["npo/replaced_slots"], two["npo/refused_guides"]) == (2, 0)
    assert caplog.text.count("1 of 2 guides of this step were wrong at injection, such as that of") == 1
    rows = [row for row in tables[1] if row["uid"] == bad]
    assert {row["source"] for row in rows} == {"policy"}
    assert [row["correct"] for row in rows] == [False] * 3 + [True] * (placement == "replace")


def test_a_verifier_that_fails_now_and_then_does_not_end_a_run(tmp_path):
    tiny = world("text")
    asked = []

    def flaky(text, row):
        asked.append(text)
        return Verdict.WRONG if len(asked) % 7 == 0 else VERIFIER(text, row)

    trainer = trainer_of(tiny, tmp_path, steps=6, guidance=_failing(tiny), verifier=flaky)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "npo/refused_guides" in line]
    assert trainer.state.global_step == 6 and sum(line["npo/refused_guides"] for line in lines) > 0
    # the sampled rollouts of the gate are judged once, the guides once
    offered = sum(line["npo/refused_guides"] + line["npo/replaced_slots"] for line in lines)
    assert len(asked) == 6 * 16 + offered


def test_a_source_whose_guides_are_all_wrong_ends_the_run(tmp_path):
    tiny = world("text")
    trainer = trainer_of(tiny, tmp_path, steps=9, guidance=_failing(tiny, *tiny.dataset["uid"]))
    with pytest.raises(GuidanceRefused, match=f"All {ALL_REFUSED} guides so far were wrong at injection"):
        trainer.train()
    assert len(trainer.loss_calls) == ALL_REFUSED // 4 - 1


def test_what_is_told_of_refused_guides(caplog):
    caplog.set_level(logging.WARNING)
    counted = RefusedGuides()
    for taken, refused, messages in ((3, 0, 0), (3, 1, 1), (3, 1, 1), (0, 4, 2), (0, 40, 3), (2, 0, 3)):
        counted.count(taken, refused, None)
        assert len(caplog.records) == messages
    with pytest.raises(GuidanceRefused, match=str(ALL_REFUSED)):
        RefusedGuides().count(0, ALL_REFUSED, None)


# Rewards and rows that cannot be counted


def test_rows_that_no_reward_scored_are_in_no_mean(tmp_path):
    trainer = trainer_of(
        world("text"), tmp_path, reward=lambda completions, **_: [2.0, None, 4.0, None] * (len(completions) // 4)
    )
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["npo/reward"] == line["reward"] == 3.0


def test_without_any_scored_row_there_is_no_reward(tmp_path):
    trainer = trainer_of(world("text"), tmp_path, reward=lambda completions, **_: [None] * len(completions))
    trainer.train()
    assert trainer.state.log_history[0]["npo/reward"] is None


def test_the_advantage_of_the_guides_is_logged(tmp_path, monkeypatch):
    """A length penalty can make it negative."""
    tiny = world("text")
    rig(monkeypatch, correct_in(tiny, {}))
    word = tiny.processor.convert_tokens_to_ids("0")
    longer = {uid: tiny.guide(uid, token_ids=[word, *tiny.solution(uid)]) for uid in tiny.dataset["uid"]}
    trainer = trainer_of(
        tiny,
        tmp_path,
        guidance=Guides(longer),
        max_completion_length=WIDTH + 1,
        reward=lambda completion_ids, **_: [-float(len(ids)) for ids in completion_ids],
    )
    trainer.train()
    (batch,) = trainer.generated
    line = trainer.state.log_history[0]
    assert line["npo/guide_advantage"] == pytest.approx(batch["advantages"][batch["is_guide"]].mean().item())
    assert line["npo/guide_advantage"] == pytest.approx(-0.75 / (0.5 + 1e-4))


def test_the_verifier_is_not_asked_in_evaluation(tmp_path):
    """The evaluation set may lack its columns."""
    tiny = world("text")
    trainer = trainer_of(
        tiny,
        tmp_path,
        reward=lambda completions, **_: [0.5] * len(completions),
        guidance=_failing(tiny),
        eval_dataset=tiny.dataset.select(range(4)).remove_columns("answer"),
        per_device_eval_batch_size=4,
        num_generations_eval=2,
    )
    assert trainer.evaluate()["eval_reward"] == 0.5


def test_a_step_whose_responses_are_all_masked_has_no_entropy(tmp_path, monkeypatch):
    tiny = world("text")
    rig(monkeypatch, lambda row, slot: [tiny.processor.convert_tokens_to_ids("0")] * WIDTH)
    trainer = trainer_of(tiny, tmp_path, mask_truncated_completions=True)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["npo/entropy"] is None and math.isfinite(line["npo/reward"])
