"""LUFFY, ExGRPO and RLEP against the originals' formulas, by hand, through the real training step; and whole runs.

The settings of a method are those that a run of it hands to TRL; only the sampling is replaced, where a test says so.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from worlds import (
    Gradients,
    Guides,
    SpyTrainer,
    TabularPolicy,
    correct_in,
    log_probs,
    responses,
    rig,
    token_log_probs,
    trainer_of,
    uniform_world,
    world,
)

import npo_core.control.baselines
import npo_core.control.offline
import npo_core.control.watch
import npo_core.stages.factory
from npo_core.control.baselines import WHOLE_RUN, GuidedByOwnPast, GuidedByPolicy
from npo_core.files import append_line, read_table
from npo_core.guidance.fingerprints import tokenizer_digest, tokenizer_of
from npo_core.guidance.replay import MEMORY_FILE, OwnPast, ReplayPool
from npo_core.guidance.trajectories import GuidanceCache, Trajectory
from npo_core.guidance.verdicts import Verdict
from npo_core.guidance.verifiers import BoxedVerifier, extract_answer
from npo_core.runs.checkpoints import checkpoint_folder
from npo_core.runs.config import RunConfig, resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.stages import run as stages
from npo_core.trainer.sampling import completion_entropies
from npo_core.trainer.trainer import NPOTrainer
from npo_core.world.tasks.problems import SPACE

SETTINGS = (
    "tau_gate", "ratio_mode", "ratio_truncation", "ratio_gamma", "guide_behaviour", "placement", "guides_per_group",
    "scale_rewards", "entropy_coef", "epsilon", "epsilon_high", "loss_type",
)  # fmt: skip


def arguments(method: str, **overrides) -> dict:
    """What a run of a method hands to TRL, as far as the loss goes; `n` holds the rows of a group."""
    made = stages.training_arguments(resolve_config(method, "cpu", overrides=overrides), Path("nowhere"))
    return {**{name: getattr(made, name) for name in SETTINGS}, "n": made.num_generations, "max_grad_norm": 0.0}


def test_the_settings_are_those_of_the_table():
    luffy, exgrpo, rlep = (arguments(method) for method in ("luffy", "exgrpo", "rlep"))
    grpo = arguments("grpo")

    def differences(method):
        return {name: value for name, value in method.items() if value != grpo[name]}

    shaped = {"tau_gate": 1.0, "ratio_mode": "shaped"}
    assert differences(exgrpo) == shaped
    assert differences(luffy) == {**shaped, "guide_behaviour": "one", "scale_rewards": "none", "entropy_coef": 0.001}
    assert differences(rlep) == {"tau_gate": 1.0, "placement": "append", "guides_per_group": 2, "n": 10}
    assert (grpo["n"], grpo["scale_rewards"], grpo["entropy_coef"], grpo["ratio_gamma"]) == (8, "group", 0.0, 0.1)
    assert resolve_config("rlep").cache_rollouts == 64 and resolve_config("exgrpo").replay_share == 0.5
    assert resolve_config("exgrpo").replay_start == 0.35


# The loss, by hand: one token a response, π = (1/2, 1/4, 1/8, 1/8). The policy writes token 0, guides are token 1.
# The gradient of log π(0) in the logits is (1/2, −1/4, −1/8, −1/8), that of log π(1) is (−1/2, 3/4, −1/8, −1/8).

POLICY = [0.5, 0.25, 0.125, 0.125]
BY_HAND = {
    # A = −1/8 and 7/8; the derivative of π/(π + 0.1) is 0.1·0.25/0.35² = 0.2040816 times that of log π(1), so the
    # policy gives 7/8·1/8 = 0.109375 times the first vector and the guide −7/8·1/8·0.2040816 = −0.0223214 the second.
    # Entropy H = 1.2130075 nats has the gradient −π (ln π + H); −0.001 of it is (25.99, −4.33, −10.83, −10.83)·1e-5.
    "luffy": ([-0.125] * 7 + [0.875], [0.06610814, -0.04412814, -0.01099000, -0.01099000]),
    # std 0.3535534 + 1e-4; the guide was sampled with probability 1/2, so x = 0.25/0.5 and the derivative of
    # x/(x + 0.1) is 0.1·0.5/0.6² = 0.1388889: 7/8·0.3534534 = 0.3092717 and −1/8·2.4741739·0.1388889 = −0.0429544.
    "exgrpo": ([-0.3534534] * 7 + [2.4741739], [0.1761131, -0.1095338, -0.0332896, -0.0332896]),
    # mean 0.2, std (1.6/9)^½ = 0.4216370 + 1e-4, ratio 1: 8/10·0.4742330 and −2/10·1.8969319, both ∓0.3793864.
    "rlep": ([-0.4742330] * 8 + [1.8969319] * 2, [0.3793864, -0.3793864, 0.0, 0.0]),
}
GUIDES = {"luffy": 1, "exgrpo": 1, "rlep": 2}


def by_hand_rows(method: str, stored: float = 0.5) -> dict:
    advantages, _ = BY_HAND[method]
    rows, guides = len(advantages), GUIDES[method]
    is_guide = torch.tensor([False] * (rows - guides) + [True] * guides)
    ones = torch.ones(rows, 1, dtype=torch.long)
    return {
        "prompt_ids": ones * 0,
        "prompt_mask": ones,
        "completion_ids": is_guide.long().unsqueeze(1),
        "completion_mask": ones,
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(rows),
        "is_guide": is_guide,
        "is_own": ~is_guide,
        "guide_logps": torch.where(is_guide.unsqueeze(1), torch.tensor(stored).log(), 0.0),
    }


def loss_gradient(trainer, rows: dict) -> list[float]:
    policy = TabularPolicy(torch.tensor(POLICY).log().repeat(4, 1))
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop otherwise
    (gradient,) = torch.autograd.grad(trainer._compute_loss(policy, rows), [policy.logits])
    assert not gradient[1:].any(), "after the prompt token 0"
    return gradient[0].tolist()


@pytest.mark.parametrize("method", BY_HAND)
def test_the_gradient_is_the_originals_by_hand(tmp_path, method):
    trainer = trainer_of(world("text"), tmp_path, NPOTrainer, **arguments(method))
    assert loss_gradient(trainer, by_hand_rows(method)) == pytest.approx(BY_HAND[method][1], abs=2e-7)


def test_luffy_takes_no_notice_of_the_teachers_probabilities_and_exgrpo_does_of_the_stored_ones(tmp_path):
    for method, same in (("luffy", True), ("rlep", True), ("exgrpo", False)):
        trainer = trainer_of(world("text"), tmp_path, NPOTrainer, **arguments(method))
        found = [loss_gradient(trainer, by_hand_rows(method, stored)) for stored in (0.5, 0.01)]
        assert (found[0] == found[1]) is same, method


@pytest.mark.parametrize("method", ["luffy", "exgrpo"])
@pytest.mark.parametrize("probability", [0.001, 0.999])
def test_no_clip_stops_the_gradient_of_a_shaped_guide(tmp_path, method, probability):
    """x/(x + 0.1) has a gradient at any x: 25 for ExGRPO's stored 0.04 and π = 0.999, far outside 1.28."""
    stored = 0.04
    x = probability / (1.0 if method == "luffy" else stored)
    policy = TabularPolicy(torch.tensor([1 - probability, probability, 1e-9, 1e-9]).log().repeat(4, 1))
    rows = {
        name: value[7:] if value.dim() else value
        for name, value in by_hand_rows(method, stored).items()  # the guide alone
    }
    trainer = trainer_of(world("text"), tmp_path, NPOTrainer, **{**arguments(method), "entropy_coef": 0.0})
    trainer.current_gradient_accumulation_steps = 1
    (found,) = torch.autograd.grad(trainer._compute_loss(policy, rows), [policy.logits])
    expected = -BY_HAND[method][0][-1] * 0.1 * x / (x + 0.1) ** 2 * (1 - probability)
    assert found[0, 1].item() == pytest.approx(expected, rel=1e-4)


# The real step: sampling rigged, everything after it as in a run


def gradients_of(loss: torch.Tensor, model) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def row_means(terms: torch.Tensor, batch: Mapping) -> torch.Tensor:
    mask = batch["completion_mask"]
    return ((terms * mask).sum(1) / mask.sum(1)).mean()


def assert_gradients(found, expected) -> None:
    scale = float(max(gradient.abs().max() for gradient in expected.values()))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=scale * 1e-4, msg=name)


def model_before(trainer, tiny, call: int = 0):
    model = tiny.build()
    model.load_state_dict(trainer.loss_calls[call][0])
    return model


@pytest.fixture(scope="module")
def luffy_step(tmp_path_factory):
    """One step on three groups of 8: all wrong, all right, both with a guide; half right, without."""
    tiny = world("text")
    wrong, solved, half = uids = tiny.dataset["uid"][:3]
    gradients = Gradients()
    with pytest.MonkeyPatch.context() as patch:
        rig(patch, correct_in(tiny, {solved: range(8), half: range(4)}))
        trainer = trainer_of(
            tiny,
            tmp_path_factory.mktemp("luffy"),
            prompts=3,
            guidance=Guides({uid: tiny.guide(uid) for uid in (wrong, solved)}),
            callbacks=[gradients],
            **arguments("luffy"),
        )
        trainer.train()
    return tiny, trainer, gradients.steps[0], uids


def test_luffy_guides_every_prompt_with_a_guide_and_centres_without_dividing(luffy_step):
    _, trainer, _, _ = luffy_step
    (batch,) = trainer.generated
    assert batch["is_guide"].nonzero().flatten().tolist() == [7, 15], "the last of 8, of the solved group too"
    assert batch["advantages"].view(3, 8).tolist() == [[-1 / 8] * 7 + [7 / 8], [0.0] * 8, [0.5] * 4 + [-0.5] * 4]
    log = trainer.state.log_history[0]
    assert (log["npo/gated_groups"], log["npo/replaced_slots"], log["npo/pass_rate"]) == (1, 2, 0.5)


def test_luffys_step_has_the_gradient_of_the_originals_objective(luffy_step):
    tiny, trainer, found, _ = luffy_step
    (_, batch) = trainer.loss_calls[0]

    def objective(bonus):
        model = model_before(trainer, tiny)
        scores = log_probs(model, batch)
        logps = scores.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
        shaped = logps.exp() / (logps.exp() + 0.1)
        weight = torch.where(batch["is_guide"].unsqueeze(1), shaped, (logps - logps.detach()).exp())
        entropy = -(scores.exp() * scores).sum(-1)[batch["completion_mask"].bool()].mean()
        loss = -row_means(weight * batch["advantages"].unsqueeze(1), batch) - bonus * entropy
        return gradients_of(loss, model)

    assert_gradients(found, objective(0.001))
    with pytest.raises(AssertionError):
        assert_gradients(found, objective(0.0))


@pytest.fixture(scope="module")
def exgrpo_steps(tmp_path_factory):
    """Three steps of two prompts, groups of 8. Correct of the first two: 6 and 0, so that replay begins with the second
    step, whose second prompt gives way to the first of all; it solves all 8 in the third step."""
    tiny = world("text")
    uids = tiny.dataset["uid"][:6]
    answers = dict(zip(tiny.dataset["uid"], tiny.dataset["answer"], strict=True))
    other = {uid: tiny.encode(f"{SPACE} \\boxed{{ {answer} }}") for uid, answer in answers.items()}
    endless = {uid: tiny.solution(uid)[:-1] for uid in uids}
    steps = []

    def write(row, slot):
        uid, step = row["uid"], len(steps)  # counted from 1
        if uid == uids[0] and step == 1:
            return [tiny.solution(uid), other[uid], endless[uid]][slot % 3] if slot < 6 else tiny.mistake(uid)
        if uid == uids[0] and step == 2:  # replayed: the fifth is another correct one
            return [7, *other[uid]] if slot in (4, 7) else tiny.mistake(uid)
        return other[uid] if uid == uids[0] else tiny.mistake(uid)

    class Steps(SpyTrainer):
        def _generate_and_score_completions(self, inputs):
            steps.append(None)
            output = super()._generate_and_score_completions(inputs)
            steps[-1] = [row["uid"] for row in self._rollouts.rows]
            return output

    memory = OwnPast({row["uid"]: row for row in tiny.dataset}, 8, seed=0)
    states = []
    observe = memory.observe

    def watched(step, rows):
        observe(step, rows)
        states.append((memory.begun, dict(memory._solved), {uid: list(kept) for uid, kept in memory._kept.items()}))

    memory.observe = watched
    gradients = Gradients()
    with pytest.MonkeyPatch.context() as patch:
        rig(patch, write)
        trainer = trainer_of(
            tiny,
            tmp_path_factory.mktemp("exgrpo"),
            Steps,
            prompts=2,
            steps=3,
            guidance=memory,
            callbacks=[gradients],
            **arguments("exgrpo"),
        )
        trainer.train()
    return SimpleNamespace(
        tiny=tiny, trainer=trainer, gradients=gradients.steps, uids=uids, steps=steps, states=states, other=other
    )


def test_exgrpo_remembers_ended_correct_rollouts_and_begins_above_the_start(exgrpo_steps):
    run, uid = exgrpo_steps, exgrpo_steps.uids[0]
    begun, solved, kept = run.states[0]
    assert begun and solved == {uid: 6}, "6 of 16 is above 35 %"
    expected = [tuple(run.tiny.solution(uid)), tuple(run.other[uid])] * 2
    assert [trajectory.token_ids for trajectory in kept[uid]] == expected, "not the two without an end"


def test_exgrpo_replaces_the_last_half_of_the_prompts_and_one_of_8_rollouts(exgrpo_steps):
    run, uids = exgrpo_steps, exgrpo_steps.uids
    assert run.steps[0][::8] == uids[:2]
    assert run.steps[1][::8] == [uids[2], uids[0]] == run.steps[1][7::8]
    first, second, third = run.trainer.generated
    assert not first["is_guide"].any()
    assert second["is_guide"].nonzero().flatten().tolist() == [15]
    assert third["is_guide"].sum() == 1
    # the guide, and the fifth of the 7 fresh ones: mean 1/4, unbiased variance (2·9/16 + 6·1/16)/7 = 3/14
    spread = (3 / 14) ** 0.5 + 1e-4
    expected = [-0.25 / spread] * 4 + [0.75 / spread] + [-0.25 / spread] * 2 + [0.75 / spread]
    assert second["advantages"][8:].tolist() == pytest.approx(expected, rel=1e-5)
    assert second["advantages"][:8].tolist() == [0.0] * 8


def test_exgrpo_chooses_the_rollout_with_the_lowest_entropy_under_the_current_policy(exgrpo_steps):
    run, uid = exgrpo_steps, exgrpo_steps.uids[0]
    model = model_before(run.trainer, run.tiny, 1)
    prompt = next(row for row in run.tiny.dataset if row["uid"] == uid)
    entropies = {}
    for ids in (run.tiny.solution(uid), run.other[uid]):
        batch = {
            "prompt_ids": torch.tensor(encoded := [prompt_ids(run.tiny, prompt)]),
            "prompt_mask": torch.ones_like(torch.tensor(encoded)),
            "completion_ids": torch.tensor([ids]),
            "completion_mask": torch.ones_like(torch.tensor([ids])),
        }
        with torch.no_grad():
            scores = log_probs(model, batch)
        entropies[tuple(ids)] = float(-(scores.exp() * scores).sum(-1).mean())
    best = min(entropies, key=entropies.get)
    assert max(entropies.values()) - min(entropies.values()) > 0.01
    assert responses(run.trainer.generated[1])[15] == list(best)


def prompt_ids(tiny, row) -> list[int]:
    text = tiny.processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return tiny.processor(text)["input_ids"]


def test_exgrpos_step_has_the_gradient_of_the_originals_objective(exgrpo_steps):
    """x/(x + 0.1) with x = π_θ/π_stored, where the stored one is of the policy that sampled the guide."""
    run = exgrpo_steps
    for call in (1, 2):
        _, batch = run.trainer.loss_calls[call]
        guide = batch["is_guide"].unsqueeze(1)
        mask = guide & batch["completion_mask"].bool()
        (ids,) = (tuple(ids) for ids, is_guide in zip(responses(batch), batch["is_guide"], strict=True) if is_guide)
        (step,) = {t.source_step for t in run.states[call - 1][2][run.uids[0]] if t.token_ids == ids}
        with torch.no_grad():
            stored = token_log_probs(model_before(run.trainer, run.tiny, step - 1), batch)
        torch.testing.assert_close(batch["guide_logps"][mask], stored[mask], rtol=1e-4, atol=1e-5)
        model = model_before(run.trainer, run.tiny, call)
        logps = token_log_probs(model, batch)
        x = (logps - stored).exp()
        assert (x[mask] - 1).abs().max() > 0.05, "the policy has moved since"
        weight = torch.where(guide, x / (x + 0.1), (logps - logps.detach()).exp())
        expected = gradients_of(-row_means(weight * batch["advantages"].unsqueeze(1), batch), model)
        assert_gradients(run.gradients[call], expected)


def test_exgrpos_guide_and_the_rollout_that_it_replaces_stay_out_of_the_memory(exgrpo_steps):
    """Two of the 8 rollouts of the policy were correct, one of which the guide replaced: bucket 2, one more kept."""
    run, uid = exgrpo_steps, exgrpo_steps.uids[0]
    _, solved, kept = run.states[1]
    assert solved == {uid: 2}
    assert [t.source_step for t in kept[uid]] == [1, 1, 1, 1, 2]
    assert kept[uid][-1].token_ids == (7, *run.other[uid])


def test_exgrpo_retires_a_prompt_when_all_rollouts_of_the_policy_are_correct(exgrpo_steps):
    _, solved, kept = exgrpo_steps.states[2]
    assert exgrpo_steps.steps[2][8] == exgrpo_steps.uids[0]
    assert solved == {} and kept == {}


RLEP_CORRECT = {"own": (1, 4, 6)}


@pytest.fixture(scope="module")
def rlep_step(tmp_path_factory):
    """One step on two prompts: all wrong, with a pool of three; 3 of 8 right, without a pool."""
    tiny = world("text")
    pooled, bare = tiny.dataset["uid"][:2]
    answer = tiny.dataset[0]["answer"]
    forms = [tiny.encode(f"{'0 ' * extra}\\boxed{{ {answer} }}") for extra in range(3)]
    pool = ReplayPool([tiny.processor.eos_token_id], 12, tokenizer_digest(tiny.processor))
    pool.fill(tiny.guide(pooled, token_ids=ids) for ids in forms)
    gradients, tables = Gradients(), {}
    with pytest.MonkeyPatch.context() as patch:
        rig(patch, correct_in(tiny, {bare: RLEP_CORRECT["own"]}))
        trainer = trainer_of(
            tiny,
            tmp_path_factory.mktemp("rlep"),
            prompts=2,
            guidance=pool,
            callbacks=[gradients],
            **arguments("rlep"),
        )
        trainer.rollout_sink, trainer.record_rollouts = tables.__setitem__, True
        trainer.train()
        plain = trainer_of(tiny, tmp_path_factory.mktemp("grpo"), prompts=2, **arguments("grpo"))
        plain.train()
    return SimpleNamespace(
        tiny=tiny, trainer=trainer, plain=plain, gradient=gradients.steps[0], table=tables[1], pool=pool, forms=forms
    )


def test_rlep_appends_two_of_the_pool_to_8_and_compares_all_10(rlep_step):
    (batch,) = rlep_step.trainer.generated
    assert len(batch["is_guide"]) == 20 and batch["is_guide"].nonzero().flatten().tolist() == [8, 9]
    written = responses(batch)
    uid = rlep_step.tiny.dataset["uid"][0]
    assert written[:8] == [rlep_step.tiny.mistake(uid)] * 8
    assert written[8] != written[9] and all(ids in rlep_step.forms for ids in written[8:10])
    assert [list(guide.token_ids) for guide in rlep_step.pool.guides(uid, 0, 2)] == written[8:10]
    # mean 2/10, unbiased std (8·0.04 + 2·0.64)/9 = 0.4216²
    assert batch["advantages"][:10].tolist() == pytest.approx([-0.4742330] * 8 + [1.8969319] * 2, rel=1e-5)


def test_a_prompt_without_a_pool_has_the_advantages_of_a_plain_group_of_8(rlep_step):
    (batch,), (plain,) = rlep_step.trainer.generated, rlep_step.plain.generated
    assert torch.equal(batch["advantages"][10:18], plain["advantages"][8:])
    assert batch["advantages"][10:18].any()
    assert batch["advantages"][18:].tolist() == [0.0, 0.0]
    eos = rlep_step.tiny.processor.eos_token_id
    assert responses(batch)[10:18] == responses(plain)[8:] and responses(batch)[18:] == [[eos]] * 2
    assert batch["is_own"].tolist() == [True] * 8 + [False] * 2 + [True] * 8 + [False] * 2


def test_rleps_step_has_ratio_one_and_no_gradient_from_empty_places(rlep_step):
    _, batch = rlep_step.trainer.loss_calls[0]
    model = model_before(rlep_step.trainer, rlep_step.tiny)
    terms = batch["advantages"].unsqueeze(1) * token_log_probs(model, batch)
    used = batch["is_own"] | batch["is_guide"]
    mask = batch["completion_mask"]
    per_row = (terms * mask).sum(1) / mask.sum(1)
    assert used.sum() == 18
    assert_gradients(rlep_step.gradient, gradients_of(-per_row[used].sum() / 20, model))


def test_empty_places_count_in_no_metric(rlep_step):
    trainer, plain = rlep_step.trainer, rlep_step.plain
    log, grpo = trainer.state.log_history[0], plain.state.log_history[0]
    for name in ("npo/reward", "npo/pass_rate", "npo/all_wrong_groups"):
        assert log[name] == grpo[name], name
    assert log["npo/reward"] == 3 / 16
    assert log["npo/entropy"] == pytest.approx(grpo["npo/entropy"], rel=1e-5)
    assert (log["npo/replaced_slots"], log["npo/gated_groups"]) == (2, 1)
    assert trainer.group_pass_rates == plain.group_pass_rates


def test_empty_places_are_in_no_rollout_table(rlep_step):
    slots = [(row["group"], row["slot"], row["source"]) for row in rlep_step.table]
    assert slots == [
        *((0, slot, "policy") for slot in range(8)),
        (0, 8, "guide"),
        (0, 9, "guide"),
        *((1, slot, "policy") for slot in range(8)),
    ]
    assert all(row["overwritten_ids"] is None for row in rlep_step.table), "nothing is replaced"


def test_a_pool_of_one_fills_one_place(tmp_path, monkeypatch):
    """A source of one's own may have fewer guides than places; the other place stays empty."""
    tiny = world("text")
    uid = tiny.dataset["uid"][0]
    pool = ReplayPool([tiny.processor.eos_token_id], 12, tokenizer_digest(tiny.processor))
    pool.add(tiny.guide(uid))
    rig(monkeypatch, correct_in(tiny, {}))
    trainer = trainer_of(tiny, tmp_path, prompts=1, guidance=pool, **arguments("rlep"))
    trainer.train()
    (batch,) = trainer.generated
    assert batch["is_guide"].nonzero().flatten().tolist() == [8] and not batch["is_own"][9]
    # 9 rewards, one of them 1: mean 1/9, unbiased variance 1/9
    expected = [-1 / 9 / (1 / 3 + 1e-4)] * 8 + [8 / 9 / (1 / 3 + 1e-4), 0.0]
    assert batch["advantages"].tolist() == pytest.approx(expected, rel=1e-5)


# Sampling the guides of a whole run


def controller(kind, config: RunConfig, root: Path, **extra):
    """A controller of three prompts whose base policy is never asked."""
    tiny = uniform_world([{"uid": uid} for uid in ("rich", "poor", "none")])
    rows = {row["uid"]: row for row in tiny.dataset}
    run = RunFolder(config, root)
    return kind(None, config, run, rows, tiny.processor, None, quiet=True, **extra)


@pytest.fixture
def rollouts(monkeypatch):
    """Rollouts of a guide: three correct ones, one of them without an end; one correct; none."""
    end = tokenizer_of(uniform_world([{"uid": "rich"}]).processor).eos_token_id
    made = {
        "rich": [((5, end), False), ((6, end), True), ((6, 6), True), ((5, 6, end), True)],
        "poor": [((5, 5, end), True), ((6, end), False)],
        "none": [((5, end), False)],
    }
    asked = []

    def sample(policy, processor, rows, k, verifier, *, source_step, **settings):
        asked.append((k, source_step, settings))
        return [[Trajectory(row["uid"], ids, (), source_step, ok, "") for ids, ok in made[row["uid"]]] for row in rows]

    def score(policy, processor, rows, completions, batch, *, temperature, chat_template_kwargs, unsampled):
        return [[-0.25 * (place + 1) for place in range(len(ids))] for ids in completions]

    guide = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=end))
    monkeypatch.setattr(GuidedByPolicy, "_learner", lambda self, folder: guide)
    monkeypatch.setattr(npo_core.control.baselines, "shared_rollouts", sample)
    monkeypatch.setattr(npo_core.control.offline, "shared_logps", score)
    return made, asked


def test_luffy_keeps_the_first_correct_rollout_of_each_prompt(rollouts, tmp_path):
    made = controller(GuidedByPolicy, resolve_config("luffy", "smoke"), tmp_path, guide_folder=tmp_path)
    segment = made._first_segment()
    cache = made._guidance(segment)
    assert type(cache) is GuidanceCache
    end = cache.eos_token_ids[0]
    assert {guide.uid: guide.token_ids for guide in cache} == {"rich": (6, end), "poor": (5, 5, end)}
    assert cache.guide("poor", 0).logps == (-0.25, -0.5, -0.75) and cache.guide("poor", 99) is not None
    assert (segment.compute_start, segment.guide_until, segment.guidance) == (0, 20, WHOLE_RUN)
    (event,) = made.run_folder.events("cache")
    assert (event["prompts"], event["cached"], event["rollouts"], event["compute_step"]) == (3, 2, 12, 0)


def test_rlep_keeps_all_correct_rollouts_of_prompts_with_at_least_two(rollouts, tmp_path):
    made = controller(GuidedByPolicy, resolve_config("rlep", "smoke", seed=3), tmp_path, guide_folder=tmp_path)
    segment = made._first_segment()
    pool = made._guidance(segment)
    assert isinstance(pool, ReplayPool) and pool.seed == 3
    end = pool.eos_token_ids[0]
    assert [guide.token_ids for guide in pool] == [(6, end), (5, 6, end)]
    assert {guide.source_step for guide in pool} == {8} and rollouts[1][0][0] == made.config.cache_rollouts
    assert segment.compute_start == 8, "the earlier run's steps are spent"
    (event,) = made.run_folder.events("cache")
    assert (event["cached"], event["compute_step"]) == (1, 8)


def test_only_the_prompts_that_a_run_meets_are_sampled_and_counted(rollouts, tmp_path):
    given = {"guide_folder": tmp_path, "prompts": {"poor"}}
    made = controller(GuidedByPolicy, resolve_config("luffy", "smoke"), tmp_path, **given)
    assert {guide.uid for guide in made._guidance(made._first_segment())} == {"poor"}
    (event,) = made.run_folder.events("cache")
    assert (event["prompts"], event["cached"], event["rollouts"]) == (1, 1, made.config.cache_rollouts)


@pytest.mark.parametrize("method", ["luffy", "rlep"])
def test_a_guide_that_solves_nothing_is_refused(rollouts, tmp_path, method):
    for group in rollouts[0].values():
        group[:] = [(ids, False) for ids, _ in group]
    made = controller(GuidedByPolicy, resolve_config(method, "smoke"), tmp_path, guide_folder=tmp_path / "guide")
    with pytest.raises(ValueError, match=r"guide .*/guide solved no training prompt; it cannot guide"):
        made.run()
    assert not made.run_folder.events("segment")


def test_rlep_refuses_a_guide_that_solves_no_prompt_twice(rollouts, tmp_path):
    del rollouts[0]["rich"][1:3]
    made = controller(GuidedByPolicy, resolve_config("rlep", "smoke"), tmp_path, guide_folder=tmp_path / "guide")
    with pytest.raises(ValueError, match="solved no training prompt"):
        made.run()


def test_exgrpos_memory_has_the_runs_settings(tmp_path):
    config = resolve_config("exgrpo", "smoke", 5, {"replay_share": 0.25, "replay_start": 0.4, "replay_keep": 3})
    memory = controller(GuidedByOwnPast, config, tmp_path)._guidance(None)
    assert (memory.n, memory.seed, memory.share, memory.start, memory.keep) == (4, 5, 0.25, 0.4, 3)


# Whole runs

EXGRPO = resolve_config("exgrpo", "smoke", overrides={"compute_steps": 8})
RLEP = resolve_config(
    "rlep", "smoke", overrides={"compute_steps": 8, "rlep_source_steps": 4, "cache_rollouts": 12, "train_problems": 32}
)
LUFFY = resolve_config("luffy", "smoke", overrides={"compute_steps": 4, "train_problems": 16})


class HalfRight(BoxedVerifier):
    """Right is every second response, by what is boxed, to every second prompt, whatever a tiny policy knows."""

    def __call__(self, completion, row):
        boxed = extract_answer(completion)
        if not boxed:
            return Verdict.UNPARSEABLE
        odd = [sum(map(ord, text)) % 2 for text in (boxed, row["uid"])]
        return Verdict.WRONG if any(odd) else Verdict.CORRECT


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npo_core.stages.factory, "PathVerifier", HalfRight)
        yield tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def exgrpo(root) -> RunFolder:
    return stages.run(EXGRPO, root, quiet=True)


@pytest.fixture(scope="module")
def rlep(root) -> RunFolder:
    return stages.run(RLEP, root, quiet=True)


def tables(run: RunFolder) -> dict[int, list[dict]]:
    return {int(path.stem.split("-")[1]): read_table(path) for path in sorted((run.path / "rollouts").iterdir())}


def test_a_run_of_exgrpo_replays_its_own_successes(exgrpo):
    order = stages.TrainerMaker(EXGRPO, stages.prepare(EXGRPO, quiet=True)).schedule.with_format(None)["uid"]
    sampled, guides = set(), 0
    for step, rows in tables(exgrpo).items():
        uids = list(dict.fromkeys(row["uid"] for row in rows))
        scheduled = order[4 * step - 4 : 4 * step]
        assert len(rows) == 16 and len(uids) == 4, "no prompt twice"
        assert uids[:2] == scheduled[:2], "the first half stays"
        replayed = {row["uid"] for row in rows if row["source"] == "guide"}
        assert replayed == set(uids) - set(scheduled)
        for row in rows:
            if row["source"] == "guide":
                guides += 1
                assert row["slot"] == 3
                assert (row["uid"], tuple(row["token_ids"]), row["guide_step"]) in sampled
                assert row["guide_step"] < step
        sampled |= {(r["uid"], tuple(r["token_ids"]), step) for r in rows if r["source"] == "policy" and r["correct"]}
    assert guides >= 4
    memory = OwnPast({}, 4, seed=0)
    memory.restore(checkpoint_folder(exgrpo.path / "branches" / "00", 8))
    kept = [trajectory for kept in memory._kept.values() for trajectory in kept]
    assert kept and {(t.uid, t.token_ids, t.source_step) for t in kept} <= sampled


def test_a_run_of_rlep_is_charged_for_the_earlier_run(rlep, root):
    lines = rlep.metrics()
    assert [line["compute_step"] for line in lines] == [5, 6, 7, 8]
    assert [line["policy_step"] for line in lines] == [1, 2, 3, 4]
    assert (rlep.result()["compute_steps"], rlep.result()["policy_steps"]) == (8, 4)
    assert rlep.result()["offline_rollouts"] == 16 * 12, "of the prompts of its own four steps"
    assert rlep.result()["rollouts"] == 8 * 16 + 16 * 12
    met = {row["uid"] for rows in tables(rlep).values() for row in rows}
    assert {guide.uid for guide in ReplayPool.load(rlep.path / WHOLE_RUN)} <= met and len(met) == 16
    source = RunFolder(stages.source_config(RLEP), root)
    assert source.config.method == "grpo" and source.metrics()[-1]["compute_step"] == 4
    guides = {row["guide_step"] for rows in tables(rlep).values() for row in rows if row["source"] == "guide"}
    assert guides == {4}


def test_a_run_of_rlep_appends_two_or_none(rlep):
    pool = ReplayPool.load(rlep.path / WHOLE_RUN)
    held = {uid: len(pool.guides(uid, 0, 99)) for uid in {guide.uid for guide in pool}}
    assert held and min(held.values()) >= 2
    sizes = set()
    for rows in tables(rlep).values():
        for number in range(4):
            group = [row for row in rows if row["group"] == number]
            guides = [row["slot"] for row in group if row["source"] == "guide"]
            assert [row["slot"] for row in group if row["source"] == "policy"] == [0, 1, 2, 3]
            assert guides == ([4, 5] if group[0]["uid"] in held else [])
            sizes.add(len(group))
    assert sizes == {4, 6}, "both kinds of prompts came"


def test_the_source_of_rlep_is_plain_grpo_of_its_own_length():
    source = stages.source_config(RLEP)
    plain = resolve_config("grpo", "smoke", overrides={"train_problems": 32})
    assert source == plain.with_changes(compute_steps=4, rlep_source_steps=4)
    assert stages.source_config(replace(RLEP, seed=7)).seed == 7


def test_a_run_of_luffy_is_guided_by_the_teacher_from_its_first_step(root):
    run = stages.run(LUFFY, root, quiet=True)
    cache = GuidanceCache.load(run.path / WHOLE_RUN)
    guided = set()
    for rows in tables(run).values():
        guides = [row for row in rows if row["source"] == "guide"]
        assert {row["uid"] for row in guides} == {row["uid"] for row in rows if row["uid"] in cache}
        assert {row["slot"] for row in guides} <= {3}
        guided |= {row["uid"] for row in guides}
    assert guided == {guide.uid for guide in cache} != set(), "the four steps hold every prompt once"
    assert [line["compute_step"] for line in run.metrics()] == [1, 2, 3, 4], "an external teacher takes no steps"


class Killed(BaseException):
    """Stands in for a kill: nothing in the package catches it."""


def lines(run: RunFolder) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "step_time"} for line in run.metrics()]


@pytest.mark.parametrize(("method", "compute_step", "last"), [("exgrpo", 5, 8), ("rlep", 8, 4)])
def test_a_killed_run_ends_as_if_nothing_had_happened(request, root, tmp_path, method, compute_step, last):
    whole = request.getfixturevalue(method)
    if method == "rlep":
        source = RunFolder(stages.source_config(RLEP), root).path
        shutil.copytree(source, tmp_path / source.name)

    def append(path, record):
        if record.get("compute_step") == compute_step and whole.path.name in str(path):
            raise Killed
        append_line(path, record)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "append_metrics", lambda run, line: append(run.metrics_path, line))
        stages.run(whole.config, tmp_path, quiet=True)
    run = stages.run(whole.config, tmp_path, quiet=True)
    assert lines(run) == lines(whole)
    assert tables(run) == tables(whole)
    folders = [checkpoint_folder(r.path / "branches" / "00", last) for r in (run, whole)]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    if method == "exgrpo":
        memories = [read_table(folder / MEMORY_FILE) for folder in folders]
        assert memories[0] == memories[1] and len(memories[0]) > 1


def test_an_exgrpo_checkpoint_without_its_memory_is_refused(exgrpo, tmp_path):
    made = controller(GuidedByOwnPast, EXGRPO, tmp_path)
    with pytest.raises(FileNotFoundError, match=MEMORY_FILE):
        made._guidance(None, tmp_path)


def test_entropies_are_asked_of_the_policy_that_trains(exgrpo_steps):
    """What the trainer hands to the memory is `completion_entropies` of its own model, in evaluation mode."""
    run = exgrpo_steps
    row, ids = run.tiny.dataset[0], run.other[run.uids[0]]
    asked = []

    class Asking(OwnPast):
        def replay(self, uids, policy_step, entropies):
            asked.append((uids, policy_step, entropies([row], [ids])))
            return {}

    run.trainer.guidance = Asking({}, 8, seed=0)
    run.trainer._with_replayed_prompts([dict(row) for _ in range(8)])
    expected = completion_entropies(run.trainer.model, run.tiny.processor, [row], [ids])
    assert asked == [([row["uid"]], 3, expected)]
