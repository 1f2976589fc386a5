"""Per-sample gradients of importance-weighted log-likelihoods: the measured side of the variance cost V.

The gradient of one trajectory y of a source q under the policy π is 1/|y| · Σ_t w_t ∇ log π(y_t), the update of NPO
without its advantage (ours: with A = 1 the number belongs to the two policies and not to a reward, and all trajectories
count, not only correct ones). Three weightings:

- `current`: w = 1, ratio mode current. Distance still costs, through the longer gradient of unlikely tokens.
- `exact`: w_t = π/q of the token, ratio mode exact before the clip.
- `sequence`: W, the product over the sequence: the textbook importance weight.

In the weighted two the mean gradient is 0 if all responses have one length (the score's expectation; 1/|y| shifts it a
little where lengths differ), so the variance is taken as the second moment E_q‖·‖². From q's samples alone it reads far
too low: what q hardly writes any more and π still does has a huge weight, and is not in the sample. It is therefore
estimated from samples of both policies, each weighted by the balance heuristic q/(½q + ½π) = 2/(1 + W), which never
exceeds 2 (Veach and Guibas 1995). What it weights still has heavy tails: read the intervals, not the points.

Gradients are over all trainable parameters unless told otherwise. A few trajectories share a forward pass, and their
vector-Jacobian products are vmapped (`is_grads_batched`, the vmap of `torch.func`). `torch.func.grad` under `vmap`
would need a forward pass without boolean indexing, which Qwen3-VL's vision path is not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from ..method.signal import LOG_CAP
from .memory import SHARE, device_memory
from .sampling import forced_logps

WEIGHTINGS = ("current", "exact", "sequence")
"""Names of the weightings, see the module."""

PRECISION = 4
"""Bytes of a number of a gradient."""

CHUNK = 4
"""Trajectories that share a forward pass: more waste time in each other's backward pass, fewer in overhead."""


def selected_parameters(model: PreTrainedModel, pattern: str = "") -> list[torch.nn.Parameter]:
    """Trainable parameters whose name holds a match of the regular expression `pattern`; all of them by default.

    Raises:
        ValueError: No trainable parameter matches.
    """
    found = [p for name, p in model.named_parameters() if p.requires_grad and re.search(pattern, name)]
    if not found:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        raise ValueError(f"No trainable parameter matches {pattern!r}; there are {len(names)}, such as {names[:3]}.")
    return found


@dataclass(frozen=True)
class SourceGradients:
    """Gradients of a source's trajectories under the policy.

    Attributes:
        plain: Gradient with weight 1, shape (trajectories, parameters), float32 on the CPU.
        exact: Squared norm of the token-weighted gradient, shape (trajectories,).
        log_weight: ln W of each trajectory, nats, shape (trajectories,).
    """

    plain: Float[np.ndarray, "samples params"]
    exact: Float[np.ndarray, " samples"]
    log_weight: Float[np.ndarray, " samples"]


def source_gradients(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[int]],
    source_logps: Sequence[Sequence[float]],
    parameters: str = "",
    unsampled: Sequence[int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> SourceGradients:
    """Gradients of trajectories that a source sampled.

    Args:
        model: The policy π; its mode and its accumulated gradients are left as they are.
        processor: Its processor or tokenizer.
        rows: One data set row per trajectory.
        completions: Token ids of the trajectories.
        source_logps: ln q of each token, nats.
        parameters: Regular expression that selects parameters by name; "" takes all trainable ones.
        unsampled: Tokens that log-probs leave out, see `sampling.completion_logps`.
        chat_template_kwargs: As in training, see `inputs.encode_prompts`.

    Raises:
        ValueError: No parameter matches, an empty trajectory, or the matrix would not fit into memory.
    """
    chosen = _checked(model, parameters, completions)
    size = _fitting(chosen, len(rows), f"{len(rows)} gradients")
    plain, exact, log_weights = np.empty((len(rows), size), np.float32), np.empty(len(rows)), np.empty(len(rows))
    for start in range(0, len(rows), CHUNK):
        part = slice(start, min(start + CHUNK, len(rows)))
        count = part.stop - part.start
        with torch.enable_grad():
            logps = _responses(model, processor, rows[part], completions[part], unsampled, chat_template_kwargs)
            log_weight = [
                own.detach() - torch.tensor(behaviour, device=own.device)
                for own, behaviour in zip(logps, source_logps[part], strict=True)
            ]
            values = [own.mean() for own in logps]
            values += [(w.clamp(max=LOG_CAP).exp() * own).mean() for w, own in zip(log_weight, logps, strict=True)]
            flat = _gradients(values, chosen)
        plain[part] = flat[:count].numpy()
        exact[part] = flat[count:].double().square().sum(dim=1)
        log_weights[part] = [float(w.sum()) for w in log_weight]
    return SourceGradients(plain, exact, log_weights)


def own_gram(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[int]],
    parameters: str = "",
    unsampled: Sequence[int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Float[np.ndarray, "tokens tokens"]]:
    """Inner products of the token gradients ∇ log π(y_t) of each trajectory: ‖Σ w_t ∇ log π(y_t)‖² = wᵀKw for any w.

    The policy's own trajectories serve in every pair, each time with other weights; this makes a pair cost nothing.

    Raises:
        ValueError: As `source_gradients`; here the token gradients of the longest trajectory must fit.
    """
    chosen = _checked(model, parameters, completions)
    longest = max(map(len, completions), default=0)
    _fitting(chosen, longest, f"The gradients of {longest} tokens")
    grams = []
    for row, tokens in zip(rows, completions, strict=True):
        with torch.enable_grad():
            (logps,) = _responses(model, processor, [row], [tokens], unsampled, chat_template_kwargs)
            grads = _grads(list(logps), chosen)
        # parameter by parameter: double precision of all at once would take three times the memory
        gram = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
        for grad in grads:
            flat = grad.detach().flatten(1).double()
            gram += (flat @ flat.T).cpu()
        grams.append(gram.numpy())
    return grams


def both_sided(
    source: SourceGradients,
    own: Sequence[Float[np.ndarray, "tokens tokens"]],
    own_log_weights: Sequence[Float[np.ndarray, " tokens"]],
) -> dict[str, Float[np.ndarray, " samples"]]:
    """Contributions to the measured variances from samples of both policies, see the module.

    Args:
        source: Gradients of n trajectories y ~ q.
        own: Gram matrices of n trajectories y ~ π.
        own_log_weights: ln w = ln π − ln q of their tokens, nats.

    Returns:
        Per sample, shape (n,): `own` (mean estimates E_π‖g‖²), `exact` (mean estimates E_q‖G‖²), `sequence` (mean
        estimates E_q[W²‖g‖²]).
    """
    plain = np.square(source.plain, dtype=np.float64).sum(axis=1)
    own_plain = np.array([gram.sum() / len(gram) ** 2 for gram in own])
    weights = [np.exp(np.minimum(log_weight, LOG_CAP)) for log_weight in own_log_weights]
    own_exact = np.array([w @ gram @ w / len(w) ** 2 for w, gram in zip(weights, own, strict=True)])
    of_source = np.exp(np.minimum(source.log_weight, LOG_CAP))
    of_own = np.exp(np.minimum([log_weight.sum() for log_weight in own_log_weights], LOG_CAP))
    return {
        "own": own_plain,
        "exact": source.exact / (1 + of_source) + own_exact / (1 + of_own),
        "sequence": of_source**2 / (1 + of_source) * plain + of_own**2 / (1 + of_own) * own_plain,
    }


def _checked(model: PreTrainedModel, pattern: str, completions: Sequence[Sequence[int]]) -> list[torch.nn.Parameter]:
    if any(len(tokens) == 0 for tokens in completions):
        raise ValueError("An empty response has no gradient; leave it out.")
    return selected_parameters(model, pattern)


def gradients_misfit(
    model: PreTrainedModel, pattern: str, gradients: int, tokens: int, device: torch.device | str
) -> str:
    """Why gradients would not fit into memory, "" where they do; of a policy that may be laid out without its weights.

    Args:
        model: The policy π.
        pattern: Regular expression that selects parameters by name; "" takes all trainable ones.
        gradients: Trajectories with a gradient.
        tokens: Longest response in tokens.
        device: Where they would be computed.

    Raises:
        ValueError: No parameter matches.
    """
    chosen = selected_parameters(model, pattern)
    of_tokens = _misfit(chosen, tokens, f"the gradients of a response of {tokens} tokens", device)
    return _misfit(chosen, gradients, f"{gradients} gradients", device) or of_tokens


def require_gradients_fit(model: PreTrainedModel, pattern: str, gradients: int, tokens: int) -> None:
    """Refuse gradients that would not fit into memory, before anything is sampled for them.

    A pair of policies holds one gradient of each trajectory; a trajectory's token gradients are held at a time.

    Args:
        model: The policy π.
        pattern: Regular expression that selects parameters by name; "" takes all trainable ones.
        gradients: Trajectories with a gradient.
        tokens: Longest response in tokens.

    Raises:
        ValueError: No parameter matches, or they do not fit; the message has what would.
    """
    chosen = selected_parameters(model, pattern)
    _fitting(chosen, gradients, f"{gradients} gradients (gradients)")
    _fitting(chosen, tokens, f"The gradients of {tokens} tokens (max_new_tokens)")


def _fitting(parameters: list[torch.nn.Parameter], rows: int, what: str) -> int:
    """Number of parameters, if `rows` gradients over them fit the share of memory that a batch may take."""
    if misfit := _misfit(parameters, rows, what, parameters[0].device):
        most = int(SHARE * device_memory(parameters[0].device)) // (PRECISION * rows)
        raise ValueError(
            f"{misfit}. Select fewer parameters, {most:,} at most (parameters, a regular expression of names "
            "such as 'layers.29.self_attn.o_proj'), or set gradients to 0. What has been sampled is kept."
        )
    return sum(parameter.numel() for parameter in parameters)


def _misfit(parameters: list[torch.nn.Parameter], rows: int, what: str, device: torch.device | str) -> str:
    size = sum(parameter.numel() for parameter in parameters)
    needed, allowed = PRECISION * size * rows, int(SHARE * device_memory(device))
    if needed <= allowed:
        return ""
    return f"{what} over {size:,} parameters take {needed / 2**30:,.1f} GiB, more than {allowed / 2**30:,.1f}"


def _responses(
    model: PreTrainedModel,
    processor,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[int]],
    unsampled: Sequence[int] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> list[torch.Tensor]:
    """Differentiable log-probs of each response, without padding."""
    about: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs, "unsampled": unsampled}
    logps = forced_logps(model, processor, rows, completions, **about)
    return [logps[index, : len(tokens)] for index, tokens in enumerate(completions)]


def _gradients(values: Sequence[torch.Tensor], parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Gradient of each value, shape (values, parameters), float32 on the CPU."""
    return torch.cat([grad.detach().float().flatten(1) for grad in _grads(values, parameters)], dim=1).cpu()


def _grads(values: Sequence[torch.Tensor], parameters: list[torch.nn.Parameter]) -> tuple[torch.Tensor, ...]:
    """Gradient of each value by parameter, shapes (values, *parameter)."""
    stacked = torch.stack(list(values))
    each = torch.eye(len(stacked), dtype=stacked.dtype, device=stacked.device)
    found = torch.autograd.grad(stacked, parameters, each, is_grads_batched=True, allow_unused=True)
    # what took no part, as a vision tower in prompts without pictures; torch's own zeros lack the axis of the values
    return tuple(
        parameter.new_zeros(()).expand(len(each), *parameter.shape) if grad is None else grad
        for grad, parameter in zip(found, parameters, strict=True)
    )
