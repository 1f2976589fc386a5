"""The base policy of the real model: SmolLM2 after a short supervised start on the task, stopped early.

The published recipes for models of this size begin so, since the model as it comes hardly ever answers in the form that
is asked for. Deviation from them (ours): training stops at the first check where the policy gives the right response
with a chosen mean probability, `warmstart_pass_rate`, and not after a fixed number of steps. Much more of it would
leave nothing to explore. The right response of this task is one text, so its probability needs no sampling. The folder
is kept under a hash of all that decides its weights, but for the rounding of the processor or GPU that made them.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset

from ..files import whole_folder, write_json
from ..progress import progress
from ..runs.config import RunConfig
from ..runs.folder import runs_folder
from ..trainer.sampling import completion_logps, forced_logps
from . import letters
from .computing import precision, threads
from .kept import made_once
from .policies import load_processor, placed_policy, save_policy
from .smollm import FORMAT as CONVERSION
from .smollm import WHEEL_SHA256, smollm_folder

FORMAT = 1
"""Raised when the code changes in a way that makes other weights."""

DECIDING = ("policy_seed", "warmstart_pass_rate", "warmstart_batch", "warmstart_learning_rate", "mixed_precision")
"""Settings that decide the weights, beside the lengths of the words in `data`."""

WARM_UP = 10
"""Steps over which the learning rate rises; then it stays."""

CHECK_EVERY, CHECKED = 2, 24
"""Steps between checks, and problems in a check."""

TRAIL = "warmstart.json"
"""File of a policy folder: the checks on the way."""


@dataclass(frozen=True)
class Check:
    """What a check of the warm start found on fresh problems.

    Attributes:
        step: Supervised steps so far.
        pass_rate: Mean probability of the right response.
        all_wrong: Expected share of groups of 8 rollouts without a right one.
    """

    step: int
    pass_rate: float
    all_wrong: float


def real_digest(config: RunConfig) -> str:
    """Content hash of everything that decides the weights."""
    content = {name: getattr(config, name) for name in DECIDING}
    content |= {
        "lengths": letters.read_source(config.data),
        "package": WHEEL_SHA256,
        "formats": [CONVERSION, FORMAT],
        "task": letters.SYSTEM,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def real_folder(config: RunConfig) -> Path:
    """Where the base policy after its supervised start is kept, whether it is there or not."""
    return runs_folder() / "base" / f"smollm2-letters-{real_digest(config)}"


def real_policy_folder(config: RunConfig, quiet: bool = False) -> Path:
    """Folder of the base policy of the real model, made now if it is not there yet.

    Raises:
        OSError: As `smollm_folder`.
        ValueError: As `smollm_folder` and `warm_start`.
    """
    pretrained = smollm_folder(quiet)
    if not config.warmstart_pass_rate:
        return pretrained
    folder = real_folder(config)
    return made_once(folder, lambda: warm_start(config, pretrained, folder, quiet))


def warm_start(config: RunConfig, pretrained: Path, folder: Path, quiet: bool = False) -> list[Check]:
    """Train the pretrained model on right responses until it gives them often enough, and save it.

    Args:
        config: Settings; only `DECIDING`, `data`, `threads` and the limit `warmstart_steps` matter.
        pretrained: Folder of the model as it comes.
        folder: Where to save; written under another name first, then renamed.
        quiet: Without a progress bar.

    Returns:
        The checks on the way, the last one of the policy that is saved.

    Raises:
        ValueError: `warmstart_steps` do not get there.
    """
    processor = load_processor(pretrained)
    model = placed_policy(pretrained).train()
    source = letters.read_source(config.data)
    batch = config.warmstart_batch
    problems = letters.sample_words("train", config.warmstart_steps * batch, config.policy_seed, source)
    fresh = letters.make_dataset(letters.sample_words("test", CHECKED, config.policy_seed, source))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.warmstart_learning_rate, betas=(0.9, 0.98))
    checks: list[Check] = []
    with threads(config.threads), progress(config.warmstart_steps, "warm start", quiet, stays=False) as bar:
        for step in range(1, config.warmstart_steps + 1):
            rows = letters.make_dataset(problems[(step - 1) * batch : step * batch])
            optimizer.param_groups[0]["lr"] = config.warmstart_learning_rate * min(1.0, step / WARM_UP)
            answers = right_tokens(processor, rows["answer"])
            with precision(config):
                logps = forced_logps(model, processor, list(rows), answers)
            lengths = torch.tensor([len(answer) for answer in answers]).unsqueeze(1)
            loss = -logps[(torch.arange(logps.shape[1]) < lengths).to(logps.device)].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % CHECK_EVERY == 0:
                with precision(config):
                    checks.append(check(model, processor, fresh, step))
            bar.advance(loss=f"{loss.item():.3f}", pass_rate="-" if not checks else f"{checks[-1].pass_rate:.3f}")
            if checks and checks[-1].pass_rate >= config.warmstart_pass_rate:
                break
        else:
            reached = f"{checks[-1].pass_rate:.3f}" if checks else "unknown"
            raise ValueError(
                f"After warmstart_steps = {config.warmstart_steps} the pass rate is {reached}, and warmstart_pass_rate "
                f"is {config.warmstart_pass_rate}. Give more steps, a higher warmstart_learning_rate, or ask for less."
            )
    with whole_folder(folder) as unfinished:
        save_policy(model, processor, unfinished)
        write_json(unfinished / TRAIL, [asdict(one) for one in checks])
    return checks


def check(model, processor, rows: Dataset, step: int) -> Check:
    """How probable the right response is on fresh problems."""
    chances = right_probabilities(model, processor, rows)
    return Check(
        step=step,
        pass_rate=sum(chances) / len(chances),
        all_wrong=sum((1 - chance) ** 8 for chance in chances) / len(chances),
    )


def right_probabilities(model, processor, rows: Dataset) -> list[float]:
    """Probability of each problem's right response, computed and not sampled (ours).

    A text can be written in other tokens than the tokenizer's; those are left out, so it is a lower bound.

    Args:
        model: Policy; its mode is left as it is.
        processor: Its tokenizer.
        rows: Problems with their right response under "answer", see `letters.make_dataset`.
    """
    answers = right_tokens(processor, rows["answer"])
    return [math.exp(sum(logps)) for logps in completion_logps(model, processor, list(rows), answers)]


def right_tokens(processor, answers: Iterable[str]) -> list[Sequence[int]]:
    """Token ids of right responses, end of sequence included."""
    return [processor(answer + processor.eos_token, add_special_tokens=False)["input_ids"] for answer in answers]
