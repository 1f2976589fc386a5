"""The plan's memory against what a process takes: training, sampling and scoring with a Qwen3-VL of random weights.

No weight is downloaded: sizes are those of the published configuration, and memory does not depend on what the weights
are. Such a policy hardly ever ends a response, so every one is as long as allowed, which is what the plan counts. The
tokenizer is the small world's, whose words are the first of the vocabulary; its pictures are shown enlarged.
"""

import gc
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..guidance.verifiers import BoxedVerifier
from ..processes import own_device
from ..runs.config import RunConfig, resolve_config
from ..runs.launchers import Launcher
from ..trainer.inputs import encode_prompts
from ..trainer.sampling import completion_logps
from ..world.computing import precision, run_policy
from ..world.policies import CHAT_TEMPLATE, TinyQwen3VLProcessor, build_tokenizer, quiet_transformers, save_policy
from ..world.pretrained import policy_config, policy_size
from ..world.tasks import make_dataset, sample_problems, vocabulary
from . import run as stages
from .clocks import wall_clock
from .cost import GIB, step_memory

if TYPE_CHECKING:
    from .gpu_parts import Report

POLICY = "Qwen/Qwen3-VL-2B-Instruct"
"""Whose sizes the policy has; the name is enough for its plan."""

SMALL_POLICY = {
    "text": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 4096},
    "vision": {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256,
               "deepstack_visual_indexes": [0]},
}  # fmt: skip
"""What a rehearsal makes smaller."""

LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "all weights, in bfloat16": {"dtype": "bfloat16", "lora_rank": 0, "freeze_vision": True},
    "adapters, as preset gpu": {},
}
"""How it is trained, as changes of preset `gpu`."""

SIZES = {"vllm": "off", "gpu_memory": 0.0, "prompts_per_step": 4, "micro_batch": 8, "compute_steps": 2}
"""A step of 32 rollouts in 4 passes, sampled by transformers; the second step has Adam's moments from its beginning."""

TOKENS, SMALL_TOKENS = 96, 16
"""Tokens of a response."""

PIXELS, SMALL_PIXELS = 512 * 512, 64 * 64
"""Least pixels that a picture is shown with: 256 vision tokens, or 4."""


def random_config(small: bool, processor: TinyQwen3VLProcessor) -> Qwen3VLConfig:
    """Configuration of the published Qwen3-VL of 2B, or of a much smaller one, with the processor's special tokens."""
    config = policy_config(POLICY)
    for part, changes in SMALL_POLICY.items() if small else ():
        for name, value in changes.items():
            setattr(getattr(config, f"{part}_config"), name, value)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(processor, name))
    for place in (config, config.text_config):
        place.pad_token_id, place.eos_token_id = processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id
    return config


def random_processor(small: bool) -> TinyQwen3VLProcessor:
    """Processor with the small world's words and the pictures of Qwen3-VL: patches of 16 pixels, merged 2 × 2."""
    size = {"shortest_edge": SMALL_PIXELS if small else PIXELS, "longest_edge": 1 << 20}
    images = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, temporal_patch_size=2, size=size)
    return TinyQwen3VLProcessor(images, build_tokenizer(vocabulary()), chat_template=CHAT_TEMPLATE)


def compare_memory(report: "Report", folder: Path, small: bool) -> None:
    """Measure each layout beside its plan, and note both, in GiB.

    Args:
        report: Gets the rows.
        folder: Where the policy is written, 4 GiB.
        small: A rehearsal on the CPU, whose peak is that of the process in all, Python and libraries with it.
    """
    processor = random_processor(small)
    config, device = random_config(small, processor), own_device()
    with torch.device(device), quiet_transformers():
        policy = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    policy.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    policy.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    report.add("parameters of the policy", policy.num_parameters(), "")
    save_policy(policy, processor, folder)
    del policy
    _free()
    world = _world(folder, processor)
    for name, changes in LAYOUTS.items():
        settings = resolve_config("grpo", "gpu", 0, {
            **SIZES, "policy": str(folder), "max_completion_length": SMALL_TOKENS if small else TOKENS, **changes,
        })  # fmt: skip
        _layout(report, name, settings, world)
        _free()
    shutil.rmtree(folder)


def _world(folder: Path, processor: TinyQwen3VLProcessor) -> stages.World:
    problems = make_dataset(sample_problems("train", 8, 0))
    rows = {row["uid"]: row for row in problems}
    return stages.World(folder, processor, problems, problems, rows, BoxedVerifier())


def _layout(report: "Report", name: str, config: RunConfig, world: stages.World) -> None:
    """Peaks of one layout beside the plan's, whose prompt is as long as the longest here."""
    width = encode_prompts(world.processor, list(world.train))["input_ids"].shape[1]
    config = config.with_changes(max_prompt_length=width)
    deciding = config.with_changes(method="autonpo")
    size = policy_size(config, policy_config(config.policy))
    plan, decided = step_memory(config, size, Launcher()), step_memory(deciding, size, Launcher())
    report.add(f"{name}: trained parameters", size.trained, "")
    peaks = _Peaks()
    with tempfile.TemporaryDirectory() as folder:
        trainer = stages.TrainerMaker(config, world)(Path(folder), None, [peaks])
        trainer.args.save_strategy = "no"
        peaks.watch(trainer)
        trainer.train()
    _compare(report, f"{name}: sampling", plan.sampling, max(peaks.sampling))
    _compare(report, f"{name}: training", plan.training, peaks.training[-1])
    report.add(f"{name}: a step", statistics.fmean(peaks.seconds), "s")
    learner = run_policy(config, world.base)
    learner.requires_grad_(False)  # as `Offline` holds it
    rows = list(world.train)[: config.score_batch]
    word = world.processor.tokenizer.convert_tokens_to_ids("user")  # any that stands for no picture
    responses = [[word] * config.max_completion_length] * len(rows)
    _reset()
    with precision(config):
        completion_logps(learner, world.processor, rows, responses, config.score_batch)
    _compare(report, f"{name}: a decision (second policy, scoring)", decided.deciding, _peak())


def _compare(report: "Report", what: str, planned: int, measured: int) -> None:
    """Note what was planned and what was measured; on a CPU no ratio of the two, which are not of one kind there."""
    report.add(f"{what}, by the plan", planned / GIB, "GiB")
    report.add(f"{what}, {_measured()}", measured / GIB, "GiB")
    if torch.cuda.is_available():
        report.add(f"{what}, plan / peak", planned / measured, "ratio")


def _measured() -> str:
    return "peak" if torch.cuda.is_available() else "peak of the process"


class _Peaks(TrainerCallback):
    """Peak memory of each step, of its sampling and of its training apart, in bytes; and its seconds."""

    def __init__(self):
        self.sampling: list[int] = []
        self.training: list[int] = []
        self.seconds: list[float] = []

    def watch(self, trainer: Any) -> None:
        """Look at the memory where sampling ends, for which transformers has no event."""
        sample = trainer._generate_and_score_completions

        def watched(inputs):
            _reset()
            output = sample(inputs)
            self.sampling.append(_peak())
            _reset()
            return output

        trainer._generate_and_score_completions = watched
        self._now = wall_clock(trainer.accelerator.device)

    def on_step_begin(self, *args, **kwargs):
        self._begin = self._now()

    def on_step_end(self, *args, **kwargs):
        self.training.append(_peak())
        self.seconds.append(self._now() - self._begin)


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    """Bytes that tensors held at most since the last reset; on a CPU those of the process at most, since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
