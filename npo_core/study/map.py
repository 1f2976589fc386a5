"""Map of the gain: where does near-future guidance pay at equal compute?

NPO (early and late) and GRPO over learning rate × share of hard facts, in shorter runs. The learning rate sets how soon
and how hard the policy collapses, the share of hard facts how much there is to find beyond the plateau. The plan is in
docs/evidence.md; `python -m npo_core map` runs what is missing and writes `data/results/map.csv`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import write_json, write_whole
from ..method.curve import rank_correlation
from ..method.stats import Estimate, holm, mean_interval
from ..runs.config import RunConfig, resolve_config
from ..runs.folder import RunFolder
from ..runs.validation import WORLD
from ..stages import run as stages
from .cells import Cell, collect, newest_place, plan_cells, score
from .comparisons import Difference, arm_markdown, between, difference
from .findings import SCHEMA, results_folder
from .results import ABOUT as EVIDENCE
from .results import CORNER, MAP, Evidence, ResultsRefused, read_evidence, require_world

LEARNING_RATES = (5.0e-5, 1.0e-4, 3.0e-4)
HARD_SHARES = (0.1, 0.25, 0.4)
"""Shares of hard facts; easy facts keep theirs, middling ones give way."""

SCHEDULE = {
    "compute_steps": 160,
    "scout_steps": 20,
    "early_window": 20,
    "late_step": 80,
    "late_start": 40,
    "checkpoint_keep": 0,
}
"""Length and interventions of the map's runs."""

ARMS = {"GRPO": "grpo", "NPO": "npo"}
ABOUT = "map.json"
"""What made the map, beside it in the folder of results."""

CORNER_ARMS = ("GRPO", "NPO", "NPO, own resample", "NPO, no guide")
CORNER_SEEDS = range(5, 15)
"""Arms and seeds of the follow-up in the cell of the highest learning rate and the most hard facts."""
CORNER_PAIRS = (("NPO", "GRPO"), ("NPO", "NPO, own resample"), ("NPO", "NPO, no guide"), ("NPO, no guide", "GRPO"))
"""Its planned comparisons, the primary one first."""

COLUMNS = (
    *("learning_rate", "hard_share", "seed", "base", "grpo", "npo", "difference", "grpo_policy", "difference_policy"),
    *("plateau", "slope"),
)
"""Columns of the map's table."""


def map_config(
    arm: str,
    preset: str,
    seed: int,
    learning_rate: float,
    hard_share: float,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Settings of one run of the map."""
    return resolve_config(ARMS[arm], preset, seed, _settings(preset, learning_rate, hard_share, overrides))


def _settings(
    preset: str, learning_rate: float, hard_share: float, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a cell of the map changes in a preset."""
    chosen = {**SCHEDULE, **(overrides or {})}
    easy = resolve_config("grpo", preset, overrides=chosen).easy_share
    return {**chosen, "learning_rate": learning_rate, "middling_share": round(1 - easy - hard_share, 6)}


def plan_map(
    preset: str,
    seeds: Sequence[int],
    learning_rates: Sequence[float] = LEARNING_RATES,
    hard_shares: Sequence[float] = HARD_SHARES,
    overrides: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Runs of the map, seed by seed, GRPO before NPO, which shares its beginning."""
    return [
        Cell(arm, seed, map_config(arm, preset, seed, rate, share, overrides))
        for seed in seeds
        for rate in learning_rates
        for share in hard_shares
        for arm in ARMS
    ]


def plan_corner(
    preset: str, seeds: Sequence[int] = CORNER_SEEDS, overrides: Mapping[str, Any] | None = None
) -> list[Cell]:
    """Runs of the follow-up: the map's settings in its corner, with the controls of the study."""
    settings = _settings(preset, max(LEARNING_RATES), max(HARD_SHARES), overrides)
    return plan_cells(preset, seeds, CORNER_ARMS, settings)


def prepare_bases(cells: Sequence[Cell], quiet: bool = False) -> None:
    """Make the base policies of the map before its runs start side by side."""
    for config in {cell.config.middling_share: cell.config for cell in cells}.values():
        stages.prepare(config, quiet)


def collect_map(cells: Sequence[Cell], root: Path | None = None, out: Path | None = None) -> list[Path]:
    """Write `map.csv`, a row per cell and seed, and `map.json`, what made it.

    Columns: learning_rate, hard_share, seed; base, grpo and npo (test pass rates, the last two at the end), difference;
    grpo_policy (GRPO's at the newest checkpoint at or before NPO's last policy step) and difference_policy; plateau and
    slope (mean and change of GRPO's on-policy pass rate over its second half).

    Raises:
        ResultsRefused: A run is neither finished nor failed, or versions are mixed.
    """
    folder = results_folder() if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    failed = [
        {"arm": cell.arm, "seed": cell.seed, "reason": reason, **_axes(cell.config)}
        for cell in cells
        if (reason := cell.failure(root)) is not None
    ]
    runs = {(cell.arm, cell.seed, *_axes(cell.config).values()): cell.folder(root) for cell in cells}
    lost = {(entry["arm"], entry["seed"], entry["learning_rate"], entry["hard_share"]) for entry in failed}
    open_cells = [key for key, run in runs.items() if key not in lost and run.result() is None]
    if open_cells:
        listed = "; ".join(
            f"{arm}, seed {seed}, rate {rate:g}, share {share:g}" for arm, seed, rate, share in open_cells
        )
        raise ResultsRefused(f"{len(open_cells)} runs of the map are missing: {listed}. Run `make map` to the end.")
    made = {
        key: json.loads((run.path / "env.json").read_text(encoding="utf-8"))
        for key, run in runs.items()
        if key not in lost
    }
    versions = {json.dumps([env["python"], env["packages"], env["device"]], sort_keys=True) for env in made.values()}
    if len(versions) > 1:
        raise ResultsRefused("The runs of the map have mixed versions:\n" + "\n".join(sorted(versions)))
    rows = [
        {"learning_rate": rate, "hard_share": share, "seed": seed, **_row(run, runs["NPO", seed, rate, share])}
        for (arm, seed, rate, share), run in runs.items()
        if arm == "GRPO" and not {("GRPO", seed, rate, share), ("NPO", seed, rate, share)} & lost
    ]
    about = {
        "schema": SCHEMA,
        "world": WORLD,
        "schedule": SCHEDULE,
        "failed": failed,
        "versions": [json.loads(text) for text in versions],
        "configurations": [
            {"arm": cell.arm, "seed": cell.seed, "config": json.loads(cell.config.to_json())} for cell in cells
        ],
    }
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_whole(folder / MAP, lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    write_json(folder / ABOUT, about)
    return [folder / MAP, folder / ABOUT]


def _axes(config: RunConfig) -> dict[str, float]:
    share = round(1 - config.easy_share - config.middling_share, 6)
    return {"learning_rate": config.learning_rate, "hard_share": share}


def has_map(out: Path | None = None) -> bool:
    """Whether the folder of results has a map."""
    return ((results_folder() if out is None else Path(out)) / MAP).is_file()


def read_map(out: Path | None = None) -> pd.DataFrame:
    """Rows of the map.

    Raises:
        FileNotFoundError: There is no map.
        ResultsRefused: Another small world, missing columns, or a cell that is there twice.
    """
    path = (results_folder() if out is None else Path(out)) / MAP
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `python -m npo_core map` makes it.")
    made = path.with_name(ABOUT)
    require_world(json.loads(made.read_text()) if made.is_file() else {}, path)
    table = pd.read_csv(path)
    if absent := [name for name in COLUMNS if name not in table.columns]:
        raise ResultsRefused(f"{path} lacks the columns {', '.join(absent)}; `python -m npo_core map` makes it again.")
    repeated = table[table.duplicated(["learning_rate", "hard_share", "seed"])]
    if len(repeated):
        cells = "; ".join(
            f"rate {r.learning_rate:g}, share {r.hard_share:g}, seed {r.seed}" for r in repeated.itertuples()
        )
        raise ResultsRefused(f"{path} has cells twice: {cells}. Remove it and run `make map`.")
    return table


@dataclass(frozen=True)
class MapCell:
    """One learning rate and share of hard facts, over seeds.

    Attributes:
        learning_rate: AdamW's.
        hard_share: Share of hard facts.
        grpo: GRPO's test pass rate at equal compute, mean over seeds.
        depth: How far GRPO's on-policy pass rate of its second half lies below 1, mean over seeds.
        slope: Change of that pass rate over that half, mean over seeds.
        compute: NPO minus GRPO at equal compute, paired by seed.
        policy: The same at equal policy step.
        p_holm: p of `compute`, adjusted by Holm over the cells; NaN with one seed.
    """

    learning_rate: float
    hard_share: float
    grpo: float
    depth: float
    slope: float
    compute: Difference
    policy: Difference
    p_holm: float


def map_cells(table: pd.DataFrame) -> list[MapCell]:
    """The map over seeds, a cell per learning rate and share of hard facts (ours).

    Args:
        table: Rows of `map.csv`.
    """
    found = []
    for (rate, share), rows in table.groupby(["learning_rate", "hard_share"]):
        by_seed = rows.set_index("seed")
        compute, policy = (
            difference(by_seed["npo"], by_seed[column], names=("NPO", "GRPO"), clock=clock)
            for clock, column in (("compute", "grpo"), ("policy", "grpo_policy"))
        )
        grpo, plateau, slope = (float(rows[name].mean()) for name in ("grpo", "plateau", "slope"))
        found.append(MapCell(rate, share, grpo, 1 - plateau, slope, compute, policy, float("nan")))
    tested = [cell.compute.p for cell in found if cell.compute.p is not None]
    adjusted = iter(holm(np.array(tested))) if tested else iter(())
    return [cell if cell.compute.p is None else replace(cell, p_holm=float(next(adjusted))) for cell in found]


def map_relations(table: pd.DataFrame) -> dict[str, Estimate]:
    """Spearman's ρ over the cells of NPO's gain at equal compute with what may explain it, one ρ a seed (ours).

    Args:
        table: Rows of `map.csv`, the same cells for every seed.

    Returns:
        By name (plateau depth, slope, learning rate, hard share) the mean ρ with its t interval over seeds. A seed in
        which one of the two is the same in all cells has no ρ and is left out; no entry for a name with fewer than two.
    """
    causes = {
        "plateau depth": 1 - table["plateau"],
        "slope of the plateau": table["slope"],
        "learning rate": table["learning_rate"],
        "share of hard facts": table["hard_share"],
    }
    found = {}
    for name, values in causes.items():
        pairs = table.assign(cause=values).groupby("seed")[["cause", "difference"]]
        ranks = np.array([rank_correlation(*rows.to_numpy(float).T[:, None])[0] for _, rows in pairs])
        known = ranks[np.isfinite(ranks)]
        if known.size > 1:
            found[name] = mean_interval(known)
    return found


def map_markdown(table: pd.DataFrame) -> str:
    """The map in Markdown: its cells on both clocks, and what the gain goes with. Bold: Holm's p is below 0.05."""
    head = ("learning rate", "hard facts", "GRPO", "its plateau below 1", "its slope", "NPO − GRPO at equal compute")
    lines = ["| " + " | ".join((*head, "p, Holm", "at equal policy step")) + " |", "|" + "---|" * (len(head) + 2)]
    for cell in map_cells(table):
        gain = f"**{cell.compute.text}**" if cell.p_holm < 0.05 else cell.compute.text
        p = "" if np.isnan(cell.p_holm) else f"{cell.p_holm:.3f}"
        costs = [f"{cell.learning_rate:g}", f"{cell.hard_share:g}", f"{cell.grpo:.3f}", f"{cell.depth:.3f}"]
        lines.append("| " + " | ".join((*costs, f"{cell.slope:+.3f}", gain, p, cell.policy.text)) + " |")
    ranks = [
        f"{name} {found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f}), {found.n} seeds"
        for name, found in map_relations(table).items()
    ]
    if ranks:
        lines += ["", "Spearman's ρ over cells of the gain at equal compute with: " + "; ".join(ranks) + "."]
    return "\n".join(lines)


# Follow-up in one cell of the map


def collect_corner(cells: Sequence[Cell], root: Path | None = None, out: Path | None = None) -> list[Path]:
    """Write the follow-up's results, the three files of a study, into their folder; see `evidence.collect`."""
    return collect(cells, root, (results_folder() if out is None else Path(out)) / CORNER)


def read_corner(out: Path | None = None) -> Evidence | None:
    """Results of the follow-up beside the map, None if there are none.

    Raises:
        ResultsRefused: See `results.check_evidence`.
    """
    folder = (results_folder() if out is None else Path(out)) / CORNER
    return read_evidence(folder) if (folder / EVIDENCE).is_file() else None


def corner_differences(evidence: Evidence) -> list[tuple[Difference, float | None]]:
    """The planned comparisons of the follow-up at equal compute, each with its p (docs/evidence.md).

    The first, NPO minus GRPO, is primary and has its own p; the others say what a gain is due to and have Holm's.
    """
    first, *others = [between(evidence, *pair) for pair in CORNER_PAIRS]
    tested = [found.p for found in others if found.p is not None]
    adjusted = iter(holm(np.array(tested))) if tested else iter(())
    return [(first, first.p), *((found, None if found.p is None else float(next(adjusted))) for found in others)]


def corner_markdown(evidence: Evidence) -> str:
    """The follow-up in Markdown: its arms, then its comparisons. Bold: p, for the controls Holm's, is below 0.05."""
    lines = [arm_markdown(evidence), "", "| at equal compute | difference | p | would be found |", "|---|---|---|---|"]
    for found, p in corner_differences(evidence):
        text = f"**{found.text}**" if p is not None and p < 0.05 else found.text
        least = "" if found.detectable is None else f"{found.detectable:.3f}"
        lines.append(f"| {found.arm} − {found.against} | {text} | {'' if p is None else f'{p:.3f}'} | {least} |")
    return "\n".join(lines)


def markdown(out: Path | None = None) -> str:
    """Map and follow-up in Markdown, as far as they are among the results."""
    tables = [map_markdown(read_map(out))] if has_map(out) else []
    corner = read_corner(out)
    return "\n\n".join(tables if corner is None else [*tables, corner_markdown(corner)])


def _row(grpo: RunFolder, npo: RunFolder) -> dict[str, float]:
    rates = [line["npo/pass_rate"] for line in grpo.metrics()]
    half = rates[len(rates) // 2 :]
    tenth = max(1, len(half) // 5)
    finals = [run.result()["final"]["average"] for run in (grpo, npo)]
    place = newest_place(grpo, npo.result()["policy_steps"])
    at_policy = float("nan") if place is None else score(grpo, *place, "paper")["average"]
    return {
        "base": grpo.result()["base"]["average"],
        "grpo": finals[0],
        "npo": finals[1],
        "difference": finals[1] - finals[0],
        "grpo_policy": at_policy,
        "difference_policy": finals[1] - at_policy,
        "plateau": float(np.mean(half)),
        "slope": float(np.mean(half[-tenth:]) - np.mean(half[:tenth])),
    }
