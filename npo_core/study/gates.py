"""Gates of the small world: what it must show under GRPO alone before any guided run of the study is planned on it.

The criteria stand in docs/gates.md; here they are code. `python -m npo_core gates` runs the GRPO runs that are missing
(one learning rate after the other, one seed after the other), measures the premise on the first, and writes
`data/results/gates.json` anew after each: a gate whose runs are not all there is undecided. Ours throughout; nothing
here trains with a guide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_json
from ..method.premise import premise
from ..method.stats import mean_interval
from ..runs.config import RunConfig, resolve_config
from ..runs.folder import RunFolder
from ..runs.measurement import RESAMPLE, Pair, SignalSettings, read_pairs
from ..runs.validation import WORLD
from ..stages import run as stages
from ..stages.signal_run import run_measurement, run_policies
from ..streams import GATES
from ..world.tasks import family_of
from .cells import Cell, run_cells
from .findings import SCHEMA, results_folder
from .scores import newest_place, score

RATES = (2.0e-4, 4.0e-4, 6.0e-4, 1.0e-3, 1.5e-3)
"""Learning rates of the sweep; that of preset `cpu` is one of them."""

BONUS = 0.01
"""Entropy bonus of the one setting beside the sweep, at the rate of preset `cpu`."""

SEEDS = (0, 1, 2)

ORIGINS = (0, 100)
"""Policy steps that the premise is measured from: the base policy and one in mid-training."""

DISTANCES = (10, 20, 40, 60)
"""Distances of the premise, in policy steps."""

PROMPTS, ROLLOUTS = 256, 8
"""Prompts of the premise, the first of the training set, and rollouts of each for each policy."""

CHANCE = 0.001
RISE_STEPS, RISE_SHARE, WINDOW = 100, 0.8, 20
PREMISE_FACTOR = 2.0
RISE, PLATEAU, ENTROPY_LEFT = 0.1, 0.02, 0.4
HEADROOM = 0.03
"""Bounds of the gates, see docs/gates.md; pass rates are shares, steps are policy steps."""

FILE = "gates.json"


@dataclass(frozen=True)
class Gate:
    """One gate and what was found.

    Attributes:
        name: "G1" to "G5".
        asked: The criterion in words.
        passed: Whether it is met; None while runs or measurements are missing.
        found: The numbers that decide, by name.
    """

    name: str
    asked: str
    passed: bool | None
    found: Mapping[str, Any]


@dataclass(frozen=True)
class Course:
    """What a GRPO run did, from its metrics: on-policy pass rate over its steps, quarters of it, entropy.

    Attributes:
        start: Mean pass rate of the first 10 steps.
        quarters: Mean pass rate of each quarter of the run.
        risen: Middle of the first `WINDOW` steps whose mean lies `RISE_SHARE` of the way from the start to the top,
            which is the largest mean of so many steps in a row.
        top: That largest mean.
        entropy_left: Mean token entropy of the last 20 steps as a share of that of the first 10.
        test: Test pass rate at the end, mean of the suites.
        suites: The same by suite, and of the base policy.
    """

    start: float
    quarters: tuple[float, float, float, float]
    risen: float
    top: float
    entropy_left: float
    test: float
    suites: Mapping[str, tuple[float, float]]

    @property
    def creep(self) -> float:
        """Last quarter minus the second."""
        return self.quarters[3] - self.quarters[1]

    @property
    def rise(self) -> float:
        """Second quarter minus the start."""
        return self.quarters[1] - self.start


def course(pass_rates: Sequence[float], entropies: Sequence[float]) -> dict[str, Any]:
    """The numbers of a `Course` that come from training, by name.

    Args:
        pass_rates: On-policy pass rate of each step.
        entropies: On-policy token entropy of each step, nats.

    Raises:
        ValueError: Fewer steps than two windows: quarters and rise would mean nothing.
    """
    rates, entropy = np.asarray(pass_rates, dtype=float), np.asarray(entropies, dtype=float)
    if len(rates) < 2 * WINDOW:
        raise ValueError(f"{len(rates)} steps are too few to tell a course; at least {2 * WINDOW} are needed.")
    start = float(rates[:10].mean())
    moving = np.convolve(rates, np.ones(WINDOW) / WINDOW, mode="valid")
    top = float(moving.max())
    first = int(np.argmax(moving >= start + RISE_SHARE * (top - start)))
    return {
        "start": start,
        "quarters": tuple(float(part.mean()) for part in np.array_split(rates, 4)),
        "risen": first + WINDOW / 2,
        "top": top,
        "entropy_left": float(entropy[-20:].mean() / entropy[:10].mean()),
    }


# Runs


def setting(rate: float, bonus: float = 0.0) -> str:
    """Name of a GRPO setting in the results."""
    return f"lr {rate:g}" + (f", entropy bonus {bonus:g}" if bonus else "")


def plan(preset: str = "cpu", seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """GRPO runs of the gates in the order they are made: preset `cpu`'s own first, then the other rates, by seed."""
    cells = []
    for seed in seeds:
        own = resolve_config("grpo", preset, seed)
        rates = [own.learning_rate, *(rate for rate in RATES if rate != own.learning_rate)]
        cells += [Cell(setting(rate), seed, own.with_changes(learning_rate=rate)) for rate in rates]
        cells.append(Cell(setting(own.learning_rate, BONUS), seed, own.with_changes(entropy_bonus=BONUS)))
    return cells


def read_course(run: RunFolder) -> Course | None:
    """Course of a finished run that was scored; None if it is not finished."""
    result = run.result()
    if result is None:
        return None
    lines = run.metrics()
    place = newest_place(run, run.config.compute_steps)
    test = score(run, *place, "plain") if place is not None else result["final"]
    return Course(
        **course([line["npo/pass_rate"] for line in lines], [line["npo/entropy"] for line in lines]),
        test=test["average"],
        suites={name: (result["base"]["suites"][name], rate) for name, rate in test["suites"].items()},
    )


def measure_premise(
    config: RunConfig,
    root: Path | None = None,
    quiet: bool = False,
    origins: Sequence[int] | None = None,
    distances: Sequence[int] | None = None,
) -> dict[str, list[dict]]:
    """Who solves what a policy fails, from each origin at each distance, along a finished GRPO run (resumable).

    It is sampled with the run's own seed, so that runs of several seeds are several draws of failures and resample; the
    gates are defined on seed 0.

    Args:
        config: Settings of the run.
        root: Folder of all runs; the project's `data/runs` if None.
        quiet: Without progress bars.
        origins: Policy steps to measure from; those of the gates if None.
        distances: Distances of the later policies, in policy steps; those of the gates if None.

    Returns:
        Records of `premise.Premise` by origin.
    """
    origins, distances = origins or ORIGINS, distances or DISTANCES
    run, world = RunFolder(config, root), stages.prepare(config, quiet)
    pairs = [Pair(origin, RESAMPLE, 0) for origin in origins]
    pairs += [Pair(origin, f"{origin + distance:06d}", distance) for origin in origins for distance in distances]
    settings = SignalSettings(
        prompts=min(PROMPTS, len(world.train)),
        rollouts=ROLLOUTS,
        scored=1,
        gradients=0,
        max_new_tokens=config.max_completion_length,
        seed=config.seed,
    )
    policies = run_policies(run, world)
    measurement = run_measurement(config, world, run.path / "premise", policies, pairs, settings, quiet)
    measurement.run()
    tables = read_pairs(measurement.folder, pairs)
    found = {}
    for origin in origins:
        here = {pair.distance: sums for pair, sums in tables.items() if pair.origin == origin}
        later = {distance: here[distance].shown for distance in distances}
        records = premise(here[0].failed, here[0].shown, later, GATES.generator(origin))
        found[str(origin)] = [asdict(record) for record in records]
    return found


# Decisions


def g1(config: RunConfig, own: Mapping[int, Course]) -> Gate:
    """No luck, and a rise that a scout is short beside."""
    chance = max(1 / family_of(suite).states ** family_of(suite).lengths[0] for suite in config.suites)
    risen = {seed: one.risen for seed, one in own.items()}
    asked = (
        f"chance at most {CHANCE}; {RISE_SHARE:.0%} of the rise takes at least {RISE_STEPS} steps, mean over the seeds"
    )
    late = float(np.mean(list(risen.values()))) if risen else None
    passed = None if late is None else chance <= CHANCE and late >= RISE_STEPS
    return Gate("G1", asked, passed, {"chance": chance, "risen": late, "risen_by_seed": risen})


def g2(found: Mapping[str, Sequence[Mapping[str, Any]]] | None) -> Gate:
    """The premise: a near future solves far more of what a policy fails than another sample of it does."""
    asked = (
        f"from each of the policy steps {ORIGINS}, at some distance up to {max(DISTANCES)}: share of the failed "
        f"prompts that the later policy solves in {ROLLOUTS} rollouts at least {PREMISE_FACTOR:g} times an own "
        "resample's, 95 % interval of the difference above 0"
    )
    if found is None:
        return Gate("G2", asked, None, {})
    met = {
        origin: [
            record["distance"]
            for record in records
            if record["shown"]["value"] >= PREMISE_FACTOR * record["own"]["value"] and record["gain"]["low"] > 0
        ]
        for origin, records in found.items()
    }
    shares = {
        origin: {"own": records[0]["own"]["value"], **{str(r["distance"]): r["shown"]["value"] for r in records}}
        for origin, records in found.items()
    }
    return Gate("G2", asked, all(met.values()), {"shares": shares, "distances": met, "records": dict(found)})


def g3(own: Mapping[int, Course]) -> Gate:
    """Collapse: a rise, then a plateau on which the entropy has gone."""
    asked = (
        f"preset cpu's rate, means over the seeds: second quarter at least {RISE} above the first ten steps, last "
        f"quarter at most {PLATEAU} above the second, entropy at the end at most {ENTROPY_LEFT} of that at the start"
    )
    if not own:
        return Gate("G3", asked, None, {})
    rise, creep, left = (
        float(np.mean([getattr(one, name) for one in own.values()])) for name in ("rise", "creep", "entropy_left")
    )
    passed = rise >= RISE and creep <= PLATEAU and left <= ENTROPY_LEFT
    by_seed = {
        seed: {"rise": one.rise, "creep": one.creep, "entropy_left": one.entropy_left} for seed, one in own.items()
    }
    return Gate("G3", asked, passed, {"rise": rise, "creep": creep, "entropy_left": left, "by_seed": by_seed})


def g4(own: Mapping[int, Course], others: Mapping[str, Mapping[int, Course]]) -> Gate:
    """Headroom: the plateau is not the end of what can be learnt in as many steps."""
    asked = (
        f"some other GRPO setting ends at least {HEADROOM} above preset cpu: mean over the seeds of the last quarter's "
        "pass rate, with the same steps"
    )
    gains = {
        name: mean_or_none([runs[seed].quarters[3] - own[seed].quarters[3] for seed in runs if seed in own])
        for name, runs in others.items()
    }
    known = {name: gain for name, gain in gains.items() if gain is not None}
    if not known:
        return Gate("G4", asked, None, {})
    best = max(known, key=lambda name: known[name]["value"])
    return Gate("G4", asked, known[best]["value"] >= HEADROOM, {"best": best, "gains": known})


def g5(sweep: Mapping[str, Mapping[int, Course]], rates: Sequence[str], seeds: Sequence[int]) -> Gate:
    """The best rate of five, which preset `cpu_tuned` takes; it must not be the smallest or the largest."""
    asked = (
        f"{len(rates)} learning rates, {len(SEEDS)} seeds each; the best by the test pass rate at the end (temperature "
        "1), mean over the seeds, is neither the smallest nor the largest"
    )
    tests = {name: mean_or_none([one.test for one in sweep[name].values()]) for name in rates if sweep.get(name)}
    if len(tests) < len(rates):
        return Gate("G5", asked, None, {"test": tests})
    best = max(tests, key=lambda name: tests[name]["value"])
    whole = all(set(seeds) <= set(sweep[name]) for name in rates)
    return Gate("G5", asked, (best not in (rates[0], rates[-1])) if whole else None, {"best": best, "test": tests})


def mean_or_none(values: Sequence[float]) -> dict[str, float] | None:
    """Mean with its 95 % t interval over seeds; without an interval where there is one seed, None for none."""
    if not values:
        return None
    if len(values) == 1:
        return {"value": float(values[0]), "n": 1}
    return asdict(mean_interval(np.array(values)))


def decide(
    preset: str = "cpu", seeds: Sequence[int] = SEEDS, root: Path | None = None, premise_found: dict | None = None
) -> dict[str, Any]:
    """All gates from the runs that are there, and the premise if it was measured; what `gates.json` holds."""
    courses: dict[str, dict[int, Course]] = {}
    for cell in plan(preset, seeds):
        found = read_course(cell.folder(root))
        if found is not None:
            courses.setdefault(cell.arm, {})[cell.seed] = found
    config = resolve_config("grpo", preset)
    own_name = setting(config.learning_rate)
    own = courses.get(own_name, {})
    others = {name: runs for name, runs in courses.items() if name != own_name}
    rates = [setting(rate) for rate in RATES]
    gates = [g1(config, own), g2(premise_found), g3(own), g4(own, others), g5(courses, rates, seeds)]
    return {
        "schema": SCHEMA,
        "world": WORLD,
        "preset": preset,
        "seeds": list(seeds),
        "gates": [asdict(gate) for gate in gates],
        "runs": {name: {str(seed): asdict(one) for seed, one in runs.items()} for name, runs in courses.items()},
    }


def run_gates(
    preset: str = "cpu",
    seeds: Sequence[int] = SEEDS,
    root: Path | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run what is missing, one run at a time, write `gates.json` after each and print it; a second call goes on.

    Args:
        preset: Preset in the collapse regime.
        seeds: Seeds of every setting.
        root: Folder of all runs; the project's `data/runs` if None.
        out: Folder of the results; the project's `data/results` if None.
        quiet: Without progress bars.
    """
    found, measured = decide(preset, seeds, root), None
    for cell in plan(preset, seeds):
        run_cells([cell], root, processes=1, quiet=quiet)
        reason = cell.failure(root)
        if reason is not None:
            raise ValueError(f"The run of {cell.arm}, seed {cell.seed}, failed: {reason}")
        measured = measured or measure_premise(cell.config, root, quiet)
        found = decide(preset, seeds, root, measured)
        folder = results_folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, found)
        print(f"{cell.arm}, seed {cell.seed}: {in_words(found)}")
    return found


def in_words(found: Mapping[str, Any]) -> str:
    """The gates in one line."""
    says = {True: "met", False: "not met", None: "undecided"}
    return ", ".join(f"{gate['name']} {says[gate['passed']]}" for gate in found["gates"])
