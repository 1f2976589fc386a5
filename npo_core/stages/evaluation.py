"""Benchmark scores: k sampled responses per test prompt, verified, averaged per suite and over suites."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..guidance.verdicts import Verifier
from ..method.stats import bootstrap_interval, pass_at_k
from ..processes import process_count
from ..progress import progress
from ..streams import TEST_ITEMS
from ..trainer.sampling import ROLLOUT_BATCH, Generate, shared_rollouts


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    verifier: Verifier,
    *,
    k: int,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    batch: int = ROLLOUT_BATCH,
    generate: Generate | None = None,
    label: str = "evaluation",
    quiet: bool = False,
) -> dict[str, Any]:
    """avg@k per suite and the average over suites, as the paper's Table 1 forms it.

    Args:
        model: Policy.
        processor: Its processor or tokenizer.
        rows: Test rows with uid, prompt, answer, suite and, for visual tasks, image.
        verifier: `verifier(text, row) -> Verdict`.
        k: Responses per row.
        seed: Seed of the sampling.
        max_new_tokens: Longest response in tokens.
        temperature: Sampling temperature.
        top_p: Nucleus.
        top_k: Number of likeliest tokens; 0 for all.
        batch: Responses that are sampled at a time.
        generate: Samples in place of the model, such as vLLM.
        label: Words on the progress bar.
        quiet: Without a progress bar.

    Returns:
        `average` (mean over suites), `interval` (95 %, over items), `suites` and `suite_intervals` (95 %, over items of
        that suite), `pass_at` (unbiased pass@j per suite for j = 1, 2, 4, … up to k), `items` and `k`. The intervals
        hold for this one policy; they say nothing about other seeds.
    """
    with progress(len(rows) * k, label, quiet, stays=False) as bar:
        groups = shared_rollouts(
            model,
            processor,
            rows,
            k,
            verifier,
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            score=False,
            batch=batch,
            generate=generate,
            advance=lambda rollouts: bar.advance(rollouts * process_count()),
        )
    solved = np.array([sum(trajectory.correct for trajectory in group) for group in groups])
    rates = solved / k
    suites = np.array([row["suite"] for row in rows])
    names = list(dict.fromkeys(suites.tolist()))
    rng = TEST_ITEMS.generator(seed)
    scores, intervals = {}, {}
    for name in names:
        estimate = bootstrap_interval(rates[suites == name], np.mean, rng)
        scores[name], intervals[name] = estimate.value, [estimate.low, estimate.high]
    resampled = [
        np.mean([rng.choice(rates[suites == name], size=int((suites == name).sum())).mean() for name in names])
        for _ in range(1000)
    ]
    return {
        "average": float(np.mean(list(scores.values()))),
        "interval": np.quantile(resampled, [0.025, 0.975]).tolist(),
        "suites": scores,
        "suite_intervals": intervals,
        "pass_at": {
            str(drawn): {name: float(pass_at_k(k, solved[suites == name], drawn).mean()) for name in names}
            for drawn in (2**power for power in range(k.bit_length()))
        },
        "items": len(rows),
        "k": k,
    }
