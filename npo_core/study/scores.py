"""Scores of the runs of a study: where on the way a run is scored, and the scores themselves, made once and kept.

A score is a small file in the run's folder. Ours; the plan is in docs/evidence.md.
"""

from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..runs.checkpoints import checkpoint_folder, complete_checkpoints
from ..runs.folder import RunFolder, offline_rollouts
from ..stages import run as stages
from ..world.computing import run_policy

POINTS = 4
"""Scores on the way to the end of the budget."""

PLAIN_ON_THE_WAY = ("real", "real-smoke")
"""Presets that are scored on the way as in training too, at temperature 1: the first endpoint of the real model."""


SETTLED = "settled.json"
"""File of a run whose scores are all in it, and whose weights may be gone."""


def finished(run: RunFolder) -> bool:
    """Whether a run is at its end and scored; one without weights can be scored no more, and is if it is settled."""
    if run.result() is None:
        return False
    if newest_place(run, run.config.compute_steps) is None:
        return (run.path / SETTLED).exists()
    return all(_score_file(run, *point).exists() for point in score_points(run))


def score_points(run: RunFolder) -> list[tuple[int, int, str]]:
    """What a finished run is scored at: (branch, policy step, sampling), the end last and with both samplings.

    On the way it is sampled as the paper evaluates, and as in training where the plan's first endpoint is sampled so.
    """
    budget = run.config.compute_steps
    every = max(1, budget // POINTS)
    places = [newest_place(run, step) for step in range(every, budget + 1, every)]
    end = newest_place(run, budget)
    places = [place for place in dict.fromkeys(places) if place is not None and place != end]
    on_the_way = ("paper", "plain") if run.config.preset in PLAIN_ON_THE_WAY else ("paper",)
    points = [(*place, sampling) for place in places for sampling in on_the_way]
    return [*points, (*end, "paper"), (*end, "plain")]


def newest_place(run: RunFolder, compute_step: int) -> tuple[int, int] | None:
    """Branch and policy step of the newest checkpoint at or before a compute step."""
    there = [place for place in saved_places(run) if place["compute_step"] <= compute_step]
    return (there[-1]["branch"], there[-1]["policy_step"]) if there else None


def _score_file(run: RunFolder, branch: int, step: int, sampling: str) -> Path:
    return run.path / "scores" / f"b{branch:02d}-{step:06d}-{sampling}.json"


def score(run: RunFolder, branch: int, step: int, sampling: str, world: stages.World | None = None) -> dict[str, Any]:
    """Scores of a checkpoint on the test problems; made once and kept in the run folder."""
    path = _score_file(run, branch, step, sampling)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        world = stages.prepare(run.config, quiet=True) if world is None else world
        policy = run_policy(run.config, checkpoint_folder(run.branch(branch), step))
        label = f"{run.config.method} at {step}"
        write_json(path, stages.evaluate_policy(run.config, policy, world, label, True, plain=sampling == "plain"))
    return read_json(path)


def saved_places(run: RunFolder) -> list[dict[str, Any]]:
    """Lines of training that have a checkpoint, with all rollouts spent by then."""
    config, events, saved = run.config, run.effective_events(), {}
    places = []
    for line in run.metrics():
        branch, step = line["branch"], line["compute_step"]
        if branch not in saved:
            saved[branch] = complete_checkpoints(run.branch(branch), resumable=False)
        if line["policy_step"] in saved[branch]:
            spent = step * config.rollouts_per_step + offline_rollouts(events, before=step)
            places.append(
                {**{name: line[name] for name in ("branch", "policy_step", "compute_step")}, "rollouts": spent}
            )
    return places
