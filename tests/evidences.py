"""Small results of a study, made up so that every statistic of them is known; for tests alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from npo_core.runs.validation import WORLD
from npo_core.study.arms import ARMS
from npo_core.study.findings import SCHEMA
from npo_core.study.results import ABOUT, SAMPLINGS, SCORE_COLUMNS, SCORES, TRAINING, Evidence

SUITES = ("mathvista", "mmstar")
STEPS = 40
"""Compute steps of a run."""
PER_STEP = {"GRPO, groups of 16": 32, "GRPO, longer": 32}
"""Rollouts of a step, 16 if not given; an arm that rolls back samples 16 more off line when it does."""


def evidence(
    gains: Mapping[str, Sequence[float]],
    *,
    base: Sequence[float] = (0.40, 0.50, 0.45),
    ends: Mapping[str, int] | None = None,
    failed: Sequence[tuple[str, int]] = (),
) -> Evidence:
    """Results in which each arm ends a given gain above GRPO, seed by seed.

    Args:
        gains: Gain of each arm over GRPO at equal compute, a number per seed; "GRPO" is added.
        base: GRPO's final pass rate by seed; half of it at half the budget, on a straight line.
        ends: Policy step that an arm ends at, `STEPS` if not given; below, it rolled back once at half the budget.
        failed: Cells (arm, seed) that crashed.
    """
    gains = {"GRPO": [0.0] * len(base), **gains}
    ends = dict.fromkeys(gains, STEPS) | dict(ends or {})
    scores, training, runs = [], [], []
    for arm in gains:
        for seed, start in enumerate(base):
            if (arm, seed) in failed:
                continue
            final = start + gains[arm][seed]
            lines = trajectory(arm, seed, ends[arm], start, final)
            training += lines
            runs.append(run_of(arm, seed, ends[arm]))
            for line in lines:
                if line["compute_step"] % 10:
                    continue
                last = line["compute_step"] == STEPS
                for sampling in SAMPLINGS if last else ("paper",):
                    for place, suite in enumerate(SUITES):
                        rate = line["pass_rate"] + (0.02 if place else -0.02)
                        scores.append(
                            {
                                "arm": arm, "seed": seed, "policy_step": line["policy_step"],
                                "compute_step": line["compute_step"], "final": last, "sampling": sampling,
                                "suite": suite, "pass_rate": rate, "pass_at_4": rate + 0.1, "pass_at_8": rate + 0.2,
                                "entropy": line["entropy"], "all_wrong_groups": 0.5,
                                "interventions": int(ends[arm] < STEPS),
                                "rollouts": line["compute_step"] * PER_STEP.get(arm, 16) + 16 * line["branch"],
                            }
                        )  # fmt: skip
    about = {
        "schema": SCHEMA,
        "world": WORLD,
        "arms": [arm for arm in ARMS if arm in gains],
        "seeds": list(range(len(base))),
        "suites": list(SUITES),
        "failed": [{"arm": arm, "seed": seed, "reason": "exit status 1"} for arm, seed in failed],
        "runs": runs,
    }
    return Evidence(pd.DataFrame(scores, columns=list(SCORE_COLUMNS)), pd.DataFrame(training), about)


def trajectory(arm: str, seed: int, end: int, start: float, final: float) -> list[dict]:
    """Lines of one run: the pass rate rises on a straight line in compute; a replay has 1.2 times the entropy."""
    back = STEPS - end
    lines = []
    for compute in range(1, STEPS + 1):
        branch = int(back > 0 and compute > STEPS // 2)
        policy = compute - back * branch
        lines.append(
            {
                "arm": arm,
                "seed": seed,
                "branch": branch,
                "policy_step": policy,
                "compute_step": compute,
                "pass_rate": start / 2 + (final - start / 2) * compute / STEPS,
                "entropy": (1.0 - policy / 100) * (1.2 if branch else 1.0),
                "all_wrong_groups": 0.5,
                "replaced_slots": float(branch),
                "guide_kl": 0.1 if branch else np.nan,
            }
        )
    return lines


def run_of(arm: str, seed: int, end: int) -> dict:
    """The entry of a run in `evidence.json`."""
    half, back = STEPS // 2, STEPS - end
    jump = {"stage": "early", "policy_step": half, "compute_step": half, "distance": back, "cached": 5}
    return {
        "arm": arm,
        "seed": seed,
        "config": {"arm": arm, "seed": seed, "prompts_per_step": 4, "num_generations": 4},
        "versions": {"python": "3.11", "packages": {"torch": "2"}, "device": "cpu"},
        "git_revision": "abc",
        "policy_steps": end,
        "compute_steps": STEPS,
        "rollouts": STEPS * PER_STEP.get(arm, 16) + 16 * (back > 0),
        "offline_rollouts": 16 * (back > 0),
        "trained_tokens": STEPS * 16 * 10,
        "wall_seconds": 1.0,
        "interventions": [jump | {"at_edge": None, "quality": None, "variance": None}] if back else [],
    }


def write_evidence(folder: Path, found: Evidence) -> None:
    """Write results as `python -m npo_core study` does."""
    folder.mkdir(exist_ok=True)
    found.scores.to_csv(folder / SCORES, index=False)
    found.training.to_parquet(folder / TRAINING, index=False)
    (folder / ABOUT).write_text(json.dumps(found.about))
