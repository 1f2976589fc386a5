"""What sampling never draws has no part in the loss: log-probs, entropies, gradients are those of what is sampled."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig
from worlds import Gradients, SpyTrainer, log_probs, trainer_of, world

from npo_core.trainer.inputs import encode_prompts
from npo_core.trainer.pictures import left_out, never_drawn, never_sampled, suppressed
from npo_core.trainer.sampling import completion_entropies, completion_logps

OTHER = 7
"""A word that a text policy is told never to write."""
KINDS = {
    "pictures": ("pictures", {}),
    "words": ("words", {}),
    "a text policy that is told so": ("text", {"generation_kwargs": {"suppress_tokens": [OTHER]}}),
}


class Scores(SpyTrainer):
    """Keeps the log-probs and entropies of each loss call."""

    scores = ()

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self.scores = (*self.scores, [each.detach() for each in found[:2]])
        return found


def step(folder, kind: str, **arguments):
    """One step, the policy with which it began, the token that is never drawn, and the gradients."""
    name, given = KINDS[kind]
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
    token = OTHER if name == "text" else tiny.processor.image_token_id
    return trainer, model, batch, token, gradients.steps[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_sees_the_distribution_that_is_sampled(tmp_path, kind, masked):
    trainer, model, batch, token, _ = step(tmp_path, kind, mask_unsampled=masked)
    with torch.no_grad():
        scores = log_probs(model, batch)
    whole = scores.clone()
    assert whole[..., token].exp().max() > 1e-3, "else there is nothing to leave out"
    if masked:
        scores[..., token] = -torch.inf
        scores = scores.log_softmax(-1)
    mask = batch["completion_mask"].bool()
    assert not (batch["completion_ids"][mask] == token).any()
    logps, entropies = trainer.scores[0]
    expected = scores.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logps[mask], expected[mask], atol=2e-5, rtol=0)
    torch.testing.assert_close(entropies[mask], torch.special.entr(scores.exp()).sum(-1)[mask], atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_moves_the_logit_of_what_is_never_drawn(tmp_path, kind):
    """The row of the head alone: a prompt holds the token as a place for a picture's own vectors, or not at all."""
    for masked in (True, False):
        _, model, _, token, gradient = step(tmp_path, kind, mask_unsampled=masked)
        name = next(name for name, value in model.named_parameters() if value is model.get_output_embeddings().weight)
        assert gradient[name].abs().sum() > 0
        assert bool(gradient[name][token].any()) is not masked


@pytest.mark.parametrize("name", ["pictures", "words"])
def test_scores_off_line_are_those_of_the_loss(tmp_path, name):
    trainer, model, batch, token, _ = step(tmp_path, name)
    tiny = world(name)
    assert suppressed(model, tiny.processor) == [token]
    mask = batch["completion_mask"].bool()
    completions = [ids[real].tolist() for ids, real in zip(batch["completion_ids"], mask, strict=True)]
    asked = list(tiny.dataset.select(range(2)))
    by_prompt = {tuple(encode_prompts(tiny.processor, [row])["input_ids"][0].tolist()): row for row in asked}
    prompts = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    rows = [by_prompt[tuple(ids[real].tolist())] for ids, real in prompts]
    logps, entropies = trainer.scores[0]
    for found, place in zip(completion_logps(model, tiny.processor, rows, completions), range(len(rows)), strict=True):
        assert found == pytest.approx(logps[place][mask[place]].tolist(), abs=2e-5)
    means = completion_entropies(model, tiny.processor, rows, completions)
    assert means == pytest.approx([float(entropies[i][mask[i]].mean()) for i in range(len(rows))], abs=5e-5)


def test_what_never_is_drawn_follows_the_sampler():
    def trainer(vllm: bool, given: dict | None, masked: bool = True):
        args = SimpleNamespace(mask_unsampled=masked, generation_kwargs=given)
        return SimpleNamespace(args=args, use_vllm=vllm, generation_config=GenerationConfig(suppress_tokens=[5]))

    processor = world("pictures").processor
    pictures = [processor.image_token_id, processor.video_token_id]
    assert never_drawn(trainer(False, None)) == [5]
    assert never_drawn(trainer(True, never_sampled(processor))) == pictures
    assert never_drawn(trainer(True, {"logit_bias": {"3": -100, "4": -1.0}})) == [3], "as JSON names them"
    assert never_drawn(trainer(True, None)) == never_drawn(trainer(False, None, masked=False)) == []


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


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_adapters_are_seen_through(targets):
    model = get_peft_model(world("words").build(), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    ids = torch.tensor([[20, 21]])
    with left_out(model, [5]):
        logits = model(input_ids=ids).logits
    assert (logits.softmax(-1)[..., 5] == 0).all() and (logits[..., 6] > -100).all()
    assert (model(input_ids=ids).logits[..., 5] > -100).all()
