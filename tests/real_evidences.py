"""Small results of the study of the real model, made up so that every difference of them is known; for tests alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from npo_core.study.findings import SCHEMA
from npo_core.study.real_results import ABOUT, EXACT, PREMISE, SCORES

BASE = 0.2
"""Probability of the right response under the base policy."""
LENGTHS = (5, 6)
PER_STEP, OFFLINE = 64, 1280
"""Rollouts of a step, and those that an arm samples off line when it goes back."""
DEARER = "GRPO, groups of 16"
"""Arm with twice the rollouts of a step, and 40 steps in place of 60."""
EARLY = (20, 0)


def write_results(
    folder: Path,
    finals: Mapping[str, Sequence[float | None]],
    *,
    jumps: Mapping[str, Sequence[tuple[int, int] | None]] | None = None,
    passed: bool | None = True,
) -> Path:
    """Results in which the probability rises on a straight line from the base policy's over the executed steps.

    Args:
        folder: Where to.
        finals: Probability at the end of each arm by seed; None where there is no run. The pass rate is 0.1 above it,
            0.02 more at the first length and 0.02 less at the second.
        jumps: By arm and seed the policy step of the one roll-back, and where it goes; 20 back to 0 for NPO early and
            its control, 40 back to 20 for AutoNPO.
        passed: Whether the gate is; None: the premise is not measured.
    """
    scores, exact, runs = [], [], []
    for arm, values in finals.items():
        for seed, final in enumerate(values):
            if final is None:
                continue
            jump = None if jumps is None or arm not in jumps else jumps[arm][seed]
            if jumps is None or arm not in jumps:
                jump = EARLY if arm.startswith("NPO early") else (40, 20) if arm == "AutoNPO" else None
            end, per_step = (40, 2 * PER_STEP) if arm == DEARER else (60, PER_STEP)
            places = _places(end, per_step, jump)
            quarters = [end * part // 4 for part in (1, 2, 3, 4)]
            sampled = [max(p["compute_step"] for p in places if p["compute_step"] <= step) for step in quarters]
            for place in places:
                value = BASE + (final - BASE) * place["compute_step"] / end
                row = {"arm": arm, "seed": seed, **place}
                if place["compute_step"] or arm == "GRPO":
                    exact += [
                        row | {"word": f"{a}-{a}", "probability": value + d} for a, d in (("x", 0.1), ("y", -0.1))
                    ]
                if place["compute_step"] in sampled:
                    last = place["compute_step"] == end
                    for sampling, more in (("paper", 0.3), ("plain", 0.1)):
                        for length, apart in zip(LENGTHS, (0.02, -0.02), strict=True):
                            rate = value + more + apart
                            suite = f"{length:02d} letters"
                            scores.append(
                                row | {"final": last, "sampling": sampling, "suite": suite, "pass_rate": rate}
                            )
            runs.append(_run(arm, seed, end, per_step, jump))
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(scores).to_csv(folder / SCORES, index=False)
    pd.DataFrame(exact).to_csv(folder / EXACT, index=False)
    (folder / ABOUT).write_text(json.dumps({"schema": SCHEMA, "model": "made up", "runs": runs}))
    if passed is not None:
        found = {"distance": 10, "failed": 30, "shown": 0.4, "own": 0.2, "p": 0.01, "p_holm": 0.01 if passed else 0.2}
        (folder / PREMISE).write_text(json.dumps({"gate": {"origins": {"0": [found]}, "passed": passed}}))
    return folder


def _places(end: int, per_step: int, jump: tuple[int, int] | None) -> list[dict]:
    """Checkpoints: every 10 steps of the trajectory, where it goes back, and at the end; all clocks."""
    at, back = jump or (end + 1, 0)
    places, policy = [], 0
    for compute in range(end + 1):
        gone_back = compute > at
        policy = compute - (at - back) if gone_back else compute
        if policy % 10 == 0 or compute in (at, end):
            spent = compute * per_step + OFFLINE * gone_back
            places.append({"policy_step": policy, "compute_step": compute, "rollouts": spent})
    return places


def _run(arm: str, seed: int, end: int, per_step: int, jump: tuple[int, int] | None) -> dict:
    at, back = jump or (0, 0)
    made = {"stage": "early", "policy_step": at, "compute_step": at, "distance": at - back, "cached": 5}
    offline = OFFLINE if jump else 0
    return {
        "arm": arm,
        "seed": seed,
        "config": {"arm": arm, "prompts_per_step": 8, "num_generations": per_step // 8, "learning_rate": 1e-5},
        "versions": {"python": "3.11", "packages": {"torch": "2"}, "device": "cpu"},
        "git_revision": "abc",
        "policy_steps": end - (at - back),
        "compute_steps": end,
        "rollouts": end * per_step + offline,
        "offline_rollouts": offline,
        "interventions": [made] if jump else [],
    }
