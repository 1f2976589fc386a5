"""Arms of the evidence study: what is compared with what, each a method and a few settings of it.

The preset decides everything else, so all arms share the world, the base policy, the data order and the compute budget.
`python -m npo_core study` runs them over seeds; docs/evidence.md holds the plan that was written before they ran.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..runs.config import RunConfig, resolve_config


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        method: Training method.
        about: What it is, in a few words, for tables.
        kind: "baseline", "npo", or "control" (what the gain of NPO may be due to).
        settings: Settings that differ from the preset's and from the method's own.
        budget: Compute steps over those of the preset; above 1 only for the longer GRPO run.
        grid: Settings in steps, as multiples of the preset's steps between checkpoints (10 in preset cpu).
        rate_of: Preset whose learning rate the arm takes; "" keeps the own.
    """

    method: str
    about: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: float = 1.0
    grid: Mapping[str, int] = field(default_factory=dict)
    rate_of: str = ""

    def changes(self, checkpoint_every: int) -> dict[str, Any]:
        """All settings that differ from the preset's, at its distance between checkpoints."""
        changes = {**self.settings, **{name: count * checkpoint_every for name, count in self.grid.items()}}
        if self.rate_of:
            changes["learning_rate"] = resolve_config("grpo", self.rate_of).learning_rate
        return changes


OWN_FORM = 0.0
"""`teacher_form_share` of a teacher that writes as the base policy's corpus does (`second_form_share`)."""

RLEP_ROLLOUTS = 8
"""Off-line rollouts of each prompt for RLEP: its 64 would be 3,200 steps' worth, as every prompt is met once."""

ARMS: Mapping[str, Arm] = {
    "GRPO": Arm("grpo", "on-policy rollouts alone", "baseline"),
    "GRPO, longer": Arm("grpo", "as many steps as the dearest arm, off-line rollouts counted as steps", "baseline",
                        budget=2.0),
    "GRPO, groups of 16": Arm("grpo", "twice the rollouts of each prompt, none off line", "baseline",
                              {"num_generations": 16}),
    "GRPO, entropy bonus": Arm("grpo", "a bonus on the token entropy", "baseline", {"entropy_bonus": 0.01}),
    "GRPO, best rate": Arm("grpo", "the best of five learning rates", "baseline", rate_of="cpu_tuned"),
    "LUFFY": Arm("luffy", "external teacher that writes another form", "baseline"),
    "LUFFY, base's form": Arm("luffy", "external teacher that writes the base's own form", "baseline",
                              {"teacher_form_share": OWN_FORM}),
    "ExGRPO": Arm("exgrpo", "own past successes", "baseline"),
    "RLEP": Arm("rlep", "converged run, two rollouts appended", "baseline", {"cache_rollouts": RLEP_ROLLOUTS}),
    "NPO early": Arm("npo", "scout, restart and guided window", "npo", {"late_step": 0}),
    "NPO late": Arm("npo", "plateau, roll-back and guided replay", "npo", {"scout_steps": 0}),
    "NPO": Arm("npo", "early and late", "npo"),
    "AutoNPO": Arm("autonpo", "interventions chosen by the run", "npo"),
    "NPO, first steps": Arm("npo", "early stage alone, within the first 30 steps", "npo", {"late_step": 0},
                            grid={"scout_steps": 2, "early_window": 3}),
    "NPO, repeated": Arm("npo", "every 80 steps back by 20, guided up to there again", "npo",
                         grid={"repeat_every": 8, "repeat_back": 2}),
    "NPO, prefix": Arm("npo", "early and late, half of each guide given", "npo", {"guide_prefix": 0.5}),
    "NPO, exact ratio": Arm("npo", "early and late, importance-corrected", "npo", {"ratio_mode": "exact"}),
    "LUFFY, no correction": Arm("luffy", "external teacher, ratio 1", "control", {"ratio_mode": "current"}),
    "NPO, own resample": Arm("npo", "early and late, guide from Δ = 0", "control", {"guide_from": "own"}),
    "NPO, no guide": Arm("npo", "early and late, roll-backs without guidance", "control", {"guide_from": "none"}),
    "NPO, random": Arm("npo", "guided roll-backs at random times and distances", "control",
                       {"random_interventions": 2}),
    "NPO, repeated, own": Arm("npo", "as repeated, guide from Δ = 0", "control", {"guide_from": "own"},
                              grid={"repeat_every": 8, "repeat_back": 2}),
    "NPO, no roll-back": Arm("npo", "every 80 steps an own guide for the prompts ahead", "control",
                             {"repeat_back": 0}, grid={"repeat_every": 8}),
    "AutoNPO, own resample": Arm("autonpo", "its own interventions, guide from Δ = 0", "control",
                                 {"guide_from": "own"}),
    "AutoNPO, no guide": Arm("autonpo", "its own roll-backs without guidance", "control", {"guide_from": "none"}),
}  # fmt: skip
"""Arms in the order of tables. "NPO" without more is early and late in the paper's default ratio mode."""

SHARED = {"checkpoint_keep": 0}
"""Settings of every arm: all checkpoints stay resumable, so that arms can share beginnings and be scored on the way."""


BEGUN_WITH: Mapping[str, Mapping[str, Any]] = {name: {"cache_rollouts": 8} for name in ("cpu", "cpu_tuned")}
"""Settings that the study began with and a preset has changed since (docs/log.md), by preset."""


def shared_settings(preset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings of every run of the study that are not the preset's; what is given in `overrides` goes before."""
    return {**SHARED, **BEGUN_WITH.get(preset, {}), **(overrides or {})}


def arm_config(arm: str, preset: str, seed: int, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Settings of one arm and seed.

    Args:
        arm: Name in `ARMS`.
        preset: Name of a preset.
        seed: Seed of sampling during training.
        overrides: Settings of every arm that are not the preset's.

    Raises:
        ValueError: Unknown arm.
    """
    row = _named(ARMS, arm, "arm")
    shared = shared_settings(preset, overrides)
    every = resolve_config("grpo", preset, seed, shared).checkpoint_every
    config = resolve_config(row.method, preset, seed, {**shared, **row.changes(every)})
    return config.with_changes(compute_steps=round(config.compute_steps * row.budget))


def repeats_grpo(config: RunConfig) -> tuple[str, ...]:
    """Arms that would be a GRPO run with these settings once more, as "best rate" is where the preset has that rate."""
    return tuple(
        name
        for name, row in ARMS.items()
        if name != "GRPO" and row.method == "grpo" and row.budget == 1
        and all(getattr(config, each) == value for each, value in row.changes(config.checkpoint_every).items())
    )  # fmt: skip


def _named(known: Mapping[str, Any], name: str, kind: str) -> Any:
    """What is known by a name, or a ValueError with all names."""
    if name not in known:
        raise ValueError(f"Unknown {kind} {name!r}. Allowed: {', '.join(known)}.")
    return known[name]


def ablation_configs(
    name: str, preset: str, seed: int, overrides: Mapping[str, Any] | None = None
) -> dict[str, RunConfig]:
    """Settings of one ablation: the preset's own value first, then others around it, by label.

    Args:
        name: Name in `ABLATIONS`.
        preset: Name of a preset.
        seed: Seed of sampling during training.
        overrides: Settings of every run that are not the preset's.

    Raises:
        ValueError: Unknown ablation.
    """
    method, values = _named(ABLATIONS, name, "ablation")
    plain = resolve_config(method, preset, seed, shared_settings(preset, overrides))
    runs = {}
    for changes in [{}, *values(plain)]:
        setting = next(iter(changes), next(iter(values(plain)[0])))
        runs[f"{setting} = {changes.get(setting, getattr(plain, setting))}"] = plain.with_changes(**changes)
    return runs


ABLATIONS: Mapping[str, tuple[str, Callable[[RunConfig], list[dict[str, Any]]]]] = {
    "gate": ("npo", lambda plain: [{"tau_gate": value} for value in (0.0, 0.3, 1.0)]),
    "group": (
        "npo",
        lambda plain: [
            {"num_generations": n, "micro_batch": plain.prompts_per_step * n}
            for n in (plain.num_generations // 2, plain.num_generations * 2)
        ],
    ),
    "window": (
        "npo",
        lambda plain: [{"early_window": plain.early_window // 2}, {"early_window": plain.early_window * 3 // 2}],
    ),
    "cache rule": (
        "npo",
        lambda plain: [{"cache_rule": rule, "cache_stop": False} for rule in ("shortest", "closest")],
    ),
    "ratio": ("npo", lambda plain: [{"ratio_mode": mode} for mode in ("exact", "truncated", "shaped")]),
    "trigger": (
        "autonpo",
        lambda plain: [{"trigger_entropy_drop": plain.trigger_entropy_drop * factor} for factor in (0.5, 2.0)],
    ),
    "checkpoints": ("autonpo", lambda plain: [{"checkpoint_every": plain.checkpoint_every * 2}]),
}
"""One setting at a time around NPO (early and late) or AutoNPO: the method, and values other than the preset's."""
