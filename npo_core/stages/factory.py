"""What the trainers of a run are made of: base policy, data, TRL's arguments; every trainer starts from the same."""

import importlib.util
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from ..files import write_table
from ..guidance.fingerprints import tokenizer_of
from ..guidance.sources import GuidanceSource
from ..guidance.verdicts import Verifier, verifier_reward
from ..guidance.verifiers import BoxedVerifier
from ..processes import collect, is_writer, join, process_count
from ..runs.config import RunConfig
from ..runs.folder import RunFolder, runs_folder
from ..runs.launchers import read_launcher
from ..trainer.config import NPOConfig
from ..trainer.dataset import training_schedule
from ..trainer.fsdp import reduced_each_pass, train_sharded
from ..trainer.pictures import never_sampled, picture_limits, pictures_of
from ..trainer.trainer import NPOTrainer
from ..trainer.vllm import engine_of, one_engine
from ..world.data import DataSettings, RowsByUid, checked_rows, hold_out, image_policy, load_data
from ..world.policies import load_policy, load_processor, quiet_transformers
from ..world.pretrained import adapter_settings, check_policy
from ..world.sources import TEST_SEED, made_source
from ..world.speed.heads import score_responses_alone
from ..world.splits import unseen
from ..world.tasks import PathVerifier, make_dataset, sample_problems
from ..world.warmstart import base_policy_folder

HELD_OUT = "held-out"
"""Suite of test prompts that name none."""


@dataclass(frozen=True)
class World:
    """What all runs of a configuration share.

    Attributes:
        base: Folder of the base policy.
        processor: Its processor.
        train: Training rows, one per prompt.
        test: Test rows.
        rows: Training rows by uid, pictures decoded.
        verifier: Verifier of the answers.
    """

    base: Path
    processor: Any
    train: Dataset
    test: Dataset
    rows: Mapping[str, Mapping[str, Any]]
    verifier: Verifier


def prepare(config: RunConfig, quiet: bool = False) -> World:
    """Base policy and data of a configuration; the tiny base policy is made now if it is not there yet.

    Raises:
        ValueError: A policy or a data set that cannot be trained on; the message names all rows that break the rules.
        FileNotFoundError: No such policy or data.
    """
    if config.vllm != "off" and importlib.util.find_spec("vllm") is None:
        raise ValueError(f"vllm is {config.vllm!r}, but vLLM is not installed here: pip install 'npo_core[gpu]'.")
    with join().main_process_first():  # one process downloads or makes what the others then find
        base = base_policy_folder(config, quiet)
    processor = load_processor(base)
    if config.policy != "tiny":
        check_policy(base, processor)
    if config.min_pixels or config.max_pixels:
        image_policy(processor, config.min_pixels, config.max_pixels)
    verifier: Verifier = BoxedVerifier()
    if made := made_source(config, quiet):
        settings, verifier = _reading(config, config.instruction or made.instruction), made.verifier
        kept = {"judged": False, "others": True}  # a source's own verifier reads what it likes
        train = checked_rows(made.train, settings, processor, _refused(config, "train"), **kept)
        test = checked_rows(made.test, settings, processor, _refused(config, "test"), **kept)
        rows: Mapping[str, Mapping[str, Any]] = {row["uid"]: row for row in train}
    elif config.data:
        train, test = _own_data(config, processor)
        rows = RowsByUid(train)
    else:
        verifier = PathVerifier() if config.box_ends else verifier
        train = make_dataset(sample_problems("train", config.train_problems, config.data_seed, config.suites))
        test = make_dataset(sample_problems("test", config.eval_problems, TEST_SEED, config.suites))
        # a step asks for every row n times: read once here, pictures decoded, not n times from the file
        rows = {row["uid"]: row for row in train}
    return World(base=base, processor=processor, train=train, test=test, rows=rows, verifier=verifier)


def _own_data(config: RunConfig, processor: Any) -> tuple[Dataset, Dataset]:
    """Training and test rows of the data that the configuration names."""
    settings = _reading(config, config.instruction)
    train = load_data(settings, processor, _refused(config, "train"))
    if config.test_data:
        settings = replace(settings, source=config.test_data, split=config.test_split)
        test = load_data(settings, processor, _refused(config, "test"))
        if len(test) > config.eval_problems:
            test = hold_out(test, config.eval_problems, config.data_seed)[1]
        test = unseen(train, test)
    else:
        train, test = hold_out(train, config.eval_problems, config.data_seed)
    return train, _with_suites(test)


def _reading(config: RunConfig, instruction: str) -> DataSettings:
    """Where the training rows come from, and what rows must keep to."""
    return DataSettings(
        source=config.data,
        split=config.data_split,
        columns=dict(item.split("=", 1) for item in config.columns),
        instruction=instruction,
        image_root=config.image_root,
        max_prompt_length=config.max_prompt_length,
        skip_refused=config.skip_refused,
    )


def _refused(config: RunConfig, split: str) -> Path | None:
    """File of the refused rows; None in all processes but one, which would replace it while it is written."""
    return runs_folder() / "refused" / f"{config.digest}-{split}.jsonl" if is_writer() else None


def _with_suites(test: Dataset) -> Dataset:
    """Test rows that all have a suite of at least two rows, as an interval needs; the others share one."""
    named = test["suite"][:] if "suite" in test.column_names else [HELD_OUT] * len(test)
    counts = Counter(named)
    suites = [name if counts[name] > 1 else HELD_OUT for name in named]
    kept = [place for place, name in enumerate(suites) if suites.count(name) > 1]
    test = test.remove_columns("suite") if "suite" in test.column_names else test
    return test.add_column("suite", suites).select(kept)


def batch_shape(config: RunConfig, processes: int = 1) -> tuple[int, int]:
    """Rows of a process in a forward pass, and forward passes in an optimiser step.

    Args:
        config: Settings; `micro_batch` counts the rollouts that one process takes at a time.
        processes: Processes that share a step; each gets whole groups.

    Raises:
        ValueError: The step cannot be shared so that every group stays on one process.
    """
    n, step = config.num_generations, config.rollouts_per_step
    if step % (processes * n):
        raise ValueError(
            f"A step has {config.prompts_per_step} prompts, which {processes} processes cannot share evenly; a group "
            f"of {n} rollouts is never split. Make prompts_per_step a multiple of the number of processes."
        )
    if step % (processes * config.micro_batch):
        raise ValueError(
            f"micro_batch is {config.micro_batch}; with {processes} processes it must be a divisor of the "
            f"{step // processes} rollouts that one of them has in a step."
        )
    rows = config.micro_batch * config.group_rows
    if rows % n:
        raise ValueError(
            f"micro_batch is {config.micro_batch} with {config.group_rows} rows in a group of {n} rollouts; "
            f"make it a multiple of {n} where guides are appended."
        )
    return rows // n, step // (processes * config.micro_batch)


def training_arguments(config: RunConfig, output_dir: Path, processor: Any = None) -> NPOConfig:
    """TRL arguments of a run; one optimiser step per rollout batch, as the paper's recipe has it.

    Args:
        config: Settings.
        output_dir: Folder of the checkpoints.
        processor: Processor of the policy, whose picture tokens vLLM must not sample; needed with vLLM only.

    Raises:
        ValueError: A step that the processes cannot share, or a tracker that is not installed.
    """
    rows, passes = batch_shape(config, process_count())
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"report_to names {tracker}, which is not installed here; pip install {tracker}.")
    arguments = NPOConfig(
        output_dir=str(output_dir),
        run_name=config.run_name,
        seed=config.seed,
        max_steps=config.compute_steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=passes,
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
        guide_prefix=config.guide_prefix,
        mask_unsampled=config.mask_unsampled,
        placement=config.placement,
        guides_per_group=config.guides_per_group,
        scale_rewards=config.advantage_scale,
        entropy_coef=config.entropy_bonus,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        bf16=config.mixed_precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=config.gradient_checkpointing,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=list(config.report_to),
        disable_tqdm=True,
        accelerator_config=reduced_each_pass() if read_launcher(config.launcher).sharded else None,
        **_vllm_arguments(config, processor),
    )
    # without bf16 transformers takes what a variable of the environment says
    arguments.mixed_precision = config.mixed_precision
    return _one_gpu(arguments)


def _one_gpu(arguments: NPOConfig) -> NPOConfig:
    """Let a process that sees several GPUs use one; transformers would copy the policy to all, which TRL refuses."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _vllm_arguments(config: RunConfig, processor: Any) -> dict[str, Any]:
    if config.vllm == "off":
        return {}
    shared = {
        "use_vllm": True,
        "vllm_mode": config.vllm,
        "generation_kwargs": never_sampled(processor),
        "vllm_max_model_length": config.max_prompt_length + config.max_completion_length,
    }
    if config.vllm == "server":
        return {**shared, "vllm_server_host": config.vllm_host, "vllm_server_port": config.vllm_port}
    return {
        **shared,
        "vllm_gpu_memory_utilization": config.vllm_memory,
        "vllm_tensor_parallel_size": config.vllm_tensor_parallel,
        "vllm_enable_sleep_mode": torch.cuda.is_available(),
    }


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
        self.schedule = order.with_transform(_Rows(world.rows, order.column_names), columns=["uid"])
        self._engine: Any | None = None
        self.reward = verifier_reward(world.verifier)

    def prompts(self, steps: int) -> set[str]:
        """Uids of the prompts of the first `steps` steps."""
        return set(self.schedule.with_format(None)["uid"][: steps * self.config.prompts_per_step])

    def __call__(
        self, output_dir: Path, guidance: GuidanceSource | None = None, callbacks: Sequence[TrainerCallback] = ()
    ) -> NPOTrainer:
        """A fresh trainer that writes its checkpoints to `output_dir`."""
        set_seed(self.config.seed)
        limits = picture_limits(self.config.min_pixels, self.config.max_pixels)
        with quiet_transformers(), one_engine(self.config.vllm, self._engine, **limits):
            trainer = NPOTrainer(
                model=self.policy(),
                reward_funcs=self.reward,
                args=training_arguments(self.config, output_dir, self.world.processor),
                train_dataset=self.schedule,
                processing_class=self.world.processor,
                callbacks=list(callbacks),
                peft_config=adapter_settings(self.config),
                verifier=self.world.verifier,
                guidance=guidance,
                rollout_sink=None if self.run is None else _RolloutTables(self.run, self.world, output_dir.name),
            )
        if read_launcher(self.config.launcher).sharded:
            train_sharded(trainer)
        else:
            score_responses_alone(trainer.model)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        self._engine = engine_of(trainer)
        return trainer

    def policy(self, folder: Path | None = None) -> PreTrainedModel:
        """The base policy as it is trained, without adapters (None), or the policy of a folder, whole, to compare."""
        config = self.config
        share = folder is not None or not read_launcher(config.launcher).sharded
        folder = self.world.base if folder is None else folder
        return load_policy(folder, config.freeze_vision, config.dtype, config.attention, share)


class _Rows:
    """Rows that a batch asks for by uid, each read once however often it is asked for."""

    def __init__(self, rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]):
        self.rows, self.columns = rows, list(columns)

    def __call__(self, asked: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        found = {uid: self.rows[uid] for uid in dict.fromkeys(asked["uid"])}
        return {name: [found[uid][name] for uid in asked["uid"]] for name in self.columns}


class _RolloutTables:
    """Sink that makes the rollout tables readable on their own: texts, question, answer and picture."""

    def __init__(self, run: RunFolder, world: World, branch: str):
        self.run, self.world, self.branch = run, world, branch

    def __call__(self, policy_step: int, rows: list[dict[str, Any]]) -> None:
        rows = [dict(row) for part in collect(rows) for row in part]
        if not is_writer():
            return
        decode = tokenizer_of(self.world.processor).decode
        for row in rows:
            source = self.world.rows[row["uid"]]
            lost = row.pop("overwritten_ids")
            row["text"] = decode(row["token_ids"], skip_special_tokens=True)
            row["overwritten_text"] = None if lost is None else decode(lost, skip_special_tokens=True)
            row["question"], row["answer"] = source["prompt"][-1]["content"], source["answer"]
            row["picture"] = _png(_picture(source)) if row["slot"] == 0 else None
        write_table(self.run.path / "rollouts" / f"step-{policy_step:05d}-b{self.branch}.parquet", rows)


def _picture(row: Mapping[str, Any]) -> Image.Image | None:
    """The picture of a row as it is seen, the first of several, or None."""
    return next(iter(pictures_of(row)), None)


def _png(picture: Image.Image | None) -> bytes | None:
    if picture is None:
        return None
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
