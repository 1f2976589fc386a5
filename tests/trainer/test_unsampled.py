"""What sampling never draws has no part in loss and scores: both are those of the distribution that is sampled."""

from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig
from trl.trainer.utils import add_fused_lm_head
from worlds import VERIFIER, Gradients, Guides, SpyTrainer, log_probs, qwen3, trainer_of, world

from npo_core.control.factory import Training
from npo_core.guidance.trajectories import GuidanceRefused
from npo_core.runs.config import resolve_config
from npo_core.trainer.inputs import Sampling, encode_prompts
from npo_core.trainer.pictures import left_out, left_out_of_loss, never_drawn, never_sampled, picture_tokens
from npo_core.trainer.sampling import completion_entropies, completion_logps, sample_rollouts
from npo_core.trainer.trainer import NPOTrainer

OTHER = 7
"""A word that a policy is told never to write."""
TOLD = {"generation_kwargs": {"suppress_tokens": [OTHER]}}
KINDS = {
    "pictures": ("pictures", {}, []),
    "words": ("words", {}, []),
    "a text policy that is told so": ("text", TOLD, [OTHER]),
    "a text policy with bad words": ("text", {"generation_kwargs": {"bad_words_ids": [[OTHER], [8, 9]]}}, [OTHER]),
    "pictures, and told so": ("pictures", TOLD, [OTHER]),
}
"""World, arguments, and what a user forbids; the picture's token is forbidden to those that read pictures."""


class Scores(SpyTrainer):
    """Keeps the log-probs and entropies of each loss call."""

    scores = ()

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self.scores = (*self.scores, [each.detach() for each in found[:2]])
        return found


def step(folder, kind: str, **arguments):
    """One step, the policy with which it began, the tokens that are never drawn, and the gradients."""
    name, given, never = KINDS[kind]
    tiny, gradients = world(name), Gradients()
    trainer = trainer_of(
        tiny,
        folder,
        Scores,
        prompts=2,
        reward=lambda completions, **_: [float(place) for place in range(len(completions))],
        callbacks=[gradients],
        max_grad_norm=0.0,
        **given,
        **arguments,
    )
    trainer.train()
    weights, batch = trainer.loss_calls[0]
    model = tiny.build()
    model.load_state_dict(weights)
    never = never if name == "text" else [*never, tiny.processor.image_token_id]
    return trainer, model, batch, never, gradients.steps[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_sees_the_distribution_that_is_sampled(tmp_path, kind, masked):
    trainer, model, batch, never, _ = step(tmp_path, kind, mask_unsampled=masked)
    with torch.no_grad():
        scores = log_probs(model, batch)
    assert (scores[..., never].exp().amax((0, 1)) > 1e-3).all(), "else there is nothing to leave out"
    if masked:
        scores[..., never] = -torch.inf
        scores = scores.log_softmax(-1)
    mask = batch["completion_mask"].bool()
    assert not torch.isin(batch["completion_ids"][mask], torch.tensor(never)).any()
    logps, entropies = trainer.scores[0]
    expected = scores.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logps[mask], expected[mask], atol=2e-5, rtol=0)
    torch.testing.assert_close(entropies[mask], torch.special.entr(scores.exp()).sum(-1)[mask], atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_moves_the_logit_of_what_is_never_drawn(tmp_path, kind):
    """The row of the head alone: a prompt holds the token as a place for a picture's own vectors, or not at all."""
    for masked in (True, False):
        _, model, _, never, gradient = step(tmp_path, kind, mask_unsampled=masked)
        name = next(name for name, value in model.named_parameters() if value is model.get_output_embeddings().weight)
        assert gradient[name].abs().sum() > 0
        assert {bool(gradient[name][token].any()) for token in never} == {not masked}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False])
def test_scores_off_line_are_those_of_the_loss(tmp_path, kind, masked):
    trainer, model, batch, never, _ = step(tmp_path, kind, mask_unsampled=masked)
    tiny, sampling = world(KINDS[kind][0]), Training.of(trainer).sampling
    assert sorted(sampling.left_out(model, tiny.processor)) == (sorted(never) if masked else [])
    mask = batch["completion_mask"].bool()
    completions = [ids[real].tolist() for ids, real in zip(batch["completion_ids"], mask, strict=True)]
    asked = list(tiny.dataset.select(range(2)))
    by_prompt = {tuple(encode_prompts(tiny.processor, [row])["input_ids"][0].tolist()): row for row in asked}
    prompts = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    rows = [by_prompt[tuple(ids[real].tolist())] for ids, real in prompts]
    logps, entropies = trainer.scores[0]
    asked = model, tiny.processor, rows, completions
    scored = completion_logps(*asked, unsampled=sampling.unsampled)
    for place, found in enumerate(scored):
        assert found == pytest.approx(logps[place][mask[place]].tolist(), abs=2e-5)
    means = completion_entropies(*asked, unsampled=sampling.unsampled)
    assert means == pytest.approx([float(entropies[i][mask[i]].mean()) for i in range(len(rows))], abs=5e-5)
    # what a controller samples is scored so too
    groups = sample_rollouts(
        model, tiny.processor, rows[:1], 2, VERIFIER, seed=0, max_new_tokens=4, **asdict(sampling)
    )  # fmt: skip
    for drawn in groups[0]:
        assert not set(drawn.token_ids) & set(never)
        again = completion_logps(model, tiny.processor, rows[:1], [drawn.token_ids], unsampled=never if masked else ())
        assert drawn.logps == pytest.approx(again[0], abs=2e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_a_replaying_source_is_told_the_entropies_of_the_loss(tmp_path, monkeypatch, masked):
    """ExGRPO chooses among own responses by their entropy."""
    tiny, asked = world("text"), []

    class Memory(Guides):
        def replay(self, uids, policy_step, entropies):
            asked.append(entropies([tiny.dataset[0]], [tiny.solution(tiny.dataset[0]["uid"])]))
            return {}

        def observe(self, step, rows):
            """Nothing is kept."""

        save = restore = observe

    trainer = trainer_of(tiny, tmp_path, NPOTrainer, prompts=1, guidance=Memory(), mask_unsampled=masked, **TOLD)
    trainer.train()
    row = tiny.dataset[0]
    expected = completion_entropies(
        tiny.build(), tiny.processor, [row], [tiny.solution(row["uid"])], unsampled=[OTHER] if masked else ()
    )
    assert asked[0] == pytest.approx(expected, abs=1e-5)


def test_what_never_is_drawn_follows_the_sampler():
    policy = SimpleNamespace(generation_config=GenerationConfig())

    def trainer(vllm: bool, given: dict | None, masked: bool = True):
        args = SimpleNamespace(mask_unsampled=masked, generation_kwargs=given)
        config = GenerationConfig(suppress_tokens=[5])
        return SimpleNamespace(args=args, use_vllm=vllm, generation_config=config, model=policy)

    processor = world("pictures").processor
    pictures = [processor.image_token_id, processor.video_token_id]
    assert left_out_of_loss(trainer(False, None)) == [5]
    assert left_out_of_loss(trainer(True, never_sampled(processor))) == pictures
    assert left_out_of_loss(trainer(True, {"logit_bias": {"3": -100, "4": -1.0}})) == [3], "as JSON names them"
    assert left_out_of_loss(trainer(True, None)) == left_out_of_loss(trainer(False, None, masked=False)) == []


@pytest.mark.parametrize(
    ("given", "own", "never"),
    [
        ({"suppress_tokens": [9, 5]}, {}, [5, 9]),
        ({}, {"suppress_tokens": [5]}, [5]),
        ({"suppress_tokens": [9]}, {"suppress_tokens": [5]}, [9]),
        ({"begin_suppress_tokens": [5]}, {}, []),
        ({"bad_words_ids": [[5], [6, 7], [2]]}, {}, [5]),
        ({"suppress_tokens": [9]}, {"bad_words_ids": [[5]]}, [5, 9]),
        ({"sequence_bias": {(5,): -100.0, (6,): 1.0, (7, 8): -100.0}}, {}, [5]),
        ({"sequence_bias": [[[5], -100.0], [[6], 1.0]]}, {}, [5]),
    ],
)
def test_what_has_no_chance_is_what_generate_never_draws(given, own, never):
    """Forbidden at some places only, or in longer ones, a token is drawn; an end of sequence is no bad word."""
    policy = qwen3(world("text").processor, eos_token_id=2)
    for name, value in own.items():
        setattr(policy.generation_config, name, value)
    settings = GenerationConfig(**given, eos_token_id=[2, 3], pad_token_id=0, max_new_tokens=40, do_sample=True)
    assert never_drawn(settings, policy) == never
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.zeros_(policy.lm_head.weight)  # every word is as likely
        ids = policy.generate(torch.full((256, 1), 4), generation_config=settings)[:, 1:]
    drawn = set(ids.flatten().tolist())
    assert not drawn & set(never)
    assert {2, 3, 5, 6, 7, 8, 9} - set(never) <= drawn


def test_guides_with_what_the_loss_leaves_out_are_refused(tmp_path):
    """Their log-probs would be those of a token without any chance."""
    tiny = world("text")
    uid = tiny.dataset[0]["uid"]
    guide = tiny.guide(uid)
    given = {"prompts": 1, "generation_kwargs": {"suppress_tokens": [guide.token_ids[0]]}}
    said = rf"tokens .*\[{guide.token_ids[0]}\]"
    cache = trainer_of(tiny, tmp_path, NPOTrainer, **given).new_cache()
    cache.add(guide)
    with pytest.raises(ValueError, match=f"cache holds 1 guides with {said}"):
        trainer_of(tiny, tmp_path, NPOTrainer, guidance=cache, **given)
    trainer = trainer_of(tiny, tmp_path, NPOTrainer, guidance=Guides({uid: guide}), **given)
    with pytest.raises(GuidanceRefused, match=f"holds the {said}"):
        trainer.train()
    trainer_of(tiny, tmp_path, NPOTrainer, guidance=cache, mask_unsampled=False, **given).train()


def test_a_plan_leaves_out_what_its_trainers_will(tmp_path):
    """Guides of another policy are sampled before there is a trainer."""
    processor, model = world("pictures").processor, world("pictures").build()

    def left(**changes):
        config = resolve_config("grpo", "smoke", overrides={"max_prompt_length": 64, **changes})
        sampling = Training.planned(config, processor).sampling
        return sampling.left_out(model, processor), sampling.settings(model, processor, 4).suppress_tokens

    image, both = [processor.image_token_id], picture_tokens(processor)
    assert left() == (image, image)
    assert left(mask_unsampled=False) == ([], image)
    assert left(vllm="colocate") == (both, both)
    assert left(vllm="colocate", mask_unsampled=False) == ([], both)


def test_what_vllm_never_draws_other_samplers_do_not_draw_either():
    class Trainer:
        use_vllm, temperature, top_p, top_k, min_p, repetition_penalty = True, 1.0, 1.0, 0, None, 1.0
        args = SimpleNamespace(mask_unsampled=True, generation_kwargs={"logit_bias": {"9": -100}, "seed": 3})

    tiny = world("pictures")
    sampling = Sampling.of(Trainer())
    assert sampling.left_out(tiny.build(), tiny.processor) == [9]
    drawn = sampling.settings(tiny.build(), tiny.processor, 4)
    assert drawn.suppress_tokens == [9, tiny.processor.image_token_id]


def test_nothing_of_it_stays_with_the_policy():
    model = world("words").build()
    head, ids = model.get_output_embeddings(), torch.tensor([[20, 21]])
    saved, before = set(model.state_dict()), model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="on the way"), left_out(model, [5, 6]):
        inside = model(input_ids=ids).logits
        assert set(model.state_dict()) == saved
        raise RuntimeError("on the way")
    assert head.bias is None and torch.equal(model(input_ids=ids).logits, before)
    assert (inside.softmax(-1)[..., [5, 6]] == 0).all()
    kept = [token for token in range(inside.shape[-1]) if token not in (5, 6)]
    assert torch.equal(inside[..., kept], before[..., kept])


ADAPTED = {
    "layers": {},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "a copy of the head": {"modules_to_save": ["lm_head"]},
    "rows of embeddings and of the head tied to them": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
}


@pytest.mark.parametrize("adapted", ADAPTED)
def test_adapters_are_seen_through(adapted):
    """In a plain pass, which scores off line, as in TRL's own head; with adapters and, as TRL's reference, without."""
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **ADAPTED[adapted]})
    model = get_peft_model(world("words").build(), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:  # so that adapters change what the policy does
                weight.add_(torch.linspace(-0.1, 0.1, weight.numel()).view_as(weight))
    ids = torch.tensor([[20, 21, 22]])
    plain = {}
    for name, passes in {"adapted": nullcontext, "reference": model.disable_adapter}.items():
        with passes(), torch.no_grad():
            plain[name] = before = model(input_ids=ids).logits
            with left_out(model, [5]):
                logits = model(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, before)
        assert (logits.softmax(-1)[..., 5] == 0).all()
        kept = [token for token in range(logits.shape[-1]) if token != 5]
        torch.testing.assert_close(logits[..., kept], before[..., kept])
    assert not torch.equal(plain["adapted"], plain["reference"])
    if adapted == "the head":
        return  # TRL's own head refuses adapters on it
    add_fused_lm_head(model.get_base_model())
    for name, passes in {"adapted": nullcontext, "reference": model.disable_adapter}.items():
        with passes(), torch.no_grad(), left_out(model, [5]):
            found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        expected = plain[name].index_fill(-1, torch.tensor([5]), -torch.inf).log_softmax(-1)[:, :-1]
        torch.testing.assert_close(found, expected.gather(-1, ids[:, 1:, None]).squeeze(-1), atol=2e-5, rtol=0)
