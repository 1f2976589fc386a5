"""The base policy of the small world: a tiny Qwen3-VL, warm-started on an imperfect corpus.

A pretrained model solves some prompts always, some rarely and some almost never. The corpus gives the tiny policy the
same profile: each elementary fact (state, glyph → next state) is written wrongly with its own probability, and the
chain then goes on from the wrong state. A fact goes wrong in any way, so that none is out of reach of exploration: the
right state of a hard fact stays possible, and no wrong state stands out. Part of the corpus names the glyphs of a
picture, as captions do in pretraining; the states alone teach the vision tower to read far more slowly. Deviation from
ordinary supervised fine-tuning: responses are written afresh at every step, so nothing can be memorised but the facts'
distribution.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..declaration import declarations
from ..files import whole_folder
from ..progress import progress
from ..runs.config import RunConfig
from ..runs.folder import runs_folder, shipped_policies
from . import smollm
from .finetune import real_policy_folder
from .kept import made_once
from .policies import TinyPolicySpec, build_processor, build_tiny_policy, save_policy
from .pretrained import policy_folder
from .speed.sharing import share_work
from .tasks import (
    FAMILIES,
    Problem,
    conversation,
    sample_problems,
    vocabulary,
    write_response,
)

WORLD_FIELDS = [name for name, setting in declarations(RunConfig).items() if setting.makes_base]
"""Settings that decide the base policy's weights."""

WARMSTART_PROBLEMS = 4096
"""Distinct training problems that the warm start draws from."""

FORMAT = 3
"""Raised when the world's code changes in a way that makes other base weights."""


def base_digest(config: RunConfig) -> str:
    """Content hash of everything that decides the base policy's weights."""
    content = {name: getattr(config, name) for name in WORLD_FIELDS} | {"format": FORMAT, "vocabulary": vocabulary()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def fact_kinds(config: RunConfig) -> dict[tuple[str, int, int], str]:
    """Kind of each elementary fact (suite, state, glyph index): easy, middling or hard, in these shares of a family."""
    rng = np.random.default_rng(config.world_seed)
    kinds: dict[tuple[str, int, int], str] = {}
    for family in FAMILIES:
        count = len(family.facts)
        easy, middling = round(config.easy_share * count), round(config.middling_share * count)
        of_family = np.array(["easy"] * easy + ["middling"] * middling + ["hard"] * (count - easy - middling))
        rng.shuffle(of_family)
        kinds |= dict(zip(family.facts, of_family.tolist(), strict=True))
    return kinds


def fact_errors(config: RunConfig) -> dict[tuple[str, int, int], float]:
    """Probability with which the corpus writes each elementary fact (suite, state, glyph index) wrongly."""
    error = {"easy": config.easy_error, "middling": config.middling_error, "hard": config.hard_error}
    return {fact: error[kind] for fact, kind in fact_kinds(config).items()}


def imperfect_states(
    problem: Problem, errors: Mapping[tuple[str, int, int], float], rng: np.random.Generator
) -> list[int]:
    """States that the corpus writes: each fact wrong with its own probability, and the chain goes on from there.

    Args:
        problem: The task.
        errors: Probability of writing each fact wrongly, see `fact_errors`; all wrong states are as likely.
        rng: Source of randomness.
    """
    family, state, states = problem.family, problem.start, []
    for glyph in problem.glyphs:
        wrong = rng.random() < errors[problem.suite, state, glyph]
        state = family.rule(state, glyph)
        if wrong:
            state = (state + int(rng.integers(1, family.states))) % family.states
        states.append(state)
    return states


def base_policy_folder(config: RunConfig, quiet: bool = False) -> Path:
    """Folder of the base policy: the given one, the shipped one, or one that is made now and kept.

    Raises:
        FileNotFoundError: `config.policy` names neither a folder nor a model of the hub.
    """
    if config.policy == smollm.NAME:
        return real_policy_folder(config, quiet)
    if config.policy != "tiny":
        return policy_folder(config.policy)
    name = f"tiny-{base_digest(config)}"
    if (shipped_policies() / name / "model.safetensors").is_file():
        return shipped_policies() / name
    folder = runs_folder() / "base" / name
    return made_once(folder, lambda: warm_start(config, folder, quiet))


def teacher_folder(config: RunConfig, quiet: bool = False) -> Path:
    """Folder of the external teacher: the shipped one, or one that is made now and kept; see `teacher_config`."""
    return base_policy_folder(teacher_config(config), quiet)


def teacher_config(config: RunConfig) -> RunConfig:
    """Settings of the external teacher: another seed, warm-started on a clean corpus in another form (ours).

    It solves nearly everything, and says it in words that the base policy hardly uses.

    Raises:
        ValueError: The policy is not the tiny one; its teacher must be given as a folder.
    """
    if config.policy != "tiny":
        raise ValueError(
            f"policy is {config.policy!r}; only the tiny policy has a teacher of its own. Name one in `teacher`."
        )
    if config.teacher_seed == config.policy_seed:
        raise ValueError(f"teacher_seed and policy_seed are both {config.policy_seed}; a teacher is another policy.")
    return config.with_changes(
        policy_seed=config.teacher_seed,
        second_form_share=config.teacher_form_share,
        easy_error=0.0,
        middling_error=0.0,
        hard_error=0.0,
    )


def warm_start(config: RunConfig, folder: Path, quiet: bool = False) -> Path:
    """Train the base policy on the imperfect corpus and save it to `folder` in the Hugging Face format.

    Args:
        config: Settings; only `WORLD_FIELDS` matter.
        folder: Where to save; written under another name first, then renamed.
        quiet: Without a progress bar.
    """
    processor = build_processor(vocabulary())
    spec = TinyPolicySpec(config.hidden, config.layers, config.heads, config.vision_hidden, config.vision_depth)
    model = build_tiny_policy(processor, spec, config.policy_seed)
    share_work(model)
    rng = np.random.default_rng(config.policy_seed)
    errors = fact_errors(config)
    problems = sample_problems("train", WARMSTART_PROBLEMS, seed=config.policy_seed)
    count = len(problems)
    # each picture twice: with its question, and to be read
    prompts = processor.apply_chat_template(
        [conversation(problem, with_picture=True, read=read) for read in (False, True) for problem in problems],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )
    patches = prompts["pixel_values"].view(2 * count, -1, prompts["pixel_values"].shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    with progress(config.warmstart_steps, "warm start", quiet, stays=False) as bar:
        for step in range(config.warmstart_steps):
            for group in optimizer.param_groups:
                group["lr"] = config.warmstart_learning_rate * _schedule(step, config.warmstart_steps)
            chosen = rng.integers(0, count, size=config.warmstart_batch)
            reads = rng.random(config.warmstart_batch) < config.reading_share
            texts = [
                (
                    problems[i].reading
                    if read
                    else write_response(
                        problems[i],
                        imperfect_states(problems[i], errors, rng),
                        second_form=rng.random() < config.second_form_share,
                    )
                )
                + processor.tokenizer.eos_token
                for i, read in zip(chosen, reads, strict=True)
            ]
            chosen = chosen + count * reads
            responses = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
            ids, mask = responses["input_ids"], responses["attention_mask"]
            logits = model(
                input_ids=torch.cat([prompts["input_ids"][chosen], ids], dim=1),
                attention_mask=torch.cat([prompts["attention_mask"][chosen], mask], dim=1),
                mm_token_type_ids=torch.cat([prompts["mm_token_type_ids"][chosen], torch.zeros_like(ids)], dim=1),
                pixel_values=patches[chosen].flatten(0, 1),
                image_grid_thw=prompts["image_grid_thw"][chosen],
                logits_to_keep=ids.shape[1] + 1,
            ).logits[:, :-1]
            targets = ids.masked_fill(mask == 0, -100)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.advance(loss=f"{loss.item():.3f}")
    with whole_folder(folder) as unfinished:
        save_policy(model, processor, unfinished)
    return folder


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a twentieth of the peak."""
    warmup = max(1, steps // 10)
    return min(1.0, (step + 1) / warmup) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
