"""Stages of a run: what a notebook or the command line calls.

`run(config)` does everything from the base policy to `result.json`: a finished run is loaded, an interrupted one goes
on from its last checkpoint. `start(config)` does the same in a process of its own.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..control.auto import AutoNPO
from ..control.baselines import GuidedByOwnPast, GuidedByPolicy
from ..control.controller import Controller
from ..control.scheduled import ScheduledNPO
from ..guidance.fingerprints import tokenizer_digest
from ..notebook import in_one_sentence
from ..processes import agree, is_writer, join
from ..progress import duration, tell
from ..runs.checkpoints import checkpoint_folder
from ..runs.config import RunConfig, resolve_config
from ..runs.folder import RunFolder, offline_rollouts
from ..runs.shared import open_run
from ..trainer.sampling import Generate, sample_rollouts
from ..trainer.vllm import place, trainer_generate
from ..world.computing import precision, run_policy, threads
from ..world.policies import keep_freed_memory, load_processor, quiet_transformers
from ..world.pretrained import policy_folder
from ..world.warmstart import teacher_folder
from .cost import amount, plan, require_room
from .evaluation import evaluate
from .factory import TEST_SEED, TrainerMaker, World, prepare, training_arguments
from .prefix import take_prefix

__all__ = [
    "CONTROLLERS",
    "TrainerMaker",
    "World",
    "compare",
    "evaluate_policy",
    "plan",
    "prepare",
    "run",
    "sample_responses",
    "training_arguments",
]

CONTROLLERS: Mapping[str, type[Controller]] = {
    "grpo": Controller,
    "npo": ScheduledNPO,
    "autonpo": AutoNPO,
    "luffy": GuidedByPolicy,
    "exgrpo": GuidedByOwnPast,
    "rlep": GuidedByPolicy,
}
"""What drives the training of each method."""


def run(config: RunConfig, root: Path | None = None, quiet: bool = False, label: str = "") -> RunFolder:
    """Do a whole run, or what is left of it: train, evaluate, write `result.json`.

    Args:
        config: Settings; `config.method` names what is done, see `CONTROLLERS`.
        root: Folder of all runs; the project's `data/runs` if None.
        quiet: Without progress bars.
        label: Name of the run on its bar; its method if there is none.

    Returns:
        The run folder; `RunFolder.result()` holds the scores. A finished run is returned as it is. While another
        process writes the run, this one waits, and then has what that one made or goes on from there.

    Raises:
        Locked: The run is being written on another machine.
    """
    device = join().device
    folder, label = open_run(config, root), label or config.method
    quiet = quiet or not is_writer()
    if (made := folder.result()) is not None:
        if not quiet:
            tell(label, f"loaded, {loaded_words(made)}")
        return folder
    with in_one_sentence(label, folder.reached), folder.writing(quiet):
        if folder.result() is None:  # while this process waited, another one may have finished the run
            _sit(config, folder, root, quiet, device, label)
    return folder


def loaded_words(result: Mapping[str, Any]) -> str:
    """What a finished run was, in words."""
    return f"{result['compute_steps']} steps in {duration(result['wall_seconds'])}"


def _sit(
    config: RunConfig, folder: RunFolder, root: Path | None, quiet: bool, device: torch.device, label: str
) -> None:
    """One sitting of a run, to its end."""
    shared = agree(lambda: take_prefix(folder))
    if shared and not quiet:
        print(f"{folder.path.name}: the first {shared} steps are those of a run on disk")
    keep_freed_memory()
    started = time.monotonic()
    try:
        with threads(config.threads):
            scores = _execute(config, folder, root, quiet, device, label)
    finally:
        folder.event("sitting", seconds=round(time.monotonic() - started, 1))
    folder.finish(_result(folder, *scores))


def _execute(
    config: RunConfig, folder: RunFolder, root: Path | None, quiet: bool, device: torch.device, label: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train what is left to train; scores of the base and of the final policy."""
    guide = _guide_folder(config, root, quiet)
    world = prepare(config, quiet)
    if guide is not None and config.teacher:
        require_same_tokenizer(guide, world.processor)
    size = agree(lambda: require_room(config, folder.path, world.base))
    if not quiet:
        print(f"{folder.path.name}: checkpoints will take {amount(size)}")
    maker = TrainerMaker(config, world, folder)
    base_scores = _base_scores(config, maker, world, folder, device, quiet)
    extra = {} if guide is None else {"guide_folder": guide, "prompts": maker.prompts(config.trained_steps)}
    kind = CONTROLLERS[config.method]
    controller = kind(maker, config, folder, world.rows, world.processor, world.verifier, quiet, **extra)
    controller.label = label
    with quiet_transformers():
        trainer = controller.run()
    policy, generate = trainer.accelerator.unwrap_model(trainer.model), trainer_generate(trainer)
    return base_scores, evaluate_policy(config, policy, world, label, quiet, generate=generate)


def _base_scores(
    config: RunConfig, maker: TrainerMaker, world: World, folder: RunFolder, device: torch.device, quiet: bool
) -> dict[str, Any]:
    """Scores of the base policy, sampled as the run samples: with vLLM by a first trainer, whose engine is kept."""
    if config.vllm == "off":
        return evaluate_policy(config, maker.policy().to(device), world, "base policy", quiet)
    trainer = maker(folder.path / "branches" / "base")
    place(trainer)
    try:
        return evaluate_policy(config, trainer.model, world, "base policy", quiet, generate=trainer_generate(trainer))
    finally:
        del trainer
        gc.collect()  # the next trainer brings a policy of its own


def source_config(config: RunConfig) -> RunConfig:
    """Settings of the earlier GRPO run whose last policy guides a run of method rlep."""
    changes = ("method", "tau_gate", "placement", "guides_per_group", "cache_rollouts")
    plain = asdict(resolve_config("grpo", config.preset, config.seed))
    return config.with_changes(**{name: plain[name] for name in changes}, compute_steps=config.rlep_source_steps)


def _guide_folder(config: RunConfig, root: Path | None, quiet: bool) -> Path | None:
    """Policy that guides a whole run, made now if it is not there yet; None for methods without one."""
    if config.method == "luffy":
        return policy_folder(config.teacher) if config.teacher else teacher_folder(config, quiet)
    if config.method == "rlep":
        earlier = source_config(config)
        if config.vllm == "colocate" and open_run(earlier, root).result() is None:
            raise ValueError(
                "RLEP's earlier run is not finished, and one process holds one vLLM engine. Do it first: "
                f"python -m npo_core run --config {open_run(earlier, root).path / 'config.json'}"
            )
        source = run(earlier, root, quiet)
        return checkpoint_folder(source.branch(0), config.rlep_source_steps)
    return None


def require_same_tokenizer(teacher: Path, processor: Any) -> None:
    """Refuse a teacher whose token ids mean other text before it is asked; one without a tokenizer is taken.

    Raises:
        ValueError: Its tokenizer is another one than the policy's.
    """
    if any(teacher.glob("tokenizer*")) and tokenizer_digest(load_processor(teacher)) != tokenizer_digest(processor):
        raise ValueError(
            f"teacher {teacher} has another tokenizer than the policy, so its token ids would mean other text. Give a "
            "teacher of the same family, or guides made from its text."
        )


def evaluate_policy(
    config: RunConfig,
    model,
    world: World,
    label: str,
    quiet: bool = False,
    plain: bool = False,
    generate: Generate | None = None,
) -> dict[str, Any]:
    """Scores of a policy on the test problems, see `evaluation.evaluate`.

    Args:
        config: Settings.
        model: Policy.
        world: Test problems, processor and verifier.
        label: Words on the progress bar.
        quiet: Without a progress bar.
        plain: Sample as in training, from the whole distribution at the training temperature.
        generate: Samples in place of the model, such as vLLM.
    """
    sampling = {"temperature": config.eval_temperature, "top_p": config.eval_top_p, "top_k": config.eval_top_k}
    with precision(config):
        return evaluate(
            model,
            world.processor,
            list(world.test),
            world.verifier,
            k=config.eval_rollouts,
            seed=TEST_SEED,
            max_new_tokens=config.max_completion_length,
            batch=config.rollout_batch,
            generate=generate,
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
        if event["event"] not in ("rollback", "ahead"):
            continue
        when, distance = event["compute_step"], event.get("distance", 0)
        interventions.append(
            {
                **{name: event[name] for name in ("policy_step", "compute_step")},
                "distance": distance,
                "cached": found["cache"].get(when, {"cached": 0})["cached"],
                **_grounds(distance, found["choice"].get(when), found["planned"].get(when)),
            }
        )
    offline = offline_rollouts(events)
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
    if choice is None:  # AutoNPO without roll-back has no plan and no candidates
        stage = "ahead" if planned is None else planned["stage"]
        return {"stage": stage, **dict.fromkeys(("quality", "variance", "signal", "at_edge"))}
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
    policy = run_policy(config, world.base)
    with precision(config):
        groups = sample_rollouts(
            policy,
            world.processor,
            rows,
            k,
            world.verifier,
            seed=config.seed,
            max_new_tokens=config.max_completion_length,
            score=False,
            batch=config.rollout_batch,
        )
    del policy
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # a run in another process will want this memory
    return [
        {
            "picture": row.get("image"),
            "question": row["prompt"][-1]["content"],
            "answer": row["answer"],
            "responses": [(trajectory.text, trajectory.correct) for trajectory in group],
        }
        for row, group in zip(rows, groups, strict=True)
    ]


def compare(runs: Mapping[str, RunFolder]) -> list[dict[str, Any]]:
    """One line per run for a table: pass rates of base and final policy, both clocks, rollouts, interventions.

    Raises:
        ValueError: A run without a result: it crashed, or was not run to its end.
    """
    with in_one_sentence():
        for label, folder in runs.items():
            if folder.result() is None:
                raise ValueError(
                    f"{label} has no result, as it crashed or was not run to its end; run the cell above again, or "
                    f"look into {folder.path} (process.log, `python -m npo_core check`)."
                )
    return [
        {
            "run": label,
            "base pass rate": round(result["base"]["average"], 3),
            "final pass rate": round(result["final"]["average"], 3),
            "policy steps": result["policy_steps"],
            "compute steps": result["compute_steps"],
            "rollouts": result["rollouts"],
            "interventions": len(result["interventions"]),
            "minutes": round(result["wall_seconds"] / 60, 1),
        }
        for label, result in ((label, folder.result()) for label, folder in runs.items())
    ]
