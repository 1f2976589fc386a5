"""vLLM as TRL runs it, also for what is sampled off line: caches, probes, evaluation.

What is added to TRL's use of vLLM:

1. One engine per process for a whole run. A roll-back makes a new trainer, and vLLM does not give memory back inside a
   process; the new trainer takes over the old one's engine and sends it its own weights before it samples.
2. Off-line rollouts of the policy that a trainer holds, with other sampling settings than training's.
3. Image tokens: never sampled (a sampled one stands for no picture, and the next forward pass fails), and in mode
   colocate handed over once per picture, because vLLM expands them itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel
from trl.generation import vllm_generation
from trl.models import prepare_fsdp  # pyright: ignore[reportPrivateImportUsage] (TRL loads its names late)

from .fsdp import reshard
from .inputs import prompt_tokens
from .pictures import collapse_pictures, pictures_of
from .sampling import Generate

if TYPE_CHECKING:
    from .trainer import NPOTrainer


def engine_of(trainer: "NPOTrainer") -> Any | None:
    """What trainers of a run share: the colocated engine, or the writing process's connection to the server."""
    if not trainer.use_vllm:
        return None
    generation = trainer.vllm_generation
    return generation.llm if trainer.vllm_mode == "colocate" else getattr(generation, "vllm_client", None)


@contextmanager
def one_engine(mode: str, engine: Any | None, **settings: Any) -> Iterator[None]:
    """Trainers that are made in this block take over an engine, or a connection, in place of one of their own.

    Args:
        mode: "off", "colocate" or "server".
        engine: `engine_of` an earlier trainer of the same policy and settings, or None: then one is made.
        **settings: Settings of vLLM's `LLM` beside those that TRL gives to a colocated engine that is started.
    """
    name = {"colocate": "LLM", "server": "VLLMClient"}.get(mode)
    if name is None or (engine is None and (mode == "server" or not settings)):
        yield
        return
    made = getattr(vllm_generation, name)
    taken = partial(made, **settings) if engine is None else lambda **_: _TakenOver(engine)
    setattr(vllm_generation, name, taken)
    try:
        yield
    finally:
        setattr(vllm_generation, name, made)


class _TakenOver:
    """An engine or a connection that is there already, where TRL takes it for a fresh one."""

    def __init__(self, engine: Any):
        self._engine = engine._engine if isinstance(engine, _TakenOver) else engine

    def sleep(self, level: int = 1) -> None:
        """TRL sends a fresh engine to sleep; this one may sleep already."""
        if not self._engine.llm_engine.is_sleeping():
            self._engine.sleep(level=level)

    def init_communicator(self, **settings: Any) -> None:
        """TRL opens the channel for weights; this one is open."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def place(trainer: "NPOTrainer", checkpoint: Path | None = None) -> None:
    """Bring a policy that was not trained yet in this sitting to where it can be sampled from.

    Training does this by itself: it shards the policy (FSDP) and loads the checkpoint that it resumes from.

    Args:
        trainer: A fresh trainer.
        checkpoint: Checkpoint whose weights are loaded, or None.
    """
    if trainer.is_fsdp_enabled:
        trainer.model = trainer.model_wrapped = cast(PreTrainedModel, prepare_fsdp(trainer.model, trainer.accelerator))
    if checkpoint is not None:
        trainer._load_from_checkpoint(str(checkpoint))


def trainer_generate(trainer: "NPOTrainer") -> Generate | None:
    """How the policy that a trainer holds is sampled off line: by its vLLM, its weights sent first; None without one.

    vLLM draws from its own random state, so what it samples cannot be repeated bit for bit.
    """
    if not trainer.use_vllm:
        return None
    engine, processor = trainer.vllm_generation, trainer.processing_class

    def generate(rows: Sequence[Mapping[str, Any]], k: int, sampling: Mapping[str, Any]) -> list[list[int]]:
        reshard(trainer.model)  # it may have scored since it was trained
        engine.sync_weights()
        trainer._last_loaded_step = trainer.state.global_step
        asked, _ = prompt_tokens(processor, rows, trainer.chat_template_kwargs)
        prompt_ids = [ids for ids in asked for _ in range(k)]
        shown = [pictures_of(row) or None for row in rows for _ in range(k)]
        images = shown if any(shown) else None
        if images is not None and trainer.vllm_mode == "colocate":
            prompt_ids = collapse_pictures(prompt_ids, processor)
        kept = {name: getattr(engine, name) for name in sampling}
        try:
            for name, value in sampling.items():
                setattr(engine, name, value)
            _, completions, _, _ = engine.generate(prompts=prompt_ids, images=images, num_generations=k)
        finally:
            for name, value in kept.items():
                setattr(engine, name, value)
        return [list(ids) for ids in completions]

    return generate
