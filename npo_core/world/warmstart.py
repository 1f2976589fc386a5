"""The base policy of the small world: a tiny Qwen3-VL, warm-started on an imperfect corpus.

A pretrained model solves some prompts always, some rarely and some almost never. The corpus gives the tiny policy the
same profile: each elementary fact (state, glyph → next state) is written wrongly with its own probability, and the
chain then goes on from the wrong state. Easy and middling facts go wrong in any way, a hard fact in one way only: a
misconception. Deviation from ordinary supervised fine-tuning: responses are written afresh at every step, so nothing
can be memorised but the facts' distribution.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..declaration import declarations
from ..files import unfinished_name
from ..lock import Lock
from ..progress import progress
from ..runs.config import RunConfig
from ..runs.folder import runs_folder, shipped_policies
from .policies import TinyPolicySpec, build_processor, build_tiny_policy, save_policy
from .pretrained import policy_folder
from .speed.sharing import share_work
from .tasks import (
    Family,
    Problem,
    all_facts,
    conversation,
    family_of,
    sample_problems,
    vocabulary,
    write_response,
)

WORLD_FIELDS = [name for name, setting in declarations(RunConfig).items() if setting.makes_base]
"""Settings that decide the base policy's weights."""

WARMSTART_PROBLEMS = 1024
"""Distinct training problems that the warm start draws from."""

FORMAT = 2
"""Raised when the world's code changes in a way that makes other base weights."""


def base_digest(config: RunConfig) -> str:
    """Content hash of everything that decides the base policy's weights."""
    content = {name: getattr(config, name) for name in WORLD_FIELDS} | {"format": FORMAT, "vocabulary": vocabulary()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def fact_kinds(config: RunConfig) -> dict[tuple[str, int, int], str]:
    """Kind of each elementary fact (suite, state, glyph index): easy, middling or hard, in the configured shares."""
    facts = all_facts()
    easy, middling = round(config.easy_share * len(facts)), round(config.middling_share * len(facts))
    kinds = np.array(["easy"] * easy + ["middling"] * middling + ["hard"] * (len(facts) - easy - middling))
    np.random.default_rng(config.world_seed).shuffle(kinds)
    return dict(zip(facts, kinds.tolist(), strict=True))


def fact_errors(config: RunConfig) -> dict[tuple[str, int, int], float]:
    """Probability with which the corpus writes each elementary fact (suite, state, glyph index) wrongly."""
    error = {"easy": config.easy_error, "middling": config.middling_error, "hard": config.hard_error}
    return {fact: error[kind] for fact, kind in fact_kinds(config).items()}


def misconceptions(config: RunConfig) -> dict[tuple[str, int, int], int]:
    """The one wrong state that the corpus writes for each hard fact, drawn from `world_seed`."""
    rng = np.random.default_rng([config.world_seed, 1])
    hard = [fact for fact, kind in fact_kinds(config).items() if kind == "hard"]
    wrong = {}
    for suite, state, glyph in hard:
        family = family_of(suite)
        wrong[suite, state, glyph] = _other_state(family, family.rule(state, glyph), rng)
    return wrong


def imperfect_states(
    problem: Problem,
    errors: Mapping[tuple[str, int, int], float],
    wrong: Mapping[tuple[str, int, int], int],
    rng: np.random.Generator,
) -> list[int]:
    """States that the corpus writes: each fact wrong with its own probability, and the chain goes on from there.

    Args:
        problem: The task.
        errors: Probability of writing each fact wrongly, see `fact_errors`.
        wrong: The wrong state of each hard fact, see `misconceptions`; other facts go wrong uniformly.
        rng: Source of randomness.
    """
    state, states = problem.start, []
    for glyph in problem.glyphs:
        fact = (problem.suite, state, glyph)
        state = problem.family.rule(state, glyph)
        if rng.random() < errors[fact]:
            state = wrong[fact] if fact in wrong else _other_state(problem.family, state, rng)
        states.append(state)
    return states


def _other_state(family: Family, state: int, rng: np.random.Generator) -> int:
    return (state + int(rng.integers(1, family.states))) % family.states


def base_policy_folder(config: RunConfig, quiet: bool = False) -> Path:
    """Folder of the base policy: the given one, the shipped one, or one that is made now and kept.

    Raises:
        FileNotFoundError: `config.policy` names neither a folder nor a model of the hub.
    """
    if config.policy != "tiny":
        return policy_folder(config.policy)
    name = f"tiny-{base_digest(config)}"
    for folder in (shipped_policies() / name, runs_folder() / "base" / name):
        if (folder / "model.safetensors").is_file():
            return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Lock(folder.with_name(f"{name}.lock.json"), f"The policy {folder}").holding():  # side by side, runs want one
        if (folder / "model.safetensors").is_file():
            return folder
        return warm_start(config, folder, quiet=quiet)


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
    errors, wrong = fact_errors(config), misconceptions(config)
    problems = sample_problems("train", WARMSTART_PROBLEMS, seed=config.policy_seed)
    prompts = processor.apply_chat_template(
        [conversation(problem, with_picture=True) for problem in problems],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )
    patches = prompts["pixel_values"].view(len(problems), -1, prompts["pixel_values"].shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    with progress(config.warmstart_steps, "warm start", quiet, stays=False) as bar:
        for step in range(config.warmstart_steps):
            for group in optimizer.param_groups:
                group["lr"] = config.warmstart_learning_rate * _schedule(step, config.warmstart_steps)
            chosen = rng.integers(0, len(problems), size=config.warmstart_batch)
            texts = [
                write_response(
                    problems[i],
                    imperfect_states(problems[i], errors, wrong, rng),
                    second_form=rng.random() < config.second_form_share,
                )
                + processor.tokenizer.eos_token
                for i in chosen
            ]
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(folder)
    save_policy(model, processor, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a twentieth of the peak."""
    warmup = max(1, steps // 10)
    return min(1.0, (step + 1) / warmup) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
