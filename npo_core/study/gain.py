"""Does S = Q/V predict the gain? Guided training from one policy, the same window, the same compute, other guides.

From a policy of a GRPO run, an arm trains a window of steps with the guides of one source: the policy's own resample
(Δ = 0), a later checkpoint, the end of the run, or the external teacher. Everything else is the same: weights and
optimiser state at the start, prompts, number of steps, evaluation. The unguided arm is the GRPO run itself over the
same steps. The gain of an arm is its test pass rate after the window minus that of the unguided arm. Source: ours; the
paper argues from S to the gain and shows no such comparison.

An arm's result is one small JSON file in the GRPO run's folder, so a study goes on where it was stopped.
"""

import gc
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from ..files import read_json, write_json
from ..guidance.fingerprints import tokenizer_digest
from ..guidance.sources import GuidanceWindow
from ..guidance.trajectories import GuidanceCache
from ..lock import Lock
from ..progress import progress
from ..runs.checkpoints import checkpoint_folder, require_complete
from ..runs.config import RunConfig
from ..runs.folder import RunFolder
from ..runs.measurement import RESAMPLE, Pair
from ..stages import run as stages
from ..streams import GAIN
from ..trainer.inputs import end_tokens
from ..trainer.sampling import sample_rollouts
from ..world.computing import precision, run_policy, threads
from ..world.policies import quiet_transformers
from ..world.warmstart import teacher_folder

TEACHER = "teacher"


@dataclass(frozen=True)
class GainPlan:
    """What is compared; fixed before any arm is run.

    Attributes:
        origins: Policy steps that the arms start from.
        distances: Distances of the guides; the end of the run is added.
        window: Guided steps of an arm.
        modes: Ratio modes of the guide slot.
        teacher: Whether the external teacher is a source too.
    """

    origins: tuple[int, ...] = (0, 100)
    distances: tuple[int, ...] = (0, 20, 60, 160)
    window: int = 30
    modes: tuple[str, ...] = ("current", "exact")
    teacher: bool = True

    def pairs(self, last: int) -> list[Pair]:
        """Policies and sources of all arms; `last` is the final step of the run."""
        out = []
        for origin in self.origins:
            distances = sorted({d for d in self.distances if origin + d <= last} | {last - origin})
            out += [Pair(origin, f"{origin + d:06d}" if d else RESAMPLE, d) for d in distances]
            out += [Pair(origin, TEACHER, None)] if self.teacher else []
        return out

    def check(self, config: RunConfig) -> None:
        """Refuse a plan that the GRPO run cannot carry.

        Raises:
            ValueError: A step without checkpoint, or a window past the end of the run.
        """
        every, last = config.checkpoint_every, config.compute_steps
        steps = [*self.origins, *(o + d for o in self.origins for d in self.distances if o + d <= last)]
        steps += [origin + self.window for origin in self.origins]
        off = sorted({step for step in steps if step % every or not 0 <= step <= last})
        if off:
            raise ValueError(
                f"The plan needs checkpoints at {off}; the run has them every {every} steps up to {last}. "
                "Choose origins, distances and a window that are multiples of checkpoint_every."
            )


class _Window(TrainerCallback):
    """Keeps the metrics of a window and ends training with it."""

    def __init__(self, stop: int):
        self.stop, self.lines = stop, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "npo/reward" in logs:
            self.lines.append({name: value for name, value in logs.items() if name.startswith("npo/")})
            control.should_training_stop = state.global_step >= self.stop


class GainStudy:
    """The arms of one seed.

    Args:
        config: Settings of the GRPO run (method "grpo"); its checkpoints at the origins must stay resumable.
        plan: What is compared.
        root: Folder of all runs; the project's `data/runs` if None.
        quiet: Without progress bars.
    """

    def __init__(self, config: RunConfig, plan: GainPlan, root: Path | None = None, quiet: bool = False):
        plan.check(config)
        self.config, self.plan, self.quiet = config, plan, quiet
        self.run_folder: RunFolder = stages.run(config, root, quiet)
        self.folder = self.run_folder.path / "gain"
        self.folder.mkdir(exist_ok=True)
        for origin in plan.origins:
            if origin:
                require_complete(self._checkpoint(origin))
        self.world = stages.prepare(config, quiet)
        self.sources = {TEACHER: teacher_folder(config, quiet)} if plan.teacher else {}
        self.schedule: list[str] = []

    def run(self) -> list[dict[str, Any]]:
        """Run the arms that are left; a record per arm, the unguided ones included. One process at a time does."""
        with Lock(self.folder / "lock.json", f"The gain study {self.folder}").holding():
            return self._run()

    def _run(self) -> list[dict[str, Any]]:
        pairs = self.plan.pairs(self.config.compute_steps)
        arms = [(pair, mode) for pair in pairs for mode in self.plan.modes]
        with progress(len(arms) + len(self.plan.origins), "gain", self.quiet) as bar:
            records = []
            for origin in self.plan.origins:
                records.append(self._kept(f"{origin:06d}-unguided", lambda origin=origin: self._unguided(origin)))
                bar.advance(1, arm=f"{origin} unguided")
            for pair, mode in arms:
                name = f"{pair.origin:06d}-{pair.source}-{mode}"
                records.append(self._kept(name, lambda pair=pair, mode=mode: self._guided(pair, mode)))
                bar.advance(1, arm=f"{pair.origin} {pair.source} {mode}")
        return records

    def _checkpoint(self, step: int) -> Path:
        return checkpoint_folder(self.run_folder.branch(0), step)

    def _kept(self, name: str, make) -> dict[str, Any]:
        """An arm's record from its file, or made now and written."""
        path = self.folder / f"{name}-w{self.plan.window}.json"
        if not path.exists():
            with threads(self.config.threads):
                write_json(path, {"seed": self.config.seed, "window": self.plan.window, **make()})
            gc.collect()
        return read_json(path)

    def _scores(self, model) -> dict[str, Any]:
        scores = stages.evaluate_policy(self.config, model, self.world, "gain", quiet=True)
        return {name: scores[name] for name in ("average", "interval", "suites")}

    def _unguided(self, origin: int) -> dict[str, Any]:
        stop = origin + self.plan.window
        lines = [line for line in self.run_folder.metrics() if origin < line["policy_step"] <= stop]
        final = self._scores(run_policy(self.config, self._checkpoint(stop)))
        return {"origin": origin, "source": "unguided", "distance": None, "mode": None, **_means(lines), "final": final}

    def _guided(self, pair: Pair, mode: str) -> dict[str, Any]:
        config = self.config.with_changes(ratio_mode=mode)
        stop = pair.origin + self.plan.window
        cache, prompts = self._cache(pair)
        watch = _Window(stop)
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            maker = stages.TrainerMaker(config, self.world)
            trainer = maker(Path(folder), GuidanceWindow(cache, pair.origin, stop), [watch])
            trainer.args.save_strategy = "no"
            resume = str(self._checkpoint(pair.origin)) if pair.origin else None
            trainer.train(resume_from_checkpoint=resume)
            final = self._scores(trainer.accelerator.unwrap_model(trainer.model))
        return {
            **{"origin": pair.origin, "source": pair.source, "distance": pair.distance, "mode": mode},
            **{"prompts": prompts, "cached": len(cache), **_means(watch.lines), "final": final},
        }

    def _cache(self, pair: Pair) -> tuple[GuidanceCache, int]:
        """Guides of a source for the prompts of the window, and the number of those prompts."""
        config, processor = self.config, self.world.processor
        start, stop = pair.origin * config.prompts_per_step, (pair.origin + self.plan.window) * config.prompts_per_step
        if not self.schedule:
            schedule = stages.TrainerMaker(config, self.world).schedule
            self.schedule = list(schedule.with_format(None)["uid"])
        uids = list(dict.fromkeys(self.schedule[start:stop]))
        path = self.folder / f"{pair.origin:06d}-{pair.source}-w{self.plan.window}.parquet"
        if not path.exists():
            rows = {row["uid"]: row for row in self.world.train}
            step = pair.origin if pair.source == RESAMPLE else int(pair.source) if pair.source.isdecimal() else -1
            folder = self.sources[pair.source] if step < 0 else self._checkpoint(step) if step else self.world.base
            guide = run_policy(config, folder)
            with precision(config):
                groups = sample_rollouts(
                    guide,
                    processor,
                    [rows[uid] for uid in uids],
                    config.cache_rollouts,
                    self.world.verifier,
                    seed=GAIN.seed(config.seed, pair.origin, pair.source),
                    max_new_tokens=config.max_completion_length,
                    source_step=step,
                    temperature=config.temperature,
                    score_temperature=config.temperature,
                    unsampled=None if config.mask_unsampled else (),
                )
            ends = end_tokens(guide, processor)
            cache = GuidanceCache.empty(processor, ends, config.max_completion_length, rows)
            cache.fill((trajectory for group in groups for trajectory in group), "first")
            cache.save(path)
        return GuidanceCache.load(path, tokenizer_digest(processor)), len(uids)


def _means(lines: list[Mapping[str, Any]]) -> dict[str, float]:
    """On-policy metrics of a window: pass rate and entropy over its last third, replaced slots per step over all."""
    last = lines[-max(1, len(lines) // 3) :]
    guided = [line["npo/guide_kl"] for line in lines if "npo/guide_kl" in line]
    return {
        "pass_rate": float(np.mean([line["npo/pass_rate"] for line in last])),
        "entropy": float(np.mean([line["npo/entropy"] for line in last])),
        "replaced_slots": float(np.mean([line["npo/replaced_slots"] for line in lines])),
        "guide_kl": float(np.mean(guided)) if guided else 0.0,
    }
