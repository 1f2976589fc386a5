"""Run configuration: one frozen record, made from a preset and overrides, refused early when it makes no sense.

Every choice that the paper leaves open is a field here; `docs/implementation.md` lists each with its source.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from typing import Any

from ..declaration import allowed_text, check_declared, declarations, nearest, refuse_unknown, require
from .settings import Settings
from .validation import DATA_COLUMNS, check_suites

TRACKERS = ("trackio", "wandb", "tensorboard")
"""Trackers that a run may report to; each is a package of its own."""

METHOD_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "luffy": {
        "tau_gate": 1.0,
        "ratio_mode": "shaped",
        "guide_behaviour": "one",
        "advantage_scale": "none",
        "entropy_bonus": 0.001,
    },
    "exgrpo": {"tau_gate": 1.0, "ratio_mode": "shaped"},
    "rlep": {"tau_gate": 1.0, "placement": "append", "guides_per_group": 2, "cache_rollouts": 64},
}
"""What each baseline's own code does, as settings of the one trainer; a preset's values give way to them."""


@dataclass(frozen=True)
class RunConfig(Settings):
    """All settings of one run; `python -m npo_core settings` lists each with its bounds, source and meaning."""

    def __post_init__(self):
        check_declared(self)
        check_suites(self.suites)
        if self.method == "npo" and self.repeat_every:
            self._check_repeats()
        elif self.method == "npo" and not self.random_interventions:
            self._check_interventions()
        suites = 1 if self.data else len(self.suites)  # those of one's own data are not known yet
        each = "" if suites == 1 else f" for each of the {suites} suites"
        require(
            self.eval_problems >= 2 * suites,
            "eval_problems",
            self.eval_problems,
            f"at least two{each}, for an interval",
        )
        require(
            self.easy_share + self.middling_share <= 1,
            "easy_share + middling_share",
            self.easy_share + self.middling_share,
            "at most 1",
        )
        rollouts = self.prompts_per_step * self.num_generations
        require(
            rollouts % self.micro_batch == 0,
            "micro_batch",
            self.micro_batch,
            f"a divisor of prompts_per_step × num_generations = {rollouts}",
        )
        self._check_baselines()
        self._check_pretrained()

    def _check_interventions(self) -> None:
        """Refuse manual interventions that this run could not carry out."""
        early, late, every = self.scout_steps, self.late_step, self.checkpoint_every
        require(bool(early or late), "scout_steps and late_step", (early, late), "above 0, at least one of them")
        if early:
            require(self.early_window >= 1, "early_window", self.early_window, "at least 1")
        if late:
            first = self.early_window if early else 1
            require(
                first <= self.late_start < late and self.late_start % every == 0,
                "late_start",
                self.late_start,
                f"a checkpoint (a multiple of {every}) from {first} to below late_step = {late}",
            )
            kept = (self.checkpoint_keep - 1) * every if self.checkpoint_keep else late
            require(
                late - self.late_start <= kept,
                "late_step - late_start",
                late - self.late_start,
                f"at most {kept}: checkpoint_keep = {self.checkpoint_keep} keeps no older one resumable",
            )
        needed = early + (2 * late - self.late_start if late else self.early_window)
        require(
            needed <= self.compute_steps,
            "compute_steps",
            self.compute_steps,
            f"at least {needed}: what scout, roll-backs and replays take",
        )

    def _check_repeats(self) -> None:
        """Refuse repeated interventions that this run could not carry out."""
        every, back, grid = self.repeat_every, self.repeat_back, self.checkpoint_every
        require(not self.random_interventions, "random_interventions", self.random_interventions, "0 with repeat_every")
        require(every % grid == 0, "repeat_every", every, f"a multiple of checkpoint_every = {grid}")
        require(
            back <= every and back % grid == 0,
            "repeat_back",
            back,
            f"a multiple of checkpoint_every = {grid}, at most repeat_every = {every}",
        )
        kept = (self.checkpoint_keep - 1) * grid if self.checkpoint_keep else back
        require(back <= kept, "repeat_back", back, f"at most {kept}: checkpoint_keep keeps no older one resumable")
        require(
            every + max(back, 1) <= self.compute_steps,
            "compute_steps",
            self.compute_steps,
            f"at least {every + max(back, 1)}: what the first intervention takes",
        )

    def _check_baselines(self) -> None:
        """Refuse settings of the baselines that contradict each other."""
        if self.placement == "replace":
            most = self.num_generations - 1
            require(self.guides_per_group <= most, "guides_per_group", self.guides_per_group, f"at most {most}")
        if self.guides_per_group > 1:
            require(self.method == "rlep", "method", self.method, '"rlep", the one with several guides for a prompt')
        require(
            self.method != "rlep" or self.rlep_source_steps < self.compute_steps,
            "rlep_source_steps",
            self.rlep_source_steps,
            f"below compute_steps = {self.compute_steps}, which pays for the earlier run too",
        )
        require(
            self.method in ("npo", "autonpo") or self.guide_from == "future",
            "guide_from",
            self.guide_from,
            f'"future" for method {self.method}, which has no replay',
        )
        stays = (self.method == "autonpo" and not self.roll_back) or (
            self.method == "npo" and self.repeat_every > 0 and not self.repeat_back
        )
        require(
            not stays or self.guide_from == "future",
            "guide_from",
            self.guide_from,
            '"future" without roll-back, where the policy itself guides and nothing is done twice: "own" would be the '
            'same run, and "none" no intervention at all',
        )
        require(
            self.method == "rlep" or self.placement == "replace",
            "placement",
            self.placement,
            f'"replace" for method {self.method}',
        )
        if self.random_interventions:
            self._check_random_interventions()

    def _check_random_interventions(self) -> None:
        require(self.method == "npo", "random_interventions", self.random_interventions, f"0 for method {self.method}")
        least = 2 * self.checkpoint_every
        require(self.compute_steps >= least, "compute_steps", self.compute_steps, f"at least {least} for a roll-back")
        require(
            self.checkpoint_keep == 0,
            "checkpoint_keep",
            self.checkpoint_keep,
            "0 with random_interventions: a random roll-back may go to any checkpoint",
        )

    def _check_pretrained(self) -> None:
        """Refuse settings of pretrained policies and of data of one's own that make no sense."""
        if self.min_pixels and self.max_pixels:
            require(self.min_pixels <= self.max_pixels, "min_pixels", self.min_pixels, f"at most {self.max_pixels}")
        if self.lora_rank:
            require(bool(self.lora_modules), "lora_modules", self.lora_modules, "one or more names of linear layers")
        for item in self.columns:
            ours, equals, theirs = item.partition("=")
            require(bool(equals and theirs), "columns", item, '"ours=theirs", such as "prompt=question"')
            require(ours in DATA_COLUMNS, "columns", item, f"of our columns, one of {', '.join(DATA_COLUMNS)}")
        for tracker in self.report_to:
            require(tracker in TRACKERS, "report_to", tracker, f"one of {', '.join(TRACKERS)}")
        if not self.data:
            for name in ("test_data", "columns", "instruction", "image_root", "skip_refused"):
                require(not getattr(self, name), name, getattr(self, name), "empty without data, in the small world")
        elif self.policy == "tiny":
            raise ValueError(
                f'data is {self.data!r} with policy "tiny", whose tokenizer knows the small world\'s words only. '
                "Give a pretrained policy: a Hugging Face folder or a hub name."
            )
        if self.warmstart_pass_rate:
            require(
                self.policy == "smollm2" and self.data.partition(":")[0] == "letters",
                "warmstart_pass_rate",
                self.warmstart_pass_rate,
                '0 without policy "smollm2" and data "letters", the task that it is started on',
            )
        if self.vllm != "off":
            length = self.max_prompt_length
            require(length > 0, "max_prompt_length", length, "above 0 with vLLM, which makes room for it beforehand")
        require(
            self.vllm == "server" or self.vllm_tensor_parallel == 1,
            "vllm_tensor_parallel",
            self.vllm_tensor_parallel,
            '1: processes that share an engine would each draw other tokens; one of vllm = "server" may span GPUs',
        )

    @property
    def group_rows(self) -> int:
        """Rows of a group in the loss: its rollouts, and what is appended to them."""
        return self.num_generations + (self.guides_per_group if self.placement == "append" else 0)

    @property
    def digest(self) -> str:
        """First ten hex digits of the SHA-256 of the settings that decide what the run computes."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True, indent=1).encode()).hexdigest()[:10]

    @property
    def run_name(self) -> str:
        """Name of the run folder: method, preset, seed and digest."""
        return f"{self.method}-{self.preset}-s{self.seed}-{self.digest}"

    @property
    def trained_steps(self) -> int:
        """Compute steps that the run trains itself; those of RLEP's earlier run are spent by then."""
        return self.compute_steps - (self.rlep_source_steps if self.method == "rlep" else 0)

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts in an optimiser step."""
        return self.prompts_per_step * self.num_generations

    def deciding(self) -> dict[str, Any]:
        """Settings that decide what the run computes: no trackers and addresses, no later ones as all runs had them."""
        named = {name: setting for name, setting in declarations(self).items() if setting.names_run}
        values = {name: getattr(self, name) for name in named}
        return {name: value for name, value in values.items() if not named[name].later or value != named[name].had}

    def to_json(self) -> str:
        """Canonical JSON text of all settings."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    def with_changes(self, **changes: Any) -> "RunConfig":
        """Copy with some settings changed; unknown names and wrong types are refused."""
        refuse_unknown(changes, type(self))
        return replace(self, **changes)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Configuration from a mapping; what is not named has its default."""
        refuse_unknown(values, cls)
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    @classmethod
    def of_run(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Configuration from a run folder's `config.json`; a setting that came after it is as runs had it then."""
        later = {name: setting.had for name, setting in declarations(cls).items() if setting.later}
        return cls.from_mapping({**later, **values})


def settings_text() -> str:
    """All settings for a terminal, group by group: default, what is allowed, source and meaning."""
    lines, group = [], None
    for one in fields(RunConfig):
        setting = one.metadata["setting"]
        if setting.group != group:
            lines += [*([""] if lines else []), setting.group]
            group = setting.group
        shown = json.dumps(setting.default, ensure_ascii=False)
        lines.append(f"  {one.name:<26} {shown:<14} {setting.help} [{allowed_text(one)}; {setting.source}]")
    return "\n".join(lines)


def settings_markdown() -> str:
    """All settings as the Markdown table that ends docs/implementation.md, a row for each and one for each group."""
    lines, group = ["| setting | default | allowed | source | meaning |", "|---|---|---|---|---|"], None
    for one in fields(RunConfig):
        setting = one.metadata["setting"]
        if setting.group != group:
            lines.append(f"| **{setting.group}** | | | | |")
            group = setting.group
        shown = json.dumps(setting.default, ensure_ascii=False)
        allowed = allowed_text(one).replace("'", "`")
        lines.append(f"| `{one.name}` | `{shown}` | {allowed} | {setting.source} | {setting.help} |")
    return "\n".join(lines)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files(__package__) / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """Settings of a preset as a flat mapping; a preset may extend another.

    Raises:
        ValueError: Unknown preset.
    """
    if name not in preset_names():
        raise ValueError(f"Unknown preset {name!r}{nearest(name, preset_names())} Allowed: {preset_names()}.")
    text = (resources.files(__package__) / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    parent = tables.pop("extends", None)
    settings = load_preset(parent) if parent else {}
    for key, value in tables.items():
        settings.update(value if isinstance(value, dict) else {key: value})
    return {**settings, "preset": name}


def resolve_config(
    method: str = "autonpo", preset: str = "cpu", seed: int = 0, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Configuration of a run: the preset, then what the method's own code does, then the overrides.

    Args:
        method: "grpo", "npo", "autonpo", "luffy", "exgrpo" or "rlep".
        preset: Name of a preset, see `preset_names()`.
        seed: Seed of sampling during training.
        overrides: Settings that replace the preset's.

    Raises:
        ValueError: Unknown preset, setting or value; the message names the nearest valid one.
        TypeError: A setting of the wrong type.
    """
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides is {overrides!r}; it must be a mapping of settings to values.")
    for name in ("method", "preset", "seed"):
        if name in overrides:
            raise ValueError(f"{name!r} has a parameter of its own; take it out of overrides.")
    return RunConfig.from_mapping(
        {**load_preset(preset), **METHOD_SETTINGS.get(method, {}), **overrides, "method": method, "seed": seed}
    )


def given_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Changed settings as a command line gives them, each as NAME=VALUE with VALUE in JSON or a bare word.

    Raises:
        ValueError: One has no equals sign.
    """
    overrides = {}
    for item in texts:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: write NAME=VALUE, such as --set tau_gate=0.5.")
        try:
            overrides[name] = json.loads(text)
        except json.JSONDecodeError:
            overrides[name] = text
    return overrides
