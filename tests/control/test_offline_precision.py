"""A stranger's trainer, with a text policy that pads right: off line the same tokens have the log-probs of training.

The prompts of the first test have one length. Where they have not, TRL's loss counts places from the padding on and
`generate` from the prompt on; with rotary places that is rounding, in 16 bits of thousandths of a nat.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from factories import even, own_config
from foreign import byte_tokenizer, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from worlds import SpyTrainer, TinyWorld, trainer_of

from npo_core.control.factory import Training, half_of
from npo_core.control.offline import Offline
from npo_core.guidance.trajectories import Trajectory
from npo_core.streams import PROBE

CASES = {
    "32 bits": ({}, {}, torch.float32, None),
    "products of 16 bits": ({"bf16": True}, {}, torch.float32, None),
    "launched with bf16": ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, torch.float32, None),
    "fp16 asked of a CPU": ({"fp16": True}, {}, torch.float32, None),
    "weights of 16 bits, loaded as 32": ({}, {}, torch.bfloat16, torch.float32),
    "weights of 32 bits, loaded as 16": ({}, {}, torch.float32, torch.bfloat16),
}
"""Arguments of TRL, environment, type of the trained weights, and the one that the factory loads a policy with."""


class Factory:
    """`policy` of a stranger's factory: the policy of a checkpoint as `from_pretrained` has it."""

    def __init__(self, dtype):
        self.loaded = {} if dtype is None else {"dtype": dtype}

    def policy(self, folder=None):
        return AutoModelForCausalLM.from_pretrained(folder, **self.loaded)


def questions(tokenizer, asked):
    rows = [
        {"uid": str(n), "prompt": [{"role": "user", "content": text}], "answer": "2"} for n, text in enumerate(asked)
    ]
    return Dataset.from_list(rows), {row["uid"]: row for row in rows}


def trained(folder, kind, asked, case, monkeypatch):
    """A trainer after a step that it saved, off-line work for it, and its rollouts as trajectories."""
    arguments, environment, weights, loaded = CASES[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tokenizer = byte_tokenizer("right")
    dataset, rows = questions(tokenizer, asked)

    def build():
        model = tiny_model(kind, tokenizer, num_hidden_layers=3)
        for weight in model.parameters():  # what 16 bits can hold, so that it can be loaded as either
            weight.data = weight.data.bfloat16().to(weights)
        return model

    # weights that are loaded in 16 bits are those of the base policy: a step would leave others, which these are not
    rate = 0.0 if loaded is torch.bfloat16 else 1e-2
    trainer = trainer_of(
        TinyWorld(tokenizer, dataset, build), folder, SpyTrainer, prompts=len(asked), dataset=dataset, verifier=even,
        save_strategy="steps", save_steps=1, save_only_model=True, learning_rate=rate, temperature=0.8,
        reward=lambda completion_ids, **_: [float(ids[0] % 3) for ids in completion_ids], **arguments,
    )  # fmt: skip
    trainer.train()
    work = Offline(Factory(loaded), own_config(), rows, tokenizer, even)
    work.training = Training.of(trainer)
    batch = trainer.generated[0]
    lengths = batch["completion_mask"].sum(dim=1).tolist()
    ids = [row[:length].tolist() for row, length in zip(batch["completion_ids"], lengths, strict=True)]
    tokens = [Trajectory(uid, tuple(row), (), 1, True, "") for uid, row in zip(batch["uids"], ids, strict=True)]
    return trainer, work, tokens


def of_training(trainer, batch):
    """Log-probs that TRL's own method gives to the tokens of a batch, as its loss reads them."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1]
        )
    return [row[: int(own.sum())].tolist() for row, own in zip(logps, batch["completion_mask"], strict=True)]


def largest(found, wanted):
    return max(np.abs(np.subtract(a, b)).max() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
@pytest.mark.parametrize("case", CASES)
def test_a_policy_of_a_checkpoint_scores_as_the_trainer_does(tmp_path, monkeypatch, case, kind):
    """Products or weights in another type are off by thousandths to hundredths of a nat."""
    trainer, work, tokens = trained(tmp_path, kind, ["What is one?", "What is two?"], case, monkeypatch)
    wanted = of_training(trainer, trainer.generated[0])
    learner = work._learner(tmp_path / "checkpoint-1")
    assert largest(work._score(learner, tokens), wanted) < 1e-5
    assert largest(work._score(trainer.model, tokens), wanted) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_whoever_has_the_same_weights_is_no_distance_away(tmp_path, monkeypatch, case):
    """The divergence behind V̂, of rollouts that a probe sampled: prompts of several lengths, padded in front."""
    asked = ["What is two?", "What is half of four, or of eight less four?"]
    trainer, work, tokens = trained(tmp_path, "Qwen3", asked, case, monkeypatch)
    probed = work._sample(trainer.model, list(work.rows), 4, 1, PROBE, (1,))
    flat = [trajectory for group in probed for trajectory in group]
    learner = work._learner(tmp_path / "checkpoint-1")
    assert largest(work._score(learner, flat), [trajectory.logps for trajectory in flat]) < 1e-5
    half = work.training.half is not None or work.training.weights is torch.bfloat16
    apart = largest(work._score(learner, tokens), of_training(trainer, trainer.generated[0]))
    assert apart < (0.2 if half else 1e-4), "padded behind, it would be nats"


def test_adapters_keep_their_type():
    """PEFT has them in 32 bits beside weights of 16."""
    tokenizer = byte_tokenizer()
    policy = get_peft_model(tiny_model("Llama", tokenizer), LoraConfig(task_type="CAUSAL_LM"))
    work = Offline(SimpleNamespace(policy=lambda folder: policy), own_config(), {}, tokenizer, even)
    work.training = replace(work.training, weights=torch.bfloat16)
    types = {name: weight.dtype for name, weight in work._learner(None).named_parameters()}
    assert {kind for name, kind in types.items() if "lora_" in name} == {torch.float32}
    assert {kind for name, kind in types.items() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "asked", "half"),
    [
        (DistributedType.NO, torch.float16, torch.float16),
        (DistributedType.NO, torch.bfloat16, torch.bfloat16),
        (DistributedType.DEEPSPEED, None, torch.bfloat16),
    ],
)
def test_products_are_those_that_accelerate_opens(kind, asked, half):
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        distributed_type=kind,
        mixed_precision="bf16",
        autocast=lambda: torch.autocast("cpu", asked or torch.bfloat16, enabled=asked is not None),
    )
    assert half_of(accelerator) is half
