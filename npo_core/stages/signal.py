"""The signal in a folder of checkpoints, whoever trained them: what a script or the command line calls."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..guidance.verdicts import AnswerVerifier, Verifier
from ..guidance.verifiers import BoxedVerifier
from ..method.premise import in_words
from ..method.quantities import Cost, Quality, Signal
from ..runs.measurement import Pair, plan_pairs, read_premise
from ..runs.settings import SignalSettings
from ..trainer.sampling import ROLLOUT_BATCH
from ..world.computing import Computing
from ..world.data import DataSettings, checked_rows, load_data
from ..world.policies import load_processor, placed_policy, policy_folder
from ..world.pretrained import check_template
from ..world.sources import training_prompts
from .comparable import find_checkpoints
from .measure import Measurement
from .trained import ARGUMENTS, trained_dtype, trained_products

TEACHER = "teacher"
"""Name of the external teacher among the sources."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredSignal:
    """A finished measurement.

    Attributes:
        folder: Its folder, with `table.parquet` and `signal.json`.
        pairs: What was compared.
        summary: Content of `signal.json`.
    """

    folder: Path
    pairs: list[Pair]
    summary: dict[str, Any]


def measure_folder(
    checkpoints: str | Path,
    data: str | Path | DataSettings,
    out: str | Path,
    settings: SignalSettings,
    *,
    verifier: str | Verifier = "boxed",
    base: str | Path | None = None,
    processor: str | Path | None = None,
    teacher: str | Path | None = None,
    origins: Sequence[int] | None = None,
    distances: int = 20,
    also: Sequence[int] = (),
    quiet: bool = False,
    rollout_batch: int = ROLLOUT_BATCH,
    score_batch: int = ROLLOUT_BATCH,
    dtype: str | None = None,
    mixed_precision: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> MeasuredSignal:
    """Measure any run: a folder of Hugging Face checkpoints, a data set, and a verifier.

    Args:
        checkpoints: Folder that holds `checkpoint-<step>` folders.
        data: File, or a folder that `datasets` saved, read as training data is; columns prompt, answer and, for visual
            tasks, image. Or settings of the reader (`DataSettings`), such as columns of other names. Or a source as in
            the setting `data`, such as "reasoning_gym:chain_sum": its training prompts by the seed of `settings`.
        out: Folder of the measurement; a second call with it goes on where the first stopped.
        settings: How to measure.
        verifier: `verifier(text, row) -> Verdict`, "boxed", or "module:name" of a verifier or of its class. With a
            source, "boxed" is the source's own.
        base: Policy that the run started from, step 0: a folder, or a name on the hub, as are the two that follow.
        processor: Policy with the processor or tokenizer; by default the base policy, else the first checkpoint.
        teacher: Policy outside the run, of the same architecture and tokenizer.
        origins: Policy steps to measure from; by default the first, and those a third and two thirds on.
        distances: Distances above 0 from each origin, at most.
        also: Distances beside the grid, where there is a checkpoint.
        quiet: Without a progress bar.
        rollout_batch: Responses that are sampled at a time, at most: fewer where memory asks for it.
        score_batch: Responses that are scored at a time, at most, in the same way.
        dtype: Type of the weights of all policies, one of `computing.DTYPES`; by default that of the checkpoints.
        mixed_precision: Precision of matrix products, one of `computing.PRODUCTS`; by default what the checkpoints'
            `training_args.bin` says, and "no", with a warning, where there is none.
        chat_template_kwargs: Template arguments of the run's prompts, as its TRL argument of this name.

    Raises:
        FileNotFoundError: No checkpoint or data file, or a policy that is neither a folder nor on the hub.
        ValueError: Data, checkpoints or settings that cannot be used.
    """
    base, processor, teacher = (None if one is None else policy_folder(str(one)) for one in (base, processor, teacher))
    found = find_checkpoints(checkpoints, base)
    steps = list(found)
    if origins is None:
        origins = sorted({steps[0], steps[len(steps) // 3], steps[2 * len(steps) // 3]} - {steps[-1]}) or steps[:1]
    policies = {f"{step:06d}": folder for step, folder in found.items()}
    if teacher is not None:
        policies[TEACHER] = teacher
    pairs = plan_pairs(steps, origins, distances, others=[] if teacher is None else [TEACHER], also=also)
    judge = find_verifier(verifier) if isinstance(verifier, str) else verifier
    reader = load_processor(found[steps[0]] if processor is None else processor)
    check_template(found[steps[0]] if processor is None else processor, reader)
    named = "" if isinstance(data, DataSettings) else str(data)
    made = training_prompts(named, settings.prompts, settings.seed, quiet)
    if made is None:
        rows = load_rows(data, reader, answer=isinstance(judge, AnswerVerifier))
    else:
        asked = DataSettings(named, instruction=made[2])
        rows = checked_rows(made[0], asked, reader, judged=False, others=True)
        judge = made[1] if verifier == "boxed" else judge
    computing = _computing([path for path in found.values() if path != base], dtype, mixed_precision)
    measurement = Measurement(
        out,
        policies,
        pairs,
        reader,
        [rows[index] for index in range(min(settings.prompts, len(rows)))],
        judge,
        settings,
        load=partial(placed_policy, dtype=computing.dtype),
        quiet=quiet,
        rollout_batch=rollout_batch,
        score_batch=score_batch,
        computing=computing,
        chat_template_kwargs=chat_template_kwargs,
    )
    return MeasuredSignal(measurement.folder, pairs, measurement.run())


def _computing(checkpoints: list[Path], dtype: str | None, mixed_precision: str | None) -> Computing:
    """The types given, else those of the run that left the checkpoints."""
    dtype = trained_dtype(checkpoints) if dtype is None else dtype
    mixed_precision = trained_products(checkpoints) if mixed_precision is None else mixed_precision
    if mixed_precision is None:
        logger.warning(
            "No checkpoint has a %s that says in which precision the run computed, so matrix products have that of the "
            "weights, %s. If the run had bf16=True, as is TRL's default, set mixed_precision to 'bf16'.",
            ARGUMENTS,
            dtype,
        )
    return Computing(dtype, mixed_precision or "no")


def describe(measured: MeasuredSignal) -> str:
    """The premise and Δ* of each origin in words, and what was computed with, for a terminal."""
    lines = []
    for origin, entry in measured.summary["origins"].items():
        if found := [read_premise(one) for one in entry["premise"]]:
            lines.append(f"From policy step {origin}: {in_words(found, measured.summary['settings']['rollouts'])}")
            lines.append(f"{'Δ':>11}  {'later policy':<22} {'own resample':<22} {'difference':<25} p (Holm)")
            for one in found:
                shown, own, gain = (
                    f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for e in (one.shown, one.own, one.gain)
                )
                lines.append(f"{one.distance:>11}  {shown:<22} {own:<22} {gain:<25} {one.p_holm:.2g}")
            lines.append("")
    lines += [f"{'policy step':>11}  {'S':<24} {'Δ*':>6}  95 % over prompts"]
    for origin, entry in measured.summary["origins"].items():
        for signal in product(Quality, (Cost.KL, Cost.GRADIENT_EXACT)):
            name = Signal(*signal).name
            if name in entry["optimum"]:
                best = entry["optimum"][name]
                edge = ", at the edge" if best["at_edge"] else ""
                interval = "unknown" if best["low"] is None else f"{best['low']:g} to {best['high']:g}"
                lines.append(f"{origin:>11}  {name:<24} {best['distance']:>6g}  {interval}{edge}")
    lines.append(f"Computed with {Computing(**measured.summary['computing'])}.")
    return "\n".join(lines)


def load_rows(data: str | Path | DataSettings, processor, answer: bool = True) -> Dataset:
    """Rows of a data set on disk, read and checked as those of training are, with all their columns.

    Args:
        data: File, or folder of a saved data set; or settings of the reader, such as columns of other names.
        processor: Processor or tokenizer of the policies.
        answer: Every row needs an answer that `BoxedVerifier` can compare.

    Raises:
        FileNotFoundError: There is nothing at `data`.
        ValueError: As `load_data`.
    """
    settings = data if isinstance(data, DataSettings) else DataSettings(str(data), split="")
    if not Path(settings.source).exists():  # else it could be a name on the hub
        raise FileNotFoundError(f"There is no data set at {settings.source}.")
    return load_data(settings, processor, judged=answer, others=True)


def find_verifier(name: str) -> Verifier:
    """The verifier that "boxed" or "module:name" stands for; a class is called without arguments.

    Raises:
        ValueError: No such module or name, or something that cannot be called.
    """
    if name == "boxed":
        return BoxedVerifier()
    module, colon, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier is {name!r}: {error}.") from error
    verifier = found() if isinstance(found, type) else found
    if not callable(verifier):
        raise ValueError(f'verifier is {name!r}; it must be "boxed" or "module:name" of something that can be called.')
    return verifier
