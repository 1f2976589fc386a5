"""The vLLM path for real, on the CPU: training, guides, roll-backs, off-line rollouts. Run by `make test-vllm`.

A tiny Qwen3 is trained for seconds on the small world's solutions and saved as somebody's pretrained policy. vLLM's CPU
build needs two things that a GPU does not: one process, and linear layers that keep their weights after loading, for
otherwise none could be sent to it again.
"""

import json
import os

import pytest

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
pytest.importorskip("vllm", reason="vLLM is not in this environment; `make test-vllm` makes one that has it")

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm.model_executor.layers import linear, utils

from npo_core import stages
from npo_core.config import resolve_config
from npo_core.engine import trainer_generate
from npo_core.policies import CHAT_TEMPLATE, build_tokenizer, load_policy, save_policy
from npo_core.sampling import completion_logps, sample_rollouts
from npo_core.tasks import make_dataset, parse_uid, sample_problems, vocabulary, write_response

pytestmark = pytest.mark.vllm

SUITES = ["mathvista", "mmstar"]
CLOSE = 0.05
"""Log-probs of vLLM and of transformers, in nats, and ratios of whole responses: vLLM computes in 16 bits."""


@pytest.fixture(scope="module", autouse=True)
def weights_stay():
    """Linear layers of vLLM's CPU build that keep their weights."""

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    before = utils.dispatch_cpu_unquantized_gemm
    for module in (utils, linear):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = plain
    yield
    for module in (utils, linear):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = before


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A text policy that solves some problems, and problems in a file."""
    folder = tmp_path_factory.mktemp("vllm")
    rows = make_dataset(sample_problems("train", 48, 0, SUITES), text_only=True)
    questions = [{"id": row["uid"], "question": row["prompt"][-1]["content"], "answer": row["answer"]} for row in rows]
    Dataset.from_list(questions).to_parquet(folder / "problems.parquet")
    tokenizer = build_tokenizer(vocabulary())
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in rows]
    problems = [parse_uid(row["uid"]) for row in rows]
    solutions = [write_response(problem, problem.states()) + tokenizer.eos_token for problem in problems]
    texts = [prompt + solution for prompt, solution in zip(prompts, solutions, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for index, prompt in enumerate(prompts):
        labels[index, : len(tokenizer(prompt)["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    while True:  # until it is right about half of the time, token by token
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        if loss < 0.35:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_policy(model, tokenizer, folder / "policy")
    return folder


@pytest.fixture
def config(there, tmp_path, monkeypatch):
    monkeypatch.setenv("NPO_RUNS", str(tmp_path))

    def settings(method, **overrides):
        mine = {
            "policy": str(there / "policy"),
            "data": str(there / "problems.parquet"),
            "columns": ["uid=id", "prompt=question", "answer=answer"],
            "vllm": "colocate",
            "max_prompt_length": 64,
            "learning_rate": 1e-3,
        }
        return resolve_config(method, "smoke", overrides=mine | overrides)

    return settings


def test_a_whole_run_samples_with_vllm_through_its_rollbacks(config, tmp_path):
    """Scout and restart, plateau and roll-back: TRL compares vLLM's log-probs with the trainer's at every step."""
    run = stages.run(config("npo"), tmp_path, quiet=True)
    lines, events = run.metrics(), run.events()
    assert [event["event"] for event in events].count("rollback") == 2
    ratios = [line["sampling/importance_sampling_ratio/mean"] for line in lines]
    assert len(ratios) == run.config.compute_steps
    # weights that were not sent again after a step or a roll-back would show here
    assert ratios == pytest.approx([1.0] * len(ratios), abs=CLOSE)
    assert sum(line["npo/replaced_slots"] for line in lines) > 0, "no guide was used"
    caches = [event["cached"] for event in events if event["event"] == "cache"]
    assert len(caches) == 2 and min(caches) > 0
    result = run.result()
    assert 0 < result["base"]["average"] < 1


def test_vllm_has_the_weights_of_the_trainer_that_took_it_over(config, tmp_path):
    settings = config("grpo", learning_rate=3e-2)
    world = stages.prepare(settings, quiet=True)
    maker = stages.TrainerMaker(settings, world)
    first = maker(tmp_path / "first")
    first.args.max_steps = 3
    first.train()
    second = maker(tmp_path / "second")
    assert second.vllm_generation.llm._engine is first.vllm_generation.llm, "a second engine was started"
    rows = [world.rows[uid] for uid in list(world.rows)[:6]]
    for trainer, other in ((first, second), (second, first)):
        generate = trainer_generate(trainer)
        sampled = sample_rollouts(
            trainer.model, world.processor, rows, 4, world.verifier, seed=0, max_new_tokens=16, generate=generate
        )
        flat = [trajectory for group in sampled for trajectory in group]
        engine = trainer.vllm_generation
        prompts = [row["prompt"] for row in rows]
        ids = [world.processor.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
        _, tokens, logps, _ = engine.generate(prompts=ids, images=None, num_generations=1)
        told = [[token[0] for token in row] for row in logps]
        own = completion_logps(trainer.model, world.processor, rows, tokens)
        others = completion_logps(other.model, world.processor, rows, tokens)
        assert _far(told, own) < CLOSE < _far(told, others), "vLLM has the other trainer's weights"
        assert len({trajectory.token_ids for trajectory in flat[:4]}) > 1, "the k responses are copies of one"


def test_sampling_settings_are_those_asked_for_and_training_keeps_its_own(config, tmp_path):
    settings = config("grpo")
    world = stages.prepare(settings, quiet=True)
    trainer = stages.TrainerMaker(settings, world)(tmp_path / "out")
    rows = [world.rows[uid] for uid in list(world.rows)[:4]]
    greedy = sample_rollouts(
        trainer.model, world.processor, rows, 3, world.verifier, seed=0, max_new_tokens=16, top_k=1,
        generate=trainer_generate(trainer),
    )  # fmt: skip
    assert all(len({trajectory.token_ids for trajectory in group}) == 1 for group in greedy)
    expected = sample_rollouts(
        load_policy(world.base), world.processor, rows, 1, world.verifier, seed=0, max_new_tokens=16, top_k=1
    )
    assert [group[0].token_ids for group in greedy] == [group[0].token_ids for group in expected]
    assert (trainer.vllm_generation.temperature, trainer.vllm_generation.top_k) == (1.0, trainer.args.top_k)


def test_autonpo_probes_fills_its_cache_and_rolls_back(config, tmp_path):
    run = stages.run(config("autonpo", compute_steps=16), tmp_path, quiet=True)
    kinds = [event["event"] for event in run.events()]
    assert {"probe", "choice"} <= set(kinds), kinds
    assert json.loads((run.path / "result.json").read_text())["status"] == "finished"


def _far(first, second) -> float:
    """Mean distance of two sets of log-probs, in nats per token."""
    pairs = [pair for a, b in zip(first, second, strict=True) for pair in zip(a, b, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
