"""Off-line rollouts and scoring: the same few lines serve guidance caches, probes and evaluation.

Rollouts are sampled in batches by `generate`; log-probabilities come from a second, teacher-forced pass at a
temperature of their own (1 unless it is given), so that they are those of the policy and not those of a truncated
sampling distribution. What will guide is scored at the temperature of training: TRL divides its logits by it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from ..guidance.fingerprints import tokenizer_of
from ..guidance.trajectories import Trajectory, uid_of
from ..guidance.verdicts import AnswerVerifier, Verifier, is_correct
from ..processes import process_number, shared
from ..streams import PROCESS
from .fsdp import held_together
from .inputs import Sampling, encode_prompts, end_tokens, padding_token, prompt_tokens
from .memory import fitting, sampling_bytes, scoring_bytes
from .pictures import left_out
from .rollouts import response_texts

ROLLOUT_BATCH = 512
"""Rollouts in one `generate` call, or in a scoring pass, at most: fewer where memory asks for it (`memory`)."""

ENGINE_PROMPTS = 512
"""Prompts, with their pictures, that another sampler gets at a time; each time it is sent the weights first."""


class Generate(Protocol):
    """Samples token ids otherwise than by transformers: k responses per row, those of a row together.

    `sampling` holds temperature, top_p, top_k, min_p and repetition_penalty.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]], k: int, sampling: Mapping[str, Any]) -> list[list[int]]: ...


class Lazily(Sequence):
    """Rows that are read when they are asked for, so that pictures of a whole data set are never in memory together.

    Args:
        read: Row of a key.
        keys: Keys in the order of the rows.
    """

    def __init__(self, read: Callable[[Any], Mapping[str, Any]], keys: Sequence[Any]):
        self.read, self.keys = read, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place):
        return [self.read(key) for key in self.keys[place]] if isinstance(place, slice) else self.read(self.keys[place])


def sample_rollouts(
    model: PreTrainedModel,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    k: int,
    verifier: Verifier,
    *,
    seed: int,
    max_new_tokens: int,
    source_step: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generation_kwargs: Mapping[str, Any] | None = None,
    score: bool = True,
    batch: int = ROLLOUT_BATCH,
    score_batch: int = ROLLOUT_BATCH,
    generate: Generate | None = None,
    advance: Callable[[int], None] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    score_temperature: float = 1.0,
    unsampled: Sequence[int] | None = None,
) -> list[list[Trajectory]]:
    """Sample k verified responses per row. Training state and the global random state are left as they were.

    A response is drawn and ends as it would be in training: by the settings that TRL gives to `generate`, up to any end
    of sequence of tokenizer or model (`inputs`). The precision is the caller's: `torch.autocast` as training has it.

    Args:
        model: Policy; put into evaluation mode while sampling.
        processor: Its processor or tokenizer.
        rows: Data set rows, or a `Dataset`, with uid, prompt, what the verifier reads and, for visual tasks, image.
        k: Responses per row.
        verifier: `verifier(text, row) -> Verdict` or bool; the text is what rewards get (`rollouts.response_texts`).
        seed: Seed of the sampling.
        max_new_tokens: Longest response in tokens.
        source_step: Policy step of the model, noted in each trajectory.
        temperature: Sampling temperature.
        top_p: Nucleus; 1 switches it off.
        top_k: Number of likeliest tokens; 0 switches it off.
        min_p: Least probability as a share of the likeliest token's, or None.
        repetition_penalty: 1 switches it off.
        generation_kwargs: Further settings, as TRL's argument of this name; not for `generate`.
        score: Compute log-probs (at `score_temperature`, untruncated); without it `logps` is empty.
        batch: Responses that are sampled at a time, at most: fewer where memory asks for it, which is said once.
        score_batch: Responses that are scored at a time, at most, in the same way.
        generate: Samples in place of the model, whose weights it has, such as vLLM; takes no seed.
        advance: Called with the number of rollouts done after each batch.
        chat_template_kwargs: As in training, see `encode_prompts`.
        score_temperature: Temperature of the log-probs. For guides the one that they will be trained at
            (`NPOConfig.temperature`), however they are sampled.
        unsampled: Tokens that the log-probs leave out, as the loss does; None for all that these settings never draw,
            () for training with `mask_unsampled=False`.

    Returns:
        A list per row, of k trajectories in the order they were sampled.

    Raises:
        ValueError: k below 1; rows of a `Dataset` that could not be trained on, see `dataset.row_complaints`.
    """
    if k < 1:
        raise ValueError(f"k is {k}; sample at least one response per row.")
    _require_rows(rows, verifier)
    tokenizer = tokenizer_of(processor)
    ends = end_tokens(model, processor)
    never = None if unsampled is None else tuple(unsampled)
    drawn = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, generation_kwargs or {}, never)
    settings = drawn.settings(model, processor, max_new_tokens) if generate is None else None
    about: dict[str, Any] = {"temperature": score_temperature, "chat_template_kwargs": chat_template_kwargs}
    was_training = model.training
    out: list[list[Trajectory]] = []
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            if score:  # said before anything is sampled
                score_batch = fitting(score_batch, scoring_bytes(model, max_new_tokens), model.device, "scored")
                about["unsampled"] = drawn.left_out(model, processor)
            if generate is None:
                batch = fitting(batch, sampling_bytes(model, max_new_tokens), model.device, "sampled")
            prompts = max(1, batch // k) if generate is None else ENGINE_PROMPTS
            for start in range(0, len(rows), prompts):
                part = [rows[place] for place in range(start, min(start + prompts, len(rows)))]
                repeated = [row for row in part for _ in range(k)]
                if generate is None:
                    assert settings is not None
                    draw = partial(_drawn, model, processor, settings=settings, template=chat_template_kwargs)
                    at_once = [repeated[place : place + batch] for place in range(0, len(repeated), batch)]
                    ids = [row for some in at_once for row in draw(some)]
                else:
                    ids = generate(part, k, drawn.of_engine)
                completions = [_until_end(row, ends) for row in ids]
                logps = (
                    completion_logps(model, processor, repeated, completions, score_batch, **about)
                    if score
                    else [()] * len(repeated)
                )
                texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
                asked = partial(_repeated, processor, part, k, chat_template_kwargs)
                judged = response_texts(processor, repeated, completions, asked)
                trajectories = [
                    Trajectory(
                        uid=row["uid"],
                        token_ids=tuple(tokens),
                        logps=tuple(scores),
                        source_step=source_step,
                        correct=is_correct(verifier(read, row)),
                        text=text,
                        temperature=score_temperature,
                    )
                    for row, tokens, scores, text, read in zip(repeated, completions, logps, texts, judged, strict=True)
                ]
                out += [trajectories[i : i + k] for i in range(0, len(trajectories), k)]
                if advance is not None:
                    advance(len(repeated))
    finally:
        model.train(was_training)
    return out


def _require_rows(rows: Sequence[Mapping[str, Any]], verifier: Verifier) -> None:
    """Refuse rows before anything is sampled; those of a data set are known without their pictures being decoded."""
    if isinstance(rows, Dataset):
        from .dataset import require_columns  # for a data set alone, as the rules for answers that it reads by

        require_columns(rows, isinstance(verifier, AnswerVerifier))
    elif isinstance(rows, list):
        for row in rows:
            uid_of(row)


def _drawn(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    settings: GenerationConfig,
    template: Mapping[str, Any] | None,
) -> list[list[int]]:
    """Token ids of one response per row, padding behind it included."""
    encoded = encode_prompts(processor, rows, template)
    inputs = {name: value.to(model.device) for name, value in encoded.items()}
    # transformers mixes `generate` into each kind of model, and not into what they all are
    ids = cast(Any, model).generate(**inputs, generation_config=settings, synced_gpus=held_together(model))
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def _repeated(
    processor, rows: Sequence[Mapping[str, Any]], k: int, chat_template_kwargs: Mapping[str, Any] | None
) -> list[list[int]]:
    """Token ids of the rows' prompts, each k times."""
    return [ids for ids in prompt_tokens(processor, rows, chat_template_kwargs)[0] for _ in range(k)]


def shared_rollouts(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    k: int,
    verifier: Verifier,
    *,
    seed: int,
    **settings: Any,
) -> list[list[Trajectory]]:
    """`sample_rollouts` with the rows shared between the processes of a run; all of them get the whole result.

    Arguments are those of `sample_rollouts`. Each process samples with a seed of its own, so the result depends on
    their number.
    """
    number = process_number()
    own_seed = PROCESS.seed(seed, number) if number else seed
    return _shared(rows, lambda own, _: sample_rollouts(model, processor, own, k, verifier, seed=own_seed, **settings))


def shared_logps(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[int]],
    batch: int = ROLLOUT_BATCH,
    **settings: Any,
) -> list[list[float]]:
    """`completion_logps` with the responses shared between the processes of a run; all get the whole result."""
    return _shared(
        rows,
        lambda own, mine: completion_logps(model, processor, own, [completions[i] for i in mine], batch, **settings),
    )


def _shared(rows: Sequence[Mapping[str, Any]], work: Callable[[Sequence, Sequence[int]], list]) -> list:
    """Work on each process's part of the rows, given with their places; all processes get the whole result."""
    return shared(range(len(rows)), lambda mine: work(Lazily(rows.__getitem__, mine), mine))


def completion_logps(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[int]],
    batch: int = ROLLOUT_BATCH,
    *,
    temperature: float = 1.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    unsampled: Sequence[int] | None = None,
) -> list[list[float]]:
    """Log-probability of each token of given responses, in nats.

    Args:
        model: Policy that scores; its mode is left as it is.
        processor: Its processor or tokenizer.
        rows: One data set row per response.
        completions: Token ids of the responses.
        batch: Responses in a forward pass, at most: fewer where memory asks for it, which is said once.
        temperature: The logits are divided by it, as TRL does with those of training.
        chat_template_kwargs: As in training, see `encode_prompts`.
        unsampled: Tokens that are left out, as the loss does; None for all that the policy never draws unless it is
            told so (the token of a picture), () for none, as in training with `mask_unsampled=False`.

    Raises:
        ValueError: A response is empty, or the temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probs need one above 0.")
    if any(len(tokens) == 0 for tokens in completions):
        raise ValueError("An empty response has no log-probs; leave it out.")
    scores: list[list[float]] = []
    batch = _scored_at_once(model, completions, batch)
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            tokens = completions[start : start + batch]
            part = [rows[place] for place in range(start, start + len(tokens))]
            logps = forced_logps(model, processor, part, tokens, temperature, chat_template_kwargs, unsampled)
            scores += [logps[index, : len(row)].tolist() for index, row in enumerate(tokens)]
    return scores


def forced_logps(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[int]],
    temperature: float = 1.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    unsampled: Sequence[int] | None = None,
) -> torch.Tensor:
    """Teacher-forced log-probabilities of one batch of responses, shape (responses, longest), in nats, differentiable.

    Entries past the end of a response are those of padding: mask them by its length.
    """
    logps, ids = _forced(model, processor, rows, completions, temperature, chat_template_kwargs, unsampled)
    return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def completion_entropies(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[int]],
    batch: int = ROLLOUT_BATCH,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    unsampled: Sequence[int] | None = None,
) -> list[float]:
    """Mean entropy of the next-token distribution over the tokens of each response, in nats, at temperature 1.

    Arguments are those of `completion_logps`.
    """
    means: list[float] = []
    was_training = model.training
    batch = _scored_at_once(model, completions, batch)
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch):
                tokens = completions[start : start + batch]
                part = [rows[place] for place in range(start, start + len(tokens))]
                logps, _ = _forced(model, processor, part, tokens, 1.0, chat_template_kwargs, unsampled)
                entropies = torch.special.entr(logps.exp()).sum(dim=-1)
                means += [float(entropies[index, : len(row)].mean()) for index, row in enumerate(tokens)]
    finally:
        model.train(was_training)
    return means


def _scored_at_once(model: PreTrainedModel, completions: Sequence[Sequence[int]], asked: int) -> int:
    longest = max(map(len, completions), default=0)
    return fitting(asked, scoring_bytes(model, longest), model.device, "scored")


def _forced(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[int]],
    temperature: float,
    chat_template_kwargs: Mapping[str, Any] | None,
    unsampled: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the whole vocabulary at each place of given responses, and their padded token ids."""
    encoded = encode_prompts(processor, rows, chat_template_kwargs)
    inputs = {name: value.to(model.device) for name, value in encoded.items()}
    width = max(map(len, completions))
    ids = torch.full((len(completions), width), padding_token(processor), device=model.device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(completions):
        ids[index, : len(row)] = torch.tensor(row, device=model.device)
        mask[index, : len(row)] = 1
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(ids)], dim=1)
    if _counts_places(model):
        # as `generate` has them: a policy of absolute places would else depend on how far its prompt is padded
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    unsampled = Sampling().left_out(model, processor) if unsampled is None else unsampled
    with left_out(model, unsampled):
        logits = model(**inputs, logits_to_keep=width + 1).logits[:, :-1].float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits.log_softmax(dim=-1), ids


def _counts_places(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model takes the places of its tokens as they are; one with a vision tower makes its own of the mask."""
    inner = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    text_only = inner.config.get_text_config() is inner.config
    return text_only and "position_ids" in inspect.signature(inner.forward).parameters


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)
