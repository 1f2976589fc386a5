"""Run configuration: one frozen record, made from a preset and overrides, refused early when it makes no sense.

Every choice that the paper leaves open is a field here; `docs/implementation.md` lists each with its source.
"""

import ast
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from typing import Any, Literal

from .validation import SUITES, check_suites, nearest, refuse_unknown, require, typed

Method = Literal["grpo", "npo", "autonpo", "luffy", "exgrpo", "rlep"]

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


def _setting(default: Any, help: str, source: str = "ours") -> Any:
    return field(default=default, metadata={"help": help, "source": source})


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run. `RunConfig.describe()` lists each field with its meaning and its source."""

    method: Method = _setting("autonpo", "Training method.", "paper")
    preset: str = _setting("cpu", "Name of the preset that the settings started from.")
    threads: int = _setting(1, "CPU threads of the run; a run is reproducible bit for bit at a fixed number.")
    seed: int = _setting(0, "Seed of sampling during training; the data order has its own seed.")

    # World
    suites: tuple[str, ...] = _setting(SUITES, "Task families, one per benchmark suite.")
    world_seed: int = _setting(0, "Seed that draws which facts are easy, middling and hard.")
    train_problems: int = _setting(1024, "Distinct training prompts.")
    data_seed: int = _setting(0, "Seed of the training prompts and of their order.")
    easy_share: float = _setting(0.4, "Share of facts with error probability `easy_error`.")
    middling_share: float = _setting(0.35, "Share of facts with error probability `middling_error`; the rest is hard.")
    easy_error: float = _setting(0.05, "Probability that the corpus writes an easy fact wrongly.")
    middling_error: float = _setting(0.5, "Probability that the corpus writes a middling fact wrongly.")
    hard_error: float = _setting(1.0, "Probability that the corpus writes a hard fact wrongly, always in the same way.")
    second_form_share: float = _setting(0.1, "Share of corpus responses that write states as letters, not digits.")

    # Policy
    policy: str = _setting("tiny", '"tiny" for the small Qwen3-VL, else a folder in the Hugging Face format.')
    policy_seed: int = _setting(0, "Seed of the tiny policy's initial weights and of its corpus.")
    hidden: int = _setting(64, "Width of the tiny language model.")
    layers: int = _setting(3, "Layers of the tiny language model.")
    heads: int = _setting(2, "Attention heads of the tiny language model.")
    vision_hidden: int = _setting(64, "Width of the tiny vision tower.")
    vision_depth: int = _setting(2, "Layers of the tiny vision tower.")
    freeze_vision: bool = _setting(True, "Train the language model only; the vision tower keeps its weights.")
    warmstart_steps: int = _setting(800, "Supervised steps on the imperfect corpus that make the base policy.")
    warmstart_batch: int = _setting(64, "Responses in a warm-start step.")
    warmstart_learning_rate: float = _setting(2.0e-3, "Peak learning rate of the warm start.")

    # External teacher: a policy of another seed, trained on a clean corpus in another form
    teacher_seed: int = _setting(1, "Seed of the external teacher's initial weights and of its corpus.")
    teacher_form_share: float = _setting(1.0, "Share of the teacher's corpus that writes states as letters.")

    # Training (GRPO)
    compute_steps: int = _setting(400, "Optimiser steps that the run may spend, rolled-back ones included.")
    prompts_per_step: int = _setting(32, "Prompts in a step (paper: 256).", "paper")
    num_generations: int = _setting(8, "Rollouts in a group, n.", "paper")
    micro_batch: int = _setting(256, "Rollouts in a forward pass; a step accumulates as many as it needs.")
    max_completion_length: int = _setting(16, "Longest response in tokens, end of sequence included.", "paper")
    learning_rate: float = _setting(1.0e-4, "AdamW learning rate, constant (paper: 1e-6 for 8B).", "paper")
    weight_decay: float = _setting(0.01, "AdamW weight decay.", "paper")
    max_grad_norm: float = _setting(1.0, "Gradient norm clip.", "paper")
    epsilon: float = _setting(0.2, "Lower clip of the importance ratio.", "paper")
    epsilon_high: float = _setting(0.28, "Upper clip of the importance ratio.", "paper")
    temperature: float = _setting(1.0, "Sampling temperature of rollouts.", "paper")
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo"] = _setting(
        "grpo", "TRL's loss; grpo is the mean over slots of the per-sequence token mean.", "paper"
    )

    # Guidance
    tau_gate: float = _setting(0.6, "A group is gated when its on-policy pass rate is at most this.", "paper")
    ratio_mode: Literal["current", "exact", "truncated", "shaped"] = _setting(
        "current", "Importance ratio of the guide slot.", "paper"
    )
    ratio_truncation: float = _setting(2.0, "Largest weight in ratio mode truncated.")
    ratio_gamma: float = _setting(0.1, "γ of x/(x+γ) in ratio mode shaped.", "paper")
    guide_behaviour: Literal["stored", "one"] = _setting(
        "stored", "Probability of the guide's tokens in its ratio: as sampled, or 1 (LUFFY).", "paper"
    )
    placement: Literal["replace", "append"] = _setting(
        "replace", "Guides take the last slots of a group, or are appended to its n rollouts (RLEP).", "paper"
    )
    guides_per_group: int = _setting(1, "Guides in a guided group.", "paper")
    advantage_scale: Literal["group", "none"] = _setting(
        "group", "Advantages divided by the group's std, or only centred (LUFFY).", "paper"
    )
    entropy_bonus: float = _setting(0.0, "Weight of the mean token entropy in the objective.", "paper")
    guide_from: Literal["future", "own", "none"] = _setting(
        "future", "Guides of a replay: of the later policy, of the policy rolled back to, or none (controls)."
    )
    random_interventions: int = _setting(
        0, "Roll-backs at random steps and distances in place of those planned (control)."
    )
    cache_rollouts: int = _setting(8, "Off-line rollouts per prompt for the guidance cache.")
    cache_rule: Literal["first", "shortest", "closest"] = _setting(
        "first", "Which correct rollout of a prompt is kept as its guide."
    )

    # Baselines: RLEP's earlier run, ExGRPO's replay of own successes
    rlep_source_steps: int = _setting(200, "Steps of the converged run whose last policy guides; they are charged.")
    replay_share: float = _setting(0.5, "Share of the prompts of a step that come from own successes.", "paper")
    replay_start: float = _setting(0.35, "Replay starts when a step's pass rate exceeds this.", "paper")
    replay_keep: int = _setting(8, "Newest correct rollouts of a prompt that are kept for replay.")

    # Manual interventions (method npo); 0 leaves a stage out
    scout_steps: int = _setting(40, "Early stage: length of the scout run, whose last policy is the guide; 0 for none.")
    early_window: int = _setting(40, "Early stage: guided steps after the restart from the base policy.")
    late_step: int = _setting(200, "Late stage: policy step past the plateau, whose policy is the guide; 0 for none.")
    late_start: int = _setting(100, "Late stage: policy step that is rolled back to, the start of the plateau.")

    # Trigger and choice (AutoNPO)
    trigger_ema: float = _setting(0.9, "Weight of the past in the averages of reward and entropy.")
    trigger_window: int = _setting(20, "Steps over which the averages must be flat and falling.")
    trigger_reward_tolerance: float = _setting(0.01, "Largest rise of the reward average over the window.")
    trigger_entropy_drop: float = _setting(0.1, "Smallest relative fall of the entropy average over the window.")
    trigger_warmup: int = _setting(40, "Steps before the first warning.")
    trigger_cooldown: int = _setting(40, "Steps between warnings.")
    max_interventions: int = _setting(3, "Roll-backs in a run.")
    pool_cutoff: float = _setting(0.125, "A prompt enters the mistake pool at a group pass rate of at most this.")
    pool_capacity: int = _setting(4096, "Prompts in the mistake pool.")
    pool_expiry: int = _setting(400, "Steps after which a mistake is forgotten.")
    probe_prompts: int = _setting(64, "Mistakes that a confirmation probe samples.")
    probe_rollouts: int = _setting(8, "Rollouts per prompt in a probe.")
    confirm_quality: float = _setting(0.05, "Probe pass rate below which a warning is dismissed.")
    quality_floor: float = _setting(0.05, "Smallest quality Q̂ of an eligible distance.")
    variance_proxy: Literal["kl", "second_moment", "sequence"] = _setting("kl", "Estimator V̂ of the variance cost.")
    variance_c: float = _setting(3.3, "c of V̂ = exp(c·KL per token), fitted to mode current; 17 for exact.")

    # Checkpoints and logs
    checkpoint_every: int = _setting(10, "Steps between checkpoints; the grid of roll-back distances.", "paper")
    checkpoint_keep: int = _setting(20, "Newest checkpoints of a branch that stay resumable; 0 keeps all.")
    rollout_every: int = _setting(20, "Steps between rollout tables on disk; 0 for none.")

    # Evaluation
    eval_problems: int = _setting(256, "Test prompts, the suites in turn.")
    eval_rollouts: int = _setting(8, "Rollouts per test prompt.")
    eval_temperature: float = _setting(0.7, "Sampling temperature of evaluation.", "paper")
    eval_top_p: float = _setting(0.8, "Nucleus of evaluation sampling.", "paper")
    eval_top_k: int = _setting(20, "Top-k of evaluation sampling.", "paper")

    def __post_init__(self):
        for setting in fields(self):
            object.__setattr__(self, setting.name, typed(setting, getattr(self, setting.name)))
        check_suites(self.suites)
        for name in (
            "easy_share", "middling_share", "easy_error", "middling_error", "hard_error", "second_form_share",
            "teacher_form_share", "tau_gate", "replay_share", "replay_start", "pool_cutoff",
            "confirm_quality", "quality_floor", "eval_top_p",
        ):  # fmt: skip
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from 0 to 1")
        for name in (
            "threads", "train_problems", "warmstart_steps", "warmstart_batch", "compute_steps",
            "prompts_per_step", "micro_batch", "max_completion_length", "cache_rollouts", "trigger_window",
            "pool_capacity", "pool_expiry", "probe_prompts", "probe_rollouts", "checkpoint_every",
            "eval_problems", "eval_rollouts", "guides_per_group", "rlep_source_steps", "replay_keep",
            "hidden", "layers", "heads", "vision_hidden", "vision_depth",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "learning_rate", "warmstart_learning_rate", "temperature", "eval_temperature", "variance_c",
            "ratio_gamma", "ratio_truncation",
        ):  # fmt: skip
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in (
            "seed", "world_seed", "data_seed", "policy_seed", "weight_decay", "max_grad_norm", "epsilon",
            "epsilon_high", "trigger_warmup", "trigger_cooldown", "max_interventions", "checkpoint_keep",
            "rollout_every", "eval_top_k", "scout_steps", "early_window", "late_step", "late_start",
            "teacher_seed", "entropy_bonus", "random_interventions",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        if self.method == "npo" and not self.random_interventions:
            self._check_interventions()
        require(
            self.eval_problems >= 2 * len(self.suites),
            "eval_problems",
            self.eval_problems,
            f"at least two for each of the {len(self.suites)} suites, for an interval",
        )
        require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2")
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

    @property
    def group_rows(self) -> int:
        """Rows of a group in the loss: its rollouts, and what is appended to them."""
        return self.num_generations + (self.guides_per_group if self.placement == "append" else 0)

    @property
    def digest(self) -> str:
        """First ten hex digits of the SHA-256 of all settings."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:10]

    @property
    def run_name(self) -> str:
        """Name of the run folder: method, preset, seed and digest."""
        return f"{self.method}-{self.preset}-s{self.seed}-{self.digest}"

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts in an optimiser step."""
        return self.prompts_per_step * self.num_generations

    def to_json(self) -> str:
        """Canonical JSON text of all settings."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    def with_changes(self, **changes: Any) -> "RunConfig":
        """Copy with some settings changed; unknown names and wrong types are refused."""
        refuse_unknown(changes, [s.name for s in fields(self)])
        return replace(self, **changes)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Configuration from a mapping such as a run folder's `config.json`."""
        refuse_unknown(values, [s.name for s in fields(cls)])
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    @classmethod
    def describe(cls) -> list[tuple[str, str, Any, str, str]]:
        """Rows (name, type, default, source, meaning) of all settings."""
        return [
            (s.name, getattr(s.type, "__name__", str(s.type)), s.default, s.metadata["source"], s.metadata["help"])
            for s in fields(cls)
        ]


def check_parameters(cells: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse a parameter that a notebook does not have; papermill itself only warns.

    Args:
        cells: Sources of the cells run so far; in a notebook that is `In`.
        allowed: Names of the notebook's parameters.

    Raises:
        ValueError: A cell that papermill injected sets another name.
    """
    for source in cells:
        if not source.lstrip().startswith("# Parameters"):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in allowed:
                raise ValueError(f"Unknown parameter {node.id!r}{nearest(node.id, allowed)} Allowed: {allowed}.")


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
    text = (resources.files(__package__) / "presets" / f"{name}.toml").read_text()
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
