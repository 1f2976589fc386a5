"""Stages of a run: what a notebook or the command line calls.

`run(config)` does everything from the base policy to `result.json`: a finished run is loaded, an interrupted one goes
on from its last checkpoint. `start(config)` does the same in a process of its own.
"""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from .arguments import NPOConfig
from .autonpo import AutoNPO
from .baselines import GuidedByOwnPast, GuidedByPolicy
from .checkpoints import checkpoint_folder, retention_bytes
from .config import RunConfig, resolve_config
from .controller import Controller
from .evaluation import evaluate
from .interventions import ScheduledNPO
from .policies import keep_freed_memory, load_policy, load_processor, quiet_transformers, tokenizer_of
from .prefix import take_prefix
from .runs import RunFolder
from .sampling import sample_rollouts
from .sources import GuidanceSource
from .tasks import make_dataset, sample_problems, training_schedule
from .trainer import NPOTrainer
from .trajectories import write_rollouts
from .verifiers import BoxedVerifier, verifier_reward
from .warmstart import base_policy_folder, teacher_folder

TEST_SEED = 0
"""Seed of the test problems: one fixed test set for all runs."""

CONTROLLERS: Mapping[str, type[Controller]] = {
    "grpo": Controller,
    "npo": ScheduledNPO,
    "autonpo": AutoNPO,
    "luffy": GuidedByPolicy,
    "exgrpo": GuidedByOwnPast,
    "rlep": GuidedByPolicy,
}
"""What drives the training of each method."""


@dataclass(frozen=True)
class World:
    """What all runs of a configuration share.

    Attributes:
        base: Folder of the base policy.
        processor: Its processor.
        train: Training rows, one per prompt.
        test: Test rows.
        verifier: Verifier of the answers.
    """

    base: Path
    processor: Any
    train: Dataset
    test: Dataset
    verifier: BoxedVerifier


def prepare(config: RunConfig, quiet: bool = False) -> World:
    """Base policy and data of a configuration; the base policy is made now if it is not there yet."""
    base = base_policy_folder(config, quiet)
    return World(
        base=base,
        processor=load_processor(base),
        train=make_dataset(sample_problems("train", config.train_problems, config.data_seed, config.suites)),
        test=make_dataset(sample_problems("test", config.eval_problems, TEST_SEED, config.suites)),
        verifier=BoxedVerifier(),
    )


def training_arguments(config: RunConfig, output_dir: Path) -> NPOConfig:
    """TRL arguments of a run; one optimiser step per rollout batch, as the paper's recipe has it."""
    return NPOConfig(
        output_dir=str(output_dir),
        seed=config.seed,
        max_steps=config.compute_steps,
        per_device_train_batch_size=config.micro_batch // config.num_generations * config.group_rows,
        gradient_accumulation_steps=config.rollouts_per_step // config.micro_batch,
        num_generations=config.group_rows,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        loss_type=config.loss_type,
        beta=0.0,
        tau_gate=config.tau_gate,
        ratio_mode=config.ratio_mode,
        ratio_truncation=config.ratio_truncation,
        ratio_gamma=config.ratio_gamma,
        guide_behaviour=config.guide_behaviour,
        placement=config.placement,
        guides_per_group=config.guides_per_group,
        scale_rewards=config.advantage_scale,
        entropy_coef=config.entropy_bonus,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
    )


class TrainerMaker:
    """Trainer factory of a configuration: every trainer starts from the same base policy and data order.

    Args:
        config: Settings.
        world: Base policy and data.
        run: Run folder that gets the rollout tables; None writes none.
    """

    def __init__(self, config: RunConfig, world: World, run: RunFolder | None = None):
        self.config, self.world, self.run = config, world, run
        order = training_schedule(world.train, config.compute_steps, config.prompts_per_step, config.data_seed)
        # a step asks for every row n times: read once here, pictures decoded, not n times from the file
        rows = {row["uid"]: row for row in world.train}
        self.schedule = order.with_transform(
            lambda asked: {name: [rows[uid][name] for uid in asked["uid"]] for name in order.column_names},
            columns=["uid"],
        )
        self.reward = verifier_reward(world.verifier)

    def __call__(
        self, output_dir: Path, guidance: GuidanceSource | None = None, callbacks: Sequence[TrainerCallback] = ()
    ) -> NPOTrainer:
        """A fresh trainer that writes its checkpoints to `output_dir`."""
        set_seed(self.config.seed)
        with quiet_transformers():
            trainer = NPOTrainer(
                model=load_policy(self.world.base, self.config.freeze_vision),
                reward_funcs=self.reward,
                args=training_arguments(self.config, output_dir),
                train_dataset=self.schedule,
                processing_class=self.world.processor,
                callbacks=list(callbacks),
                verifier=self.world.verifier,
                guidance=guidance,
                rollout_sink=None if self.run is None else _RolloutTables(self.run, self.world, output_dir.name),
            )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer


class _RolloutTables:
    """Sink that makes the rollout tables readable on their own: texts, question, answer and picture."""

    def __init__(self, run: RunFolder, world: World, branch: str):
        self.run, self.world, self.branch = run, world, branch
        self.place = {uid: index for index, uid in enumerate(world.train["uid"])}

    def __call__(self, policy_step: int, rows: list[dict[str, Any]]) -> None:
        decode = tokenizer_of(self.world.processor).decode
        for row in rows:
            source = self.world.train[self.place[row["uid"]]]
            lost = row.pop("overwritten_ids")
            row["text"] = decode(row["token_ids"], skip_special_tokens=True)
            row["overwritten_text"] = None if lost is None else decode(lost, skip_special_tokens=True)
            row["question"], row["answer"] = source["prompt"][-1]["content"], source["answer"]
            row["picture"] = _png(source["image"]) if row["slot"] == 0 else None
        write_rollouts(self.run.path / "rollouts" / f"step-{policy_step:05d}-b{self.branch}.parquet", rows)


def _png(picture) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def run(config: RunConfig, root: Path | None = None, quiet: bool = False) -> RunFolder:
    """Do a whole run, or what is left of it: train, evaluate, write `result.json`.

    Args:
        config: Settings; `config.method` names what is done, see `CONTROLLERS`.
        root: Folder of all runs; the project's `data/runs` if None.
        quiet: Without progress bars.

    Returns:
        The run folder; `RunFolder.result()` holds the scores. A finished run is returned as it is.
    """
    folder = RunFolder(config, root)
    if folder.result() is not None:
        return folder
    shared = take_prefix(folder)
    if shared and not quiet:
        print(f"{folder.path.name}: the first {shared} steps are those of a run on disk")
    keep_freed_memory()
    before, started = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(config.threads)
    try:
        scores = _execute(config, folder, root, quiet)
    finally:
        torch.set_num_threads(before)
        folder.event("sitting", seconds=round(time.monotonic() - started, 1))
    folder.finish(_result(folder, *scores))
    return folder


def _execute(
    config: RunConfig, folder: RunFolder, root: Path | None, quiet: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train what is left to train; scores of the base and of the final policy."""
    world = prepare(config, quiet)
    base = load_policy(world.base)
    checkpoints = -(-config.compute_steps // config.checkpoint_every)
    size = retention_bytes(base.num_parameters(), 4, checkpoints, config.checkpoint_keep)
    if not quiet:
        print(f"{folder.path.name}: checkpoints will take {size / 2**20:.0f} MiB")
    base_scores = evaluate_policy(config, base, world, "base policy", quiet)
    del base
    maker = TrainerMaker(config, world, folder)
    rows = {row["uid"]: row for row in world.train}
    guide = _guide_folder(config, root, quiet)
    extra = {} if guide is None else {"guide_folder": guide}
    kind = CONTROLLERS[config.method]
    controller = kind(maker, config, folder, rows, world.processor, world.verifier, quiet, **extra)
    with quiet_transformers():
        trainer = controller.run()
    return base_scores, evaluate_policy(
        config, trainer.accelerator.unwrap_model(trainer.model), world, config.method, quiet
    )


def source_config(config: RunConfig) -> RunConfig:
    """Settings of the earlier GRPO run whose last policy guides a run of method rlep."""
    changes = ("method", "tau_gate", "placement", "guides_per_group", "cache_rollouts")
    plain = asdict(resolve_config("grpo", config.preset, config.seed))
    return config.with_changes(**{name: plain[name] for name in changes}, compute_steps=config.rlep_source_steps)


def _guide_folder(config: RunConfig, root: Path | None, quiet: bool) -> Path | None:
    """Policy that guides a whole run, made now if it is not there yet; None for methods without one."""
    if config.method == "luffy":
        return teacher_folder(config, quiet)
    if config.method == "rlep":
        source = run(source_config(config), root, quiet)
        return checkpoint_folder(source.path / "branches" / "00", config.rlep_source_steps)
    return None


def evaluate_policy(
    config: RunConfig, model, world: World, label: str, quiet: bool = False, plain: bool = False
) -> dict[str, Any]:
    """Scores of a policy on the test problems, see `evaluation.evaluate`.

    Args:
        config: Settings.
        model: Policy.
        world: Test problems, processor and verifier.
        label: Words on the progress bar.
        quiet: Without a progress bar.
        plain: Sample as in training, from the whole distribution at the training temperature.
    """
    sampling = {"temperature": config.eval_temperature, "top_p": config.eval_top_p, "top_k": config.eval_top_k}
    return evaluate(
        model,
        world.processor,
        list(world.test),
        world.verifier,
        k=config.eval_rollouts,
        seed=TEST_SEED,
        max_new_tokens=config.max_completion_length,
        label=f"evaluation: {label}",
        quiet=quiet,
        **({"temperature": config.temperature, "top_p": 1.0, "top_k": 0} if plain else sampling),
    )


def _result(folder: RunFolder, base: dict, final: dict) -> dict[str, Any]:
    metrics = folder.metrics()
    events = folder.effective_events()
    found = {
        kind: {event["compute_step"]: event for event in events if event["event"] == kind}
        for kind in ("choice", "planned", "cache")
    }
    interventions = []
    for event in events:
        if event["event"] != "rollback":
            continue
        when = event["compute_step"]
        interventions.append(
            {
                **{name: event[name] for name in ("policy_step", "compute_step", "distance")},
                "cached": found["cache"].get(when, {"cached": 0})["cached"],
                **_grounds(event["distance"], found["choice"].get(when), found["planned"].get(when)),
            }
        )
    offline = sum(event["rollouts"] for event in events if event["event"] in ("probe", "cache"))
    return {
        "policy_steps": metrics[-1]["policy_step"],
        "compute_steps": metrics[-1]["compute_step"],
        "rollouts": metrics[-1]["compute_step"] * folder.config.rollouts_per_step + offline,
        "offline_rollouts": offline,
        "wall_seconds": round(sum(event["seconds"] for event in events if event["event"] == "sitting"), 1),
        "base": base,
        "final": final,
        "interventions": interventions,
    }


def _grounds(distance: int, choice: Mapping | None, planned: Mapping | None) -> dict[str, Any]:
    """Why a roll-back happened: the candidates of a choice, or the stage of a schedule, which measures no signal."""
    if choice is None:
        return {"stage": planned["stage"], **dict.fromkeys(("quality", "variance", "signal", "at_edge"))}
    chosen = next(candidate for candidate in choice["candidates"] if candidate["distance"] == distance)
    return {
        **{name: chosen[name] for name in ("quality", "variance", "signal")},
        "at_edge": choice["at_edge"],
        "candidates": choice["candidates"],
    }


def sample_responses(config: RunConfig, count: int = 8, k: int = 4, world: World | None = None) -> list[dict[str, Any]]:
    """Responses of the base policy to test problems, with pictures, for a reader.

    Returns:
        Dictionaries with picture (PIL), question, answer and responses: a list of (text, correct).
    """
    world = prepare(config) if world is None else world
    rows = [world.test[index] for index in range(count)]
    groups = sample_rollouts(
        load_policy(world.base),
        world.processor,
        rows,
        k,
        world.verifier,
        seed=config.seed,
        max_new_tokens=config.max_completion_length,
        score=False,
    )
    return [
        {
            "picture": row["image"],
            "question": row["prompt"][-1]["content"],
            "answer": row["answer"],
            "responses": [(trajectory.text, trajectory.correct) for trajectory in group],
        }
        for row, group in zip(rows, groups, strict=True)
    ]


def plan(config: RunConfig) -> dict[str, str]:
    """What a run will cost, before it starts: a table of names and values with units."""
    model = load_policy(base_policy_folder(config))
    checkpoints = -(-config.compute_steps // config.checkpoint_every)
    disk = retention_bytes(model.num_parameters(), 4, checkpoints, config.checkpoint_keep)
    offline = config.max_interventions * config.probe_prompts * config.probe_rollouts
    rollouts = config.compute_steps * config.rollouts_per_step
    return {
        "policy": f"{config.policy}, {model.num_parameters():,} parameters",
        "optimiser steps (compute clock)": f"{config.compute_steps:,}",
        "rollouts in training": f"{rollouts:,}",
        "rollouts of probes, at most": f"{offline:,}",
        "tokens sampled, at most": f"{(rollouts + offline) * config.max_completion_length:,}",
        "checkpoints": f"{checkpoints}, {disk / 2**20:.0f} MiB on disk",
        "evaluation rollouts": f"{2 * config.eval_problems * config.eval_rollouts:,}",
    }


def compare(runs: Mapping[str, RunFolder]) -> list[dict[str, Any]]:
    """One line per run for a table: final average, base average, both clocks, rollouts, interventions."""
    return [
        {
            "run": label,
            "base": result["base"]["average"],
            "final": result["final"]["average"],
            "policy steps": result["policy_steps"],
            "compute steps": result["compute_steps"],
            "rollouts": result["rollouts"],
            "interventions": len(result["interventions"]),
            "minutes": round(result["wall_seconds"] / 60, 1),
        }
        for label, result in ((label, folder.result()) for label, folder in runs.items())
    ]
