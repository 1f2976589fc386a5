"""NPOTrainer through TRL's real training step: equality with GRPOTrainer, gate, slot, refusals, metrics, gradients.

Only the sampling is replaced, where a test says so: rigged rollouts go through TRL's own rewards, advantages,
shuffling, loss and optimiser.
"""

import inspect
import itertools
import json
import math

import pytest
import torch
import trl
from datasets import Dataset
from trl import GRPOTrainer
from worlds import (
    VERIFIER,
    WIDTH,
    Gradients,
    Guides,
    SpyTrainer,
    TabularPolicy,
    TinyWorld,
    correct_in,
    log_probs,
    prompt_logps,
    responses,
    rig,
    token_log_probs,
    trainer_of,
    uniform_world,
    world,
)

from npo_core.guidance.fingerprints import tokenizer_digest, tokenizer_of
from npo_core.guidance.replay import OwnPast, ReplayPool
from npo_core.guidance.sources import GuidanceWindow
from npo_core.guidance.trajectories import GuidanceCache, GuidanceRefused, Trajectory
from npo_core.guidance.verdicts import Verdict
from npo_core.method.ratios import RATIO_MODES
from npo_core.trainer.config import NPOConfig
from npo_core.trainer.trainer import NPOTrainer

EPSILON, EPSILON_HIGH, TRUNCATION, GAMMA = 0.2, 0.28, 2.0, 0.1
CLIP = {"epsilon": EPSILON, "epsilon_high": EPSILON_HIGH}
LAYOUTS = {
    "one batch": (16, 1, 1),
    "gradient accumulation": (8, 2, 2),
    "steps_per_generation above it": (4, 2, 4),
}


def _uids(tiny: TinyWorld, count: int) -> list[str]:
    return tiny.dataset["uid"][:count]


def _all_guided(tiny: TinyWorld) -> Guides:
    return Guides({uid: tiny.guide(uid) for uid in tiny.dataset["uid"]})


def _weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def _assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


# The public face


def test_no_method_of_trl_is_copied():
    """Every overridden method calls TRL's own; the bodies stay short."""
    for name, method in vars(NPOTrainer).items():
        if inspect.isfunction(method) and hasattr(GRPOTrainer, name):
            source = inspect.getsource(method)
            assert f"super().{name}(" in source, name
            assert len(source.splitlines()) < 40, name


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau_gate": 1.5},
        {"tau_gate": -0.1},
        {"ratio_mode": "Exact"},
        {"ratio_truncation": 0.0},
        {"ratio_gamma": -1.0},
        {"placement": "prepend"},
        {"guide_behaviour": "two"},
        {"guides_per_group": 0},
        {"guides_per_group": 8},
        {"guides_per_group": 7, "placement": "append"},  # one rollout of the policy is no group
    ],
    ids=str,
)
def test_config_refuses_what_makes_no_sense(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **wrong)


@pytest.mark.parametrize("mode", ["truncated", "shaped"])
@pytest.mark.parametrize(
    "by_sequence",
    [
        {"importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence", "loss_type": "luspo"},
        {"loss_type": "vespo"},
    ],
    ids=str,
)
def test_config_refuses_weights_of_tokens_under_a_ratio_of_the_sequence(tmp_path, mode, by_sequence):
    """The gradient would be neither: the derivative of the sequence's ratio spreads each token's weight."""
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **by_sequence}
    with pytest.raises(ValueError, match=f"ratio_mode '{mode}' weights token by token"):
        NPOConfig(ratio_mode=mode, **settings)
    NPOConfig(ratio_mode="exact", **settings)
    NPOConfig(ratio_mode=mode, output_dir=str(tmp_path), use_cpu=True, bf16=False)


def test_constructor_refuses_guidance_without_verifier(tmp_path):
    with pytest.raises(ValueError, match="verifier"):
        trainer_of(world("text"), tmp_path, guidance=Guides(), verifier=None)


@pytest.mark.parametrize("column", ["uid", "answer"])
def test_constructor_refuses_a_data_set_without_a_needed_column(tmp_path, column):
    dataset = world("text").dataset.remove_columns(column)
    with pytest.raises(ValueError, match=column):
        trainer_of(world("text"), tmp_path, guidance=Guides(), dataset=dataset)


def test_constructor_refuses_a_uid_that_names_two_answers(tmp_path):
    rows = list(world("text").dataset)
    rows[1] = {**rows[0], "answer": rows[0]["answer"] + " 0"}
    with pytest.raises(ValueError, match=rows[0]["uid"]):
        trainer_of(world("text"), tmp_path, guidance=Guides(), dataset=Dataset.from_list(rows))


@pytest.mark.parametrize(
    "settings",
    [{"guidance": Guides()}, {}, {"verifier": None, "placement": "append"}],
    ids=["guide", "plain", "append"],
)
def test_constructor_refuses_a_group_over_two_processes(tmp_path, monkeypatch, settings):
    """TRL takes it, as it compares rewards over all processes; a pass rate is that of a whole group."""
    monkeypatch.setattr(NPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"steps_per_generation = 2 is not a multiple of num_generations = 4"):
        trainer_of(world("text"), tmp_path, n=4, per_device_train_batch_size=2, **settings)
    trainer_of(world("text"), tmp_path, n=4, per_device_train_batch_size=2, verifier=None)


def test_constructor_refuses_a_source_with_one_guide_where_several_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"guides_per_group is 2, but Guides has no guides\(\); .* such as ReplayPool"):
        trainer_of(world("text"), tmp_path, guidance=Guides(), n=4, guides_per_group=2)


def test_a_replaying_source_is_refused_on_several_processes(tmp_path, monkeypatch):
    """Each process would learn from its own rollouts only, and the memories would part."""
    trainer = trainer_of(world("text"), tmp_path, NPOTrainer)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    trainer.guidance = Guides()
    with pytest.raises(ValueError, match="OwnPast learns from the rollouts it sees, and each of the 2 processes"):
        trainer.guidance = OwnPast({}, 4, seed=0)


def test_a_replaying_source_in_a_window_is_refused(tmp_path):
    """It would be asked for guides alone, and have none for ever."""
    window = GuidanceWindow(GuidanceWindow(OwnPast({}, 4, seed=0), 0, 9), 0, 5)
    with pytest.raises(ValueError, match=r"OwnPast is given inside of a GuidanceWindow, .* and so never guide"):
        trainer_of(world("text"), tmp_path, NPOTrainer, guidance=window)


# Without guides: GRPOTrainer to the bit


def _dense_reward(completion_ids, **_):
    """A reward that differs between rollouts of a random policy, so that the weights move."""
    return [sum(token % 3 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    ("name", "steps", "layout"),
    [
        ("text", 20, {}),
        ("words", 20, {}),
        ("pictures", 5, {}),
        ("text", 20, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}),
    ],
)
def test_without_guides_the_weights_are_those_of_grpo_bit_for_bit(tmp_path, name, steps, layout):
    """Of a policy that reads pictures, with the loss over the whole vocabulary that TRL has."""
    tiny = world(name)
    plain = {} if name == "text" else {"mask_unsampled": False}
    ends = []
    for kind, guidance in ((GRPOTrainer, None), (SpyTrainer, None), (SpyTrainer, Guides())):
        given = layout if kind is GRPOTrainer else {**layout, **plain}
        trainer = trainer_of(tiny, tmp_path, kind, steps=steps, reward=_dense_reward, guidance=guidance, **given)
        before = _weights(trainer)
        trainer.train()
        assert trainer.state.global_step == steps
        ends.append(_weights(trainer))
    assert not any(torch.equal(before[key], ends[0][key]) for key in before if "visual" not in key)
    _assert_same_bits(ends[0], ends[1])
    _assert_same_bits(ends[0], ends[2])


def test_with_a_guide_the_weights_are_others(tmp_path):
    """So the equality above is not that of two runs that learn nothing from their rollouts."""
    tiny = world("text")
    ends = []
    for guidance in (None, Guides(), _all_guided(tiny)):
        trainer = trainer_of(tiny, tmp_path, guidance=guidance)
        trainer.train()
        ends.append(_weights(trainer))
    _assert_same_bits(ends[0], ends[1])
    assert not torch.equal(ends[0]["lm_head.weight"], ends[2]["lm_head.weight"])


def test_a_window_guides_only_inside_its_segment(tmp_path):
    tiny = world("text")
    trainer = trainer_of(tiny, tmp_path, steps=4, guidance=GuidanceWindow(_all_guided(tiny), 1, 3))
    trainer.train()
    assert [int(batch["is_guide"].sum()) for batch in trainer.generated] == [0, 4, 4, 0]


# The real step: ids, slot, mask, advantages


@pytest.mark.parametrize("name", ["text", "words", "pictures"])
def test_guide_arrives_in_the_last_slot_with_its_ids_mask_and_advantage(tmp_path, name):
    """Random rollouts are wrong, so every group of 8 with a guide is gated: +2.475 for the guide, −0.354 for others."""
    tiny = world(name)
    first, _, third = uids = _uids(tiny, 3)
    cache = GuidanceCache([tokenizer_of(tiny.processor).eos_token_id], WIDTH, tokenizer_digest(tiny.processor))
    cache.add(tiny.guide(first))
    cache.add(tiny.guide(third))
    trainer = trainer_of(tiny, tmp_path, prompts=3, n=8, guidance=cache)
    before = _weights(trainer)
    trainer.train()
    (batch,) = trainer.generated
    assert batch["uids"] == [uid for uid in uids for _ in range(8)]
    assert batch["is_guide"].nonzero().flatten().tolist() == [7, 23]
    for row, uid in ((7, first), (23, third)):
        guide = tiny.guide(uid)
        length = len(guide.token_ids)
        assert batch["completion_ids"][row, :length].tolist() == list(guide.token_ids)
        assert batch["completion_mask"][row].tolist() == [1] * length + [0] * (
            batch["completion_ids"].shape[1] - length
        )
        assert guide.token_ids[-1] == tokenizer_of(tiny.processor).eos_token_id
        assert batch["guide_logps"][row, :length].tolist() == pytest.approx(guide.logps)
        assert batch["guide_logps"][row, length:].abs().sum() == 0
    advantages = batch["advantages"].view(3, 8)
    for group in (0, 2):
        assert advantages[group].tolist() == pytest.approx([-0.354] * 7 + [2.475], abs=1e-3)
    assert advantages[1].tolist() == [0.0] * 8
    # what the loss gets is the same rows in another order
    (_, inputs) = trainer.loss_calls[0]
    assert sorted(responses(inputs)) == sorted(responses(batch))
    assert sum(not torch.equal(before[key], value) for key, value in _weights(trainer).items()) > 0


@pytest.mark.parametrize(
    ("n", "slots", "tau", "replaced"),
    [
        pytest.param(8, [0, 1, 2, 3, 4], 0.6, False, id="5 of 8 is above 0.6"),
        pytest.param(8, [0, 1, 2, 3], 0.6, True, id="4 of 8 is gated"),
        pytest.param(5, [0, 2, 3], 0.6, True, id="3 of 5 is exactly 0.6: gated"),
        pytest.param(4, [3], 0.0, False, id="the overwritten rollout counts when right"),
        pytest.param(4, [0, 1], 0.6, True, id="the overwritten rollout counts when wrong (2 of 4, not 2 of 3)"),
        pytest.param(4, [0, 1, 2, 3], 1.0, True, id="tau 1 guides a solved group"),
        pytest.param(4, [], 0.0, True, id="tau 0 guides an all-wrong group"),
    ],
)
def test_gate_is_the_pass_rate_of_all_n_rollouts(tmp_path, monkeypatch, n, slots, tau, replaced):
    tiny = world("text")
    (uid,) = _uids(tiny, 1)
    write = correct_in(tiny, {uid: slots})
    rig(monkeypatch, write)
    # another way of writing the right answer, so that a replaced slot is always visible
    ids = tiny.encode(f"0 0 \\boxed{{ {tiny.dataset[0]['answer']} }}")
    trainer = trainer_of(
        tiny, tmp_path, prompts=1, n=n, tau_gate=tau, guidance=Guides({uid: tiny.guide(uid, token_ids=ids)})
    )
    trainer.train()
    (batch,) = trainer.generated
    expected = [write({"uid": uid}, slot) for slot in range(n)]
    if replaced:
        expected[n - 1] = ids
    assert responses(batch) == expected
    assert batch["is_guide"].tolist() == [False] * (n - 1) + [replaced]


@pytest.mark.parametrize(
    "extra",
    [["<|im_start|>", "<|unk|>"], ["<|endoftext|>"], ["user", "user", "<|video_pad|>"]],
    ids=["special tokens", "the padding token", "a template word twice"],
)
def test_guide_is_never_tokenised_again(tmp_path, extra):
    """Ids that decoding and encoding would change arrive as they are, and the mask covers them all."""
    tiny = world("text")
    tokenizer = tokenizer_of(tiny.processor)
    (uid,) = _uids(tiny, 1)
    solution = tiny.encode(f"\\boxed{{ {tiny.dataset[0]['answer']} }}")
    ids = [*solution[:-1], *tokenizer.convert_tokens_to_ids(extra), tokenizer.eos_token_id]
    again = tokenizer(tokenizer.decode(ids, skip_special_tokens=True))["input_ids"]
    assert again != ids and [*again, tokenizer.eos_token_id] != ids
    trainer = trainer_of(tiny, tmp_path, prompts=1, guidance=Guides({uid: tiny.guide(uid, token_ids=ids)}))
    trainer.train()
    batch = trainer.generated[0]
    assert responses(batch)[3] == ids
    assert [ids in responses(inputs) for _, inputs in trainer.loss_calls] == [True]


def _refused_guide(case: str, tiny: TinyWorld, uid: str, other: str) -> Trajectory:
    solution = tiny.solution(uid)
    return {
        "another prompt's": lambda: tiny.guide(other),
        "marked wrong": lambda: tiny.guide(uid, correct=False),
        "too long": lambda: tiny.guide(uid, token_ids=[solution[0]] * (WIDTH + 1 - len(solution)) + solution),
        "without end of sequence": lambda: tiny.guide(uid, token_ids=solution[:-1]),
        "empty": lambda: tiny.guide(uid, token_ids=[]),
        "with too few log-probs": lambda: tiny.guide(uid, logps=(-1.0,)),
        "longer than its end": lambda: tiny.guide(uid, token_ids=[*solution, solution[0], solution[-1]]),
    }[case]()


@pytest.mark.parametrize(
    "case",
    [
        "another prompt's",
        "marked wrong",
        "too long",
        "without end of sequence",
        "empty",
        "with too few log-probs",
        "longer than its end",
    ],
)
def test_injection_refuses_a_guide_that_is(tmp_path, case):
    """A source of one's own need not check as GuidanceCache does; the trainer does, before the loss."""
    tiny = world("text")
    uid, other = _uids(tiny, 2)
    trainer = trainer_of(tiny, tmp_path, prompts=1, guidance=Guides({uid: _refused_guide(case, tiny, uid, other)}))
    with pytest.raises(GuidanceRefused, match=uid):
        trainer.train()
    assert trainer.loss_calls == []


def test_a_longest_guide_fits(tmp_path):
    tiny = world("text")
    (uid,) = _uids(tiny, 1)
    solution = tiny.solution(uid)
    ids = [solution[0]] * (WIDTH - len(solution)) + solution
    trainer = trainer_of(tiny, tmp_path, prompts=1, guidance=Guides({uid: tiny.guide(uid, token_ids=ids)}))
    trainer.train()
    assert responses(trainer.generated[0])[3] == ids


def test_sampler_log_probs_of_a_replaced_row_are_unknown(tmp_path, monkeypatch):
    """As with vLLM, which returns log-probs: TRL's mismatch ratio is 1 on the guide row, and is not on the others."""
    tiny = world("text")
    uid = _uids(tiny, 1)[0]

    def rigged(self, prompt_ids, *args, **kwargs):
        ids = [tiny.mistake(uid) for _ in prompt_ids]
        return ids, [[-0.7] * len(row) for row in ids]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", rigged)
    trainer = trainer_of(tiny, tmp_path, prompts=1, guidance=Guides({uid: tiny.guide(uid)}))
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = "token_truncate"
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = None, 3.0
    output = trainer._generate_and_score_completions([tiny.dataset[0]] * 4)
    length = len(tiny.guide(uid).token_ids)
    assert output["importance_sampling_ratio"][3, :length].tolist() == [1.0] * length
    assert (output["importance_sampling_ratio"][:3, :length] - 1).abs().min() > 0.01
    assert output["sampling_per_token_logps"][3, :length].isnan().all()


# Several guides, appended places, replayed prompts


def _pool(tiny: TinyWorld, uid: str, guides: int) -> ReplayPool:
    """Guides of one prompt that write the answer after 0, 1, 2, … words."""
    answer = dict(zip(tiny.dataset["uid"], tiny.dataset["answer"], strict=True))[uid]
    pool = ReplayPool([tiny.processor.eos_token_id], WIDTH, tokenizer_digest(tiny.processor))
    for extra in range(guides):
        pool.add(tiny.guide(uid, token_ids=tiny.encode(f"{'0 ' * extra}\\boxed{{ {answer} }}")))
    return pool


def test_several_guides_replace_the_last_slots(tmp_path, monkeypatch):
    tiny = world("text")
    uid, other = _uids(tiny, 2)
    rig(monkeypatch, correct_in(tiny, {uid: [2]}))
    trainer = trainer_of(tiny, tmp_path, prompts=2, guidance=_pool(tiny, uid, 3), guides_per_group=2)
    trainer.rollout_sink, trainer.record_rollouts = (tables := {}).__setitem__, True
    trainer.train()
    (batch,) = trainer.generated
    assert batch["is_guide"].nonzero().flatten().tolist() == [2, 3]
    assert batch["is_own"].sum() == 6
    log = trainer.state.log_history[0]
    assert (log["npo/replaced_slots"], log["npo/pass_rate"], log["npo/gated_groups"]) == (2, 1 / 8, 1.0)
    assert [row["overwritten_correct"] for row in tables[1]] == [None, None, True, False] + [None] * 4
    assert trainer.group_pass_rates == {uid: 0.25, other: 0.0}


def test_appended_places_do_not_count_for_the_gate(tmp_path, monkeypatch):
    """2 of the 4 rollouts of the policy are right: a pass rate of 0.5, not 2 of 6."""
    tiny = world("text")
    (uid,) = _uids(tiny, 1)
    rig(monkeypatch, correct_in(tiny, {uid: [0, 3, 4, 5]}))  # what is sampled in the last two places is thrown away
    for tau, guides in ((0.4, 0), (0.5, 2)):
        trainer = trainer_of(
            tiny,
            tmp_path,
            prompts=1,
            n=6,
            guidance=_pool(tiny, uid, 2),
            guides_per_group=2,
            placement="append",
            tau_gate=tau,
        )
        trainer.train()
        (batch,) = trainer.generated
        assert int(batch["is_guide"].sum()) == guides
        assert responses(batch)[:4] == [tiny.solution(uid), tiny.mistake(uid), tiny.mistake(uid), tiny.solution(uid)]
        log = trainer.state.log_history[0]
        assert (log["npo/pass_rate"], log["npo/reward"]) == (0.5, 0.5)
        # r = ½ and A = ±½/(std + 1e-4) over 4 rows; with two right guides 2/3 over 6
        assert batch["advantages"][0].item() == pytest.approx(
            (1 / 3) / ((4 / 15) ** 0.5 + 1e-4) if guides else 0.5 / ((1 / 3) ** 0.5 + 1e-4), rel=1e-5
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_places_carry_no_gradient_in_any_layout(tmp_path, monkeypatch, layout):
    """Nothing of a void row reaches the weights: another token there gives the same gradient to the bit."""
    tiny = world("text")
    rig(monkeypatch, correct_in(tiny, {uid: [0] for uid in _uids(tiny, 4)}))
    per_device, accumulation, per_generation = LAYOUTS[layout]
    found = []
    for filler in (tiny.processor.eos_token_id, 7):
        gradients = Gradients()
        trainer = trainer_of(
            tiny,
            tmp_path,
            guidance=Guides(),
            placement="append",
            callbacks=[gradients],
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=per_generation,
        )
        trainer.eos_token_ids = [filler, *trainer.eos_token_ids]
        trainer.train()
        (batch,) = trainer.generated
        assert [ids for row, ids in enumerate(responses(batch)) if row % 4 == 3] == [[filler]] * (
            len(batch["uids"]) // 4
        )
        assert not batch["advantages"][3::4].any() and batch["advantages"].any()
        found.append(gradients.steps[0])
    _assert_same_bits(*found)
    assert any(gradient.any() for gradient in found[0].values())


def test_empty_places_are_in_no_mean_of_the_loss(tmp_path, monkeypatch):
    """Without advantages the entropy bonus is all of the loss: the mean over what the policy sampled, and dapo counts
    the same tokens."""
    tiny = world("text")
    rig(monkeypatch, correct_in(tiny, {}))
    gradients = Gradients()
    trainer = trainer_of(
        tiny, tmp_path, guidance=Guides(), placement="append", entropy_coef=0.5, loss_type="dapo", max_grad_norm=1e9,
        callbacks=[gradients],
    )  # fmt: skip
    trainer.train()
    (batch,) = trainer.generated
    own = batch["completion_mask"].bool() & batch["is_own"].unsqueeze(1)
    assert not batch["is_own"][3::4].any() and batch["is_own"].sum() == 12
    assert batch["num_items_in_batch"] == own.sum()
    model = tiny.build()
    logs = log_probs(model, batch)
    entropy = -(logs.exp() * logs).sum(-1)[own].mean()
    (-0.5 * entropy).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-7)
    log = trainer.state.log_history[0]
    assert log["entropy"] == pytest.approx(entropy.item(), rel=1e-5) == log["npo/entropy"]


def test_the_table_holds_responses_that_are_kept_out_of_the_loss(tmp_path, monkeypatch):
    """mask_truncated_completions takes them out of TRL's mask; they were sampled and judged all the same."""
    tiny = world("text")

    def write(row, slot):
        return tiny.solution(row["uid"])[:-1] if slot == 1 else tiny.mistake(row["uid"])

    rig(monkeypatch, write)
    trainer = trainer_of(tiny, tmp_path, guidance=Guides(), mask_truncated_completions=True)
    trainer.rollout_sink, trainer.record_rollouts = (tables := {}).__setitem__, True
    trainer.train()
    cut = [row for row in tables[1] if row["slot"] == 1]
    assert [row["token_ids"] for row in cut] == [tiny.solution(row["uid"])[:-1] for row in cut]
    assert all(row["correct"] and not row["ended"] and "\\boxed" in row["text"] for row in cut)
    assert all(row["current_logps"] == row["ratio"] == [] for row in cut)
    assert all(len(row["ratio"]) == len(row["token_ids"]) for row in tables[1] if row["slot"] != 1)


def test_a_batch_of_nothing_but_empty_places_does_not_spoil_the_metrics(tmp_path):
    """per_device_train_batch_size=1 puts each void row into a micro-batch of its own."""
    trainer = trainer_of(
        world("text"),
        tmp_path,
        guidance=Guides(),
        placement="append",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        entropy_coef=0.001,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert math.isfinite(log["npo/entropy"]) and math.isfinite(log["loss"])
    assert all(value.isfinite().all() for value in _weights(trainer).values())


class Replaying(Guides):
    """Guides and a fixed exchange of prompts; keeps what it is asked and told."""

    def __init__(self, guides, exchange):
        super().__init__(guides)
        self.exchange, self.asked, self.told = exchange, [], []

    def replay(self, uids, policy_step, entropies):
        self.asked.append((list(uids), policy_step))
        return self.exchange

    def observe(self, policy_step, rows):
        self.told.append((policy_step, [dict(row) for row in rows]))

    def save(self, folder): ...

    def restore(self, folder): ...


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replayed_prompt_takes_the_place_of_another_and_its_table_comes_after_the_loss(tmp_path, monkeypatch, layout):
    tiny = world("text")
    other = tiny.dataset[9]
    source = Replaying({other["uid"]: tiny.guide(other["uid"])}, {0: other})
    rig(monkeypatch, correct_in(tiny, {other["uid"]: [1]}))
    per_device, accumulation, per_generation = LAYOUTS[layout]
    trainer = trainer_of(
        tiny,
        tmp_path,
        steps=per_generation // accumulation,
        guidance=source,
        eval_dataset=tiny.dataset.select(range(4)),
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
    )
    trainer.train()
    assert source.asked == [(_uids(tiny, 4), 0)]
    ((step, rows),) = source.told
    assert step == 1 and [row["uid"] for row in rows] == [
        uid for uid in (other["uid"], *_uids(tiny, 4)[1:]) for _ in range(4)
    ]
    assert rows[3]["source"] == "guide" and rows[3]["reward"] == 1.0, "verified against its own answer"
    assert [row["correct"] for row in rows[:4]] == [False, True, False, True]
    assert all(len(row["ratio"]) == len(row["token_ids"]) for row in rows), "every row has been in the loss"
    assert trainer.group_pass_rates[other["uid"]] == 0.25
    monkeypatch.undo()
    trainer.evaluate()
    assert len(source.asked) == len(source.told) == 1, "an evaluation replays nothing"


# Metrics


@pytest.fixture
def rigged_metrics(tmp_path, monkeypatch):
    """One step on four groups of 4: all wrong, half right, three right, all wrong without a guide."""
    tiny = world("text")
    wrong, half, solved, unguided = _uids(tiny, 4)
    slots = {wrong: [], half: [0, 3], solved: [0, 1, 3], unguided: []}
    rig(monkeypatch, correct_in(tiny, slots))
    trainer = trainer_of(tiny, tmp_path, guidance=Guides({uid: tiny.guide(uid) for uid in (wrong, half, solved)}))
    trainer.train()
    return trainer, slots


def test_group_metrics_are_those_of_the_policy_alone(rigged_metrics):
    trainer, slots = rigged_metrics
    log = trainer.state.log_history[0]
    assert log["npo/pass_rate"] == pytest.approx((0 + 2 + 3 + 0) / 16)
    assert log["npo/all_wrong_groups"] == 2 / 4
    assert log["npo/gated_groups"] == 3 / 4, "also the one without a guide"
    assert log["npo/replaced_slots"] == 2
    # the guides took a wrong rollout and a right one: 14 rows of the policy are left, 1 + 3 of them right
    assert log["npo/reward"] == pytest.approx(4 / 14)
    assert log["reward"] == pytest.approx(6 / 16), "TRL's own figure holds the guides"
    assert trainer.group_pass_rates == {uid: len(right) / 4 for uid, right in slots.items()}


def test_entropy_is_the_full_vocabulary_one_of_on_policy_tokens(rigged_metrics):
    trainer, _ = rigged_metrics
    log = trainer.state.log_history[0]
    (_, batch) = trainer.loss_calls[0]
    with torch.no_grad():
        scores = log_probs(world("text").build(), batch)
    entropy = -(scores.exp() * scores).sum(-1)
    mask = batch["completion_mask"].bool()
    own = mask & ~batch["is_guide"].unsqueeze(1)
    assert batch["is_guide"].sum() == 2
    assert log["npo/entropy"] == pytest.approx(entropy[own].mean().item(), rel=1e-5)
    assert log["entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-5)
    assert abs(log["npo/entropy"] - log["entropy"]) > 1e-4, "a guide row would move the figure"


def test_guide_metrics_are_means_over_guide_tokens(rigged_metrics):
    trainer, _ = rigged_metrics
    log = trainer.state.log_history[0]
    (_, batch) = trainer.loss_calls[0]
    with torch.no_grad():
        logps = token_log_probs(world("text").build(), batch)
    guide = batch["is_guide"]
    log_weight = (logps - batch["guide_logps"])[guide][batch["completion_mask"][guide].bool()].double()
    weight = log_weight.exp()
    assert log["npo/guide_kl"] == pytest.approx(-log_weight.mean().item(), rel=1e-4)
    assert log["npo/guide_ratio"] == pytest.approx(weight.mean().item(), rel=1e-4)
    ess = weight.sum().square() / weight.square().sum() / len(weight)
    assert log["npo/guide_ess"] == pytest.approx(ess.item(), rel=1e-4)


def test_without_a_guide_there_are_no_guide_metrics_and_without_a_verifier_no_pass_rate(tmp_path):
    trainer = trainer_of(world("text"), tmp_path, verifier=None)
    trainer.train()
    names = {name for name in trainer.state.log_history[0] if name.startswith("npo/")}
    assert names == {"npo/reward", "npo/replaced_slots", "npo/entropy"}


def test_a_micro_batch_that_holds_only_a_guide_does_not_spoil_the_entropy(tmp_path):
    """per_device_train_batch_size=1, usual for large policies, puts the guide into a micro-batch of its own."""
    tiny = world("text")
    trainer = trainer_of(
        tiny, tmp_path, guidance=_all_guided(tiny), per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    trainer.train()
    assert sum(bool(batch["is_guide"].all()) for _, batch in trainer.loss_calls) == 1
    assert math.isfinite(trainer.state.log_history[0]["npo/entropy"])


# Gradients of the real step against the written-out objective


def _written_out_loss(
    model, batch, never: list[int], mode: str, loss_type: str, accumulation: int, per_generation: int
) -> torch.Tensor:
    """The objective of the paper, with autograd through a plain forward pass; signs and normalisers as TRL's."""
    logps = token_log_probs(model, batch, never)
    advantages = batch["advantages"].unsqueeze(1)

    def clipped(ratio):
        return torch.min(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH) * advantages)

    on_policy = clipped((logps - batch.get("old_per_token_logps", logps.detach())).exp())
    rho = (logps - batch["guide_logps"]).exp()
    guide = {
        "current": on_policy,
        "exact": clipped(rho),
        "truncated": rho.detach().clamp(max=TRUNCATION) * advantages * logps,
        "shaped": rho / (rho + GAMMA) * advantages,
    }[mode]
    mask = batch["completion_mask"]
    terms = torch.where(batch["is_guide"].unsqueeze(1), guide, on_policy) * mask
    if loss_type == "grpo":
        return -(terms.sum(1) / mask.sum(1)).mean() / accumulation
    return -terms.sum() / (batch["num_items_in_batch"] * accumulation / per_generation)


@torch.no_grad()
def _guide_ratios(model, batch, never: list[int]) -> list[float]:
    """π/q of every token of the guides."""
    rho = (token_log_probs(model, batch, never) - batch["guide_logps"]).exp()
    return rho[batch["is_guide"].unsqueeze(1) & batch["completion_mask"].bool()].tolist()


@pytest.mark.parametrize("mode", RATIO_MODES)
@pytest.mark.parametrize(
    ("name", "layout", "loss_type", "sign"),
    [
        ("text", "one batch", "grpo", 1),
        ("text", "one batch", "grpo", -1),
        ("text", "gradient accumulation", "grpo", 1),
        ("text", "steps_per_generation above it", "grpo", 1),
        ("text", "gradient accumulation", "dapo", 1),
        ("text", "steps_per_generation above it", "dapo", 1),
        ("pictures", "steps_per_generation above it", "grpo", 1),
    ],
)
def test_gradient_of_every_step_is_that_of_the_objective(tmp_path, monkeypatch, name, layout, loss_type, sign, mode):
    """Two optimiser steps. Every gradient, for every ratio mode, with advantages of both signs on the guide, whose
    tokens have ratios below and above all bounds, so that each bound cuts some tokens and lets others through."""
    tiny = world(name)
    uids = _uids(tiny, 8)
    rig(monkeypatch, correct_in(tiny, dict(zip(uids, [[0], [1, 2], [0, 1, 2], []] * 2, strict=True))))
    per_device, accumulation, per_generation = LAYOUTS[layout]
    gradients = Gradients()
    trainer = trainer_of(
        tiny,
        tmp_path,
        steps=2,
        callbacks=[gradients],
        guidance=_all_guided(tiny),
        reward=lambda completions, answer, **_: [
            sign * float(VERIFIER(text[0]["content"], {"answer": wanted}).correct)
            for text, wanted in zip(completions, answer, strict=True)
        ],
        ratio_mode=mode,
        ratio_truncation=TRUNCATION,
        ratio_gamma=GAMMA,
        loss_type=loss_type,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        max_grad_norm=0.0,
        **CLIP,
    )
    trainer.train()
    assert len(gradients.steps) == 2 and len(trainer.loss_calls) == 2 * accumulation
    guides = sum(int(batch["is_guide"].sum()) for _, batch in trainer.loss_calls)
    assert guides == (6 if layout != "steps_per_generation above it" else 3)
    ratios = []
    never = [] if name == "text" else [tiny.processor.image_token_id]
    for step, found in enumerate(gradients.steps):
        model = tiny.build()
        model.load_state_dict(trainer.loss_calls[step * accumulation][0])
        for _, batch in trainer.loss_calls[step * accumulation : (step + 1) * accumulation]:
            ratios += _guide_ratios(model, batch, never)
            _written_out_loss(model, batch, never, mode, loss_type, accumulation, per_generation).backward()
        expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        scale = max(gradient.abs().max() for gradient in expected.values())
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=float(scale) * 1e-4, msg=key)
    assert min(ratios) < GAMMA and max(ratios) > TRUNCATION


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["text", "pictures"])
def test_guide_rows_keep_their_log_probs_through_shuffling_and_splitting(tmp_path, name, layout):
    tiny = world(name)
    per_device, accumulation, per_generation = LAYOUTS[layout]
    trainer = trainer_of(
        tiny,
        tmp_path,
        steps=4,
        guidance=_all_guided(tiny),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
    )
    trainer.train()
    assert len(trainer.loss_calls) == 4 * accumulation
    known = {guide.token_ids: guide for guide in trainer.guidance.values()}
    seen = 0
    for _, batch in trainer.loss_calls:
        for row, ids in enumerate(responses(batch)):
            logps = batch["guide_logps"][row]
            if batch["is_guide"][row]:
                assert logps[: len(ids)].tolist() == pytest.approx(known[tuple(ids)].logps)
                assert not logps[len(ids) :].any()
                seen += 1
            else:
                assert not logps.any()
    assert seen == len(trainer.generated) * 4


@pytest.mark.parametrize("mode", RATIO_MODES)
def test_several_iterations_over_a_batch_run_in_every_mode(tmp_path, mode):
    """num_iterations=2: the second pass meets a changed policy and the log-probs of the sampling one."""
    tiny = world("text")
    trainer = trainer_of(tiny, tmp_path, steps=4, guidance=_all_guided(tiny), num_iterations=2, ratio_mode=mode)
    trainer.train()
    assert len(trainer.generated) == 2 and all("old_per_token_logps" in batch for _, batch in trainer.loss_calls)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


# A policy whose gradient can be enumerated


SEED = 11
"""A draw with ratios on both sides of clip and truncation, for rewards of both signs; a test checks the first part."""


class Enumeration:
    """Every response of `length` tokens over 4 words, with a reward each, a policy and a behaviour policy."""

    def __init__(self, length: int):
        generator = torch.Generator().manual_seed(SEED)
        self.length = length
        self.sequences = torch.tensor(list(itertools.product(range(4), repeat=length)))
        self.rewards = torch.randn(len(self.sequences), generator=generator)
        self.policy = TabularPolicy(torch.randn(4, 4, generator=generator))
        behaviour = TabularPolicy(torch.randn(4, 4, generator=generator))
        self.behaviour_logps = behaviour.sequence_logps(self.sequences).detach()

    def probabilities(self) -> torch.Tensor:
        return self.policy.sequence_logps(self.sequences).sum(1).exp()

    def loss_gradient(self, trainer, guided: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Gradient of the trainer's own loss when sequence i has probability weight `weight[i]`: `[4, 4]`."""
        rows = len(self.sequences)
        ones = torch.ones(rows, 1, dtype=torch.long)
        # the loss is a mean over rows and tokens, so this advantage makes it a sum with the given weights
        inputs = {
            "prompt_ids": ones * 0,
            "prompt_mask": ones,
            "completion_ids": self.sequences,
            "completion_mask": torch.ones_like(self.sequences),
            "advantages": rows * self.length * weight * self.rewards,
            "num_items_in_batch": torch.tensor(self.sequences.numel()),
            "is_guide": guided,
            "is_own": ~guided,
            "guide_logps": torch.where(guided.unsqueeze(1), self.behaviour_logps, 0.0),
        }
        trainer.current_gradient_accumulation_steps = 1  # set by the training loop otherwise
        (gradient,) = torch.autograd.grad(trainer._compute_loss(self.policy, inputs), [self.policy.logits])
        return gradient

    def gradient_of(self, objective: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(objective, [self.policy.logits])[0]


def _tabular_trainer(folder, mode: str, **arguments):
    return trainer_of(world("text"), folder, NPOTrainer, ratio_mode=mode, **{**CLIP, **arguments})


@pytest.mark.parametrize("mode", RATIO_MODES)
def test_on_policy_rows_give_the_exact_policy_gradient_in_every_mode(tmp_path, mode):
    world_of = Enumeration(2)
    exact = world_of.gradient_of((world_of.probabilities() * world_of.rewards).sum())
    nobody = torch.zeros(len(world_of.sequences), dtype=torch.bool)
    found = world_of.loss_gradient(_tabular_trainer(tmp_path, mode), nobody, world_of.probabilities().detach())
    torch.testing.assert_close(found, -exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [("exact", {"epsilon": 0.999, "epsilon_high": 1e6}), ("truncated", {"ratio_truncation": 1e6})],
)
def test_an_unbounded_ratio_makes_guides_the_exact_policy_gradient(tmp_path, mode, settings):
    """One-token responses sampled from q: E_q[ρ R ∇log π] is ∇E_π[R], although q is another policy."""
    world_of = Enumeration(1)
    exact = world_of.gradient_of((world_of.probabilities() * world_of.rewards).sum())
    everybody = torch.ones(len(world_of.sequences), dtype=torch.bool)
    behaviour = world_of.behaviour_logps.sum(1).exp()
    found = world_of.loss_gradient(_tabular_trainer(tmp_path, mode, **settings), everybody, behaviour)
    torch.testing.assert_close(found, -exact, rtol=1e-4, atol=1e-6)
    # and without the correction it is another gradient
    biased = world_of.loss_gradient(_tabular_trainer(tmp_path, "current"), everybody, behaviour)
    assert (biased + exact).abs().max() > 0.05


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("mode", RATIO_MODES)
def test_guide_rows_give_the_gradient_of_the_enumerated_objective(tmp_path, mode, length):
    """Expectation over q of each mode's objective, differentiated as a whole through the enumeration."""
    world_of = Enumeration(length)
    behaviour = world_of.behaviour_logps.sum(1).exp()
    logps = world_of.policy.sequence_logps(world_of.sequences)
    rho = (logps - world_of.behaviour_logps).exp()
    rewards = world_of.rewards.unsqueeze(1)
    terms = {
        "current": rewards * logps,
        "exact": torch.min(rho * rewards, rho.clamp(1 - EPSILON, 1 + EPSILON_HIGH) * rewards),
        "truncated": rewards * rho.detach().clamp(max=TRUNCATION) * logps,
        "shaped": rewards * rho / (rho + GAMMA),
    }[mode]
    expected = world_of.gradient_of((behaviour * terms.sum(1)).sum())
    everybody = torch.ones(len(world_of.sequences), dtype=torch.bool)
    found = world_of.loss_gradient(_tabular_trainer(tmp_path, mode), everybody, behaviour)
    torch.testing.assert_close(found, -expected, rtol=1e-4, atol=1e-6)
    assert (rho > TRUNCATION).any() and (rho < 1 - EPSILON).any()


def test_the_whole_step_over_all_groups_is_the_exact_policy_gradient(tmp_path, monkeypatch):
    """Every group of two tokens is equally likely under a uniform policy, so a batch that holds each once is the exact
    expectation of a GRPO step: rewards, centred advantages and loss together give (1 − 1/n) ∇E[R]."""
    tiny = uniform_world([{"uid": f"{i}-{j}"} for i in range(12) for j in range(12)])
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(3))
    rig(monkeypatch, lambda row, slot: [int(row["uid"].split("-")[slot])])
    gradients = Gradients()
    trainer = trainer_of(
        tiny,
        tmp_path,
        prompts=144,
        n=2,
        reward=lambda completion_ids, **_: [rewards[ids[0]].item() for ids in completion_ids],
        scale_rewards="none",
        max_completion_length=2,
        max_grad_norm=0.0,
        callbacks=[gradients],
    )
    trainer.train()
    model = tiny.build()
    (prompt_logps(tiny, model)[0].exp() @ rewards).backward()
    torch.testing.assert_close(
        gradients.steps[0]["lm_head.weight"], -0.5 * model.lm_head.weight.grad, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("mode", RATIO_MODES)
def test_the_whole_guided_step_over_all_groups_is_the_enumerated_mixture(tmp_path, monkeypatch, mode):
    """Groups of two: slot 1 enumerates every token, slot 2 is the guide "a" + end. With centred rewards 0 or 1 the
    expected step is ½ Σ_y π(y) [½(R(y) − 1) ∇log π(y) + ½(1 − R(y)) · mean over guide tokens of c ∇log π]."""
    tiny = uniform_world([{"uid": str(i)} for i in range(12)])
    word, end = tiny.processor.convert_tokens_to_ids("a"), tiny.processor.eos_token_id
    logps = (math.log(1 / 12) - 0.9, math.log(1 / 12) + 2.5)  # ρ = 2.46 and 0.082
    guides = Guides({str(i): Trajectory(str(i), (word, end), logps, 9, True, "a") for i in range(12)})
    rig(monkeypatch, lambda row, slot: [int(row["uid"])])
    gradients = Gradients()
    trainer = trainer_of(
        tiny,
        tmp_path,
        prompts=12,
        n=2,
        reward=lambda completion_ids, **_: [float(ids[0] == word) for ids in completion_ids],
        verifier=lambda text, row: Verdict.CORRECT if text.strip() == "a" else Verdict.WRONG,
        guidance=guides,
        tau_gate=1.0,
        ratio_mode=mode,
        scale_rewards="none",
        max_completion_length=2,
        max_grad_norm=0.0,
        callbacks=[gradients],
        **CLIP,
    )
    trainer.train()
    assert trainer.generated[0]["is_guide"].tolist() == [False, True] * 12
    high, low = math.exp(0.9), math.exp(-2.5)
    coefficients = {
        "current": (1.0, 1.0),
        "exact": (0.0, low),  # above the clip a positive advantage has no gradient
        "truncated": (TRUNCATION, low),
        "shaped": tuple(GAMMA * rho / (rho + GAMMA) ** 2 for rho in (high, low)),
    }[mode]
    model = tiny.build()
    first, second, _ = prompt_logps(tiny, model, (word, end))
    right = torch.zeros(12)
    right[word] = 1.0
    own = ((right - 1) / 2 * first).mean()
    guide = ((1 - right) / 2).mean() * (coefficients[0] * first[word] + coefficients[1] * second[end]) / 2
    (0.5 * (own + guide)).backward()
    torch.testing.assert_close(gradients.steps[0]["lm_head.weight"], -model.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


# Evaluation


def test_evaluation_replaces_nothing(tmp_path):
    tiny = world("text")
    trainer = trainer_of(
        tiny,
        tmp_path,
        guidance=_all_guided(tiny),
        eval_dataset=tiny.dataset.select(range(4)),
        per_device_eval_batch_size=4,
        num_generations_eval=2,
    )
    metrics = trainer.evaluate()
    assert len(trainer.generated) == 2
    assert not any(batch["is_guide"].any() for batch in trainer.generated)
    solutions = [tiny.solution(uid) for uid in tiny.dataset["uid"]]
    assert not any(ids in solutions for batch in trainer.generated for ids in responses(batch))
    assert metrics["eval_reward"] == 0.0
    assert not any("npo/" in name for name in metrics)


def test_an_evaluation_stays_one_where_sampling_turns_training_on(tmp_path, monkeypatch):
    """As transformers' continuous batching does, behind TRL's back."""
    sample = GRPOTrainer._generate_single_turn

    def turned_on(self, *args, **kwargs):
        sampled = sample(self, *args, **kwargs)
        self.model.train()
        return sampled

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", turned_on)
    tiny = world("text")
    asked = {"eval_dataset": tiny.dataset.select(range(4)), "per_device_eval_batch_size": 4, "num_generations_eval": 2}
    trainer = trainer_of(tiny, tmp_path, guidance=_all_guided(tiny), **asked)
    trainer.evaluate()
    assert len(trainer.generated) == 2 and not any(batch["is_guide"].any() for batch in trainer.generated)
    assert not any("npo/" in name for name in trainer._metrics["train"]) and not trainer.model.training


def test_evaluation_between_steps_leaves_training_as_it_was(tmp_path, monkeypatch):
    """Also in the middle of a generation batch: same weights, same training metrics as without evaluation."""
    # an evaluation's data loader draws from the global random state, which orders the rows of the next batch
    monkeypatch.setattr(trl.trainer.grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)
    tiny = world("text")
    uids = _uids(tiny, 12)
    rig(monkeypatch, correct_in(tiny, dict(zip(uids, [[0], [1, 2], [], []] * 3, strict=True))))
    ends = []
    for extra in ({}, {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}):
        trainer = trainer_of(
            tiny,
            tmp_path,
            steps=4,
            guidance=_all_guided(tiny),
            eval_dataset=tiny.dataset.select(range(4)),
            ratio_mode="exact",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            **extra,
        )
        trainer.train()
        logged = [
            {name: value for name, value in entry.items() if name.startswith("npo/") or name == "loss"}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        ends.append((_weights(trainer), logged, len(trainer.generated)))
    _assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert ends[1][2] > ends[0][2]


# Rollout tables


def test_rollout_table_holds_every_row_with_its_source_and_ratio(tmp_path, monkeypatch):
    tiny = world("text")
    guided, solved = _uids(tiny, 2)
    rig(monkeypatch, correct_in(tiny, {guided: [3], solved: [0, 1, 2]}))
    tables = {}
    trainer = trainer_of(tiny, tmp_path, prompts=2, guidance=Guides({guided: tiny.guide(guided)}))
    trainer.rollout_sink = tables.__setitem__
    trainer.record_rollouts = True
    trainer.train()
    rows = tables[1]
    json.dumps(rows)
    assert [(row["uid"], row["group"], row["slot"]) for row in rows] == [
        (uid, group, slot) for group, uid in enumerate((guided, solved)) for slot in range(4)
    ]
    assert [row["source"] for row in rows] == ["policy"] * 3 + ["guide"] + ["policy"] * 4
    guide, own = rows[3], rows[0]
    trajectory = tiny.guide(guided)
    assert guide["token_ids"] == list(trajectory.token_ids) and guide["guide_step"] == 30
    assert guide["overwritten_ids"] == tiny.solution(guided) and guide["overwritten_correct"] is True
    assert guide["behaviour_logps"] == list(trajectory.logps)
    assert guide["ratio"] == pytest.approx(
        [math.exp(p - q) for p, q in zip(guide["current_logps"], trajectory.logps, strict=True)], rel=1e-4
    )
    assert own["ratio"] == pytest.approx([1.0] * len(own["token_ids"]))
    assert (guide["reward"], own["reward"]) == (1.0, 0.0) and guide["advantage"] > 0 > own["advantage"]
