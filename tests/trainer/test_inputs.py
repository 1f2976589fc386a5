"""Off-line inputs are those of training: against what TRL itself makes of the same rows, for each kind of processor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from foreign import PARTS, THINKING, TURNS, byte_tokenizer, tiny_model
from PIL import Image
from transformers import PreTrainedModel
from trl import GRPOTrainer
from worlds import Guides, TinyWorld, trainer_of, world

from npo_core.trainer.inputs import Sampling, encode_prompts, end_tokens, inherited, padding_token, prompt_tokens
from npo_core.trainer.pictures import left_out, suppressed
from npo_core.trainer.sampling import completion_logps, sample_rollouts
from npo_core.trainer.trainer import NPOTrainer
from npo_core.world.policies import TinyPolicySpec, build_processor, build_tiny_policy
from npo_core.world.tasks import make_dataset, sample_problems, vocabulary

WIDTH = 8
PROMPTS = 3


@dataclass
class Habit:
    """A policy as somebody else would have it, and rows for it."""

    processor: Any
    model: PreTrainedModel
    rows: list[dict[str, Any]]
    template: dict[str, Any] = field(default_factory=dict)


def chats(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"uid": text, "prompt": [{"role": "user", "content": text}], "answer": "1"} for text in texts]


TEXTS = ("a", "a longer question of many letters?", "two words")


def text_habit(
    kind: str = "Qwen3", rows=None, template=None, settings=None, chat_template: str = TURNS, **tokenizer
) -> Habit:
    made = byte_tokenizer(template=chat_template, **tokenizer)
    return Habit(made, tiny_model(kind, made, **settings or {}), rows or chats(TEXTS), template or {})


def visual_habit(template: str | None, pictures: str | None) -> Habit:
    processor = build_processor(vocabulary())
    if template is not None:
        processor.chat_template = processor.tokenizer.chat_template = template
    model = build_tiny_policy(processor, TinyPolicySpec(32, 1, 1, 32, 1), seed=0)
    with torch.no_grad():  # at initialisation every token is about as likely, whatever the input
        for matrix in (parameter for parameter in model.parameters() if parameter.dim() > 1):
            matrix.mul_(8)
    rows = list(make_dataset(sample_problems("train", 12, 0), text_only=pictures is None))
    question = rows[1]["prompt"][0]["content"]
    longer = {**rows[1], "prompt": [{"role": "user", "content": f"{question} {question}"}]}
    chosen = [rows[0], longer, rows[2]]
    if pictures == "images":
        wide = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
        chosen = [{**row, "images": [row["image"], wide][: 1 + place % 2]} for place, row in enumerate(chosen)]
        chosen = [{name: value for name, value in row.items() if name != "image"} for row in chosen]
    return Habit(processor, model, chosen)


LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and one more?"},
]
HABITS = {
    "pads right": lambda: text_habit(),
    "pads left": lambda: text_habit(padding_side="left"),
    "no padding token": lambda: text_habit("Llama", pad=None),
    "padding is the end": lambda: text_habit("Qwen2", pad="<|im_end|>"),
    "begins every text, no padding": lambda: text_habit("Llama", pad=None, begin=True, settings={"bos_token_id": 3}),
    "absolute places": lambda: text_habit("GPT2"),
    "several ends": lambda: text_habit(settings={"eos_token_id": [0, 2, 40]}),
    "thinking switched off": lambda: text_habit(chat_template=THINKING, template={"enable_thinking": False}),
    "conversations": lambda: text_habit(rows=[{"uid": "l", "prompt": LONG, "answer": "3"}, *chats(TEXTS[:2])]),
    "plain strings": lambda: text_habit(rows=[{"uid": t, "prompt": t, "answer": "1"} for t in TEXTS]),
    "plain strings that are begun": lambda: text_habit(
        "Llama", begin=True, pad=None, rows=[{"uid": t, "prompt": t, "answer": "1"} for t in TEXTS]
    ),
    "an answer that is begun": lambda: text_habit(
        rows=[
            {
                "uid": t,
                "prompt": [{"role": "user", "content": t}, {"role": "assistant", "content": "It is"}],
                "answer": "1",
            }
            for t in TEXTS
        ]
    ),
    "a tool's word": lambda: text_habit(
        rows=[
            {
                "uid": t,
                "prompt": [{"role": "user", "content": t}, {"role": "tool", "content": "4\u00a0\U0001f600"}],
                "answer": "1",
            }
            for t in TEXTS
        ]
    ),
    "pictures": lambda: visual_habit(None, "image"),
    "lists of pictures": lambda: visual_habit(None, "images"),
    "visual policy, text only": lambda: visual_habit(None, None),
    "template of parts, text only": lambda: visual_habit(PARTS, None),
    "template of parts, pictures": lambda: visual_habit(PARTS, "image"),
}


@pytest.fixture(params=HABITS, scope="module")
def habit(request) -> Habit:
    return HABITS[request.param]()


@pytest.fixture(scope="module")
def trained(habit, tmp_path_factory):
    """What TRL's own trainer made of the rows in one step that changed nothing, and that trainer."""
    batches = []

    class Spy(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            batches.append(dict(output))
            return output

    trainer = trainer_of(
        TinyWorld(habit.processor, Dataset.from_list(habit.rows), lambda: habit.model),
        tmp_path_factory.mktemp("trained"),
        Spy,
        prompts=PROMPTS,
        n=2,
        reward=lambda completions, **_: [0.0] * len(completions),
        learning_rate=0.0,
        max_completion_length=WIDTH,
        chat_template_kwargs=habit.template,
    )
    trainer.train()
    return trainer, batches[0]


def test_prompts_are_those_of_training_padded_in_front(habit, trained):
    _, batch = trained
    repeated = [row for row in habit.rows for _ in range(2)]
    inputs = encode_prompts(habit.processor, repeated, habit.template)
    assert torch.equal(inputs["input_ids"], batch["prompt_ids"])
    assert torch.equal(inputs["attention_mask"], batch["prompt_mask"])
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1, "prompts of one length would hide the padding"
    for name in ("pixel_values", "image_grid_thw"):
        assert (name in inputs) == (name in batch)
        assert name not in batch or torch.equal(inputs[name], batch[name])
    if "mm_token_type_ids" in batch:
        width = inputs["input_ids"].shape[1]
        assert torch.equal(inputs["mm_token_type_ids"], batch["mm_token_type_ids"][:, :width])
        assert inputs["mm_token_type_ids"].any()


def test_scores_are_those_of_training_and_do_not_hang_on_the_padding(habit, trained, request):
    trainer, batch = trained
    rows = [row for row in habit.rows for _ in range(2)]
    tokens = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    model = trainer.model.eval()
    together = completion_logps(model, habit.processor, rows, tokens, chat_template_kwargs=habit.template)
    for row, ids, scores in zip(rows, tokens, together, strict=True):
        alone = completion_logps(model, habit.processor, [row], [ids], chat_template_kwargs=habit.template)
        assert scores == pytest.approx(alone[0], abs=1e-4)
    if "absolute places" in request.node.name:
        return  # TRL's own scores of such a policy do hang on the padding
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    with torch.no_grad(), left_out(model, suppressed(model, habit.processor)):
        theirs, _, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            **{name: batch[name] for name in names if name in batch},
        )
    for scores, own in zip(together, theirs, strict=True):
        assert scores == pytest.approx(own[: len(scores)].tolist(), abs=1e-4)
    flat = [score for scores in together for score in scores]
    assert max(flat) - min(flat) > 1, "a policy that says everything alike would pass on any prompt"


def test_generation_settings_are_those_of_training(habit, trained):
    trainer, _ = trained
    trainer.args.mask_unsampled = True  # NPOTrainer's own setting, and TRL's trainer has it not
    ours = Sampling.of(trainer).settings(trainer.model, habit.processor, WIDTH).to_dict()
    theirs = trainer.generation_config.to_dict()
    # the Trainer writes the tokenizer's end in front of the model's own when it starts
    for ends in (ours.pop("eos_token_id"), end_tokens(trainer.model, habit.processor)):
        assert sorted(ends) == sorted(theirs["eos_token_id"]) == sorted(trainer.eos_token_ids)
    theirs.pop("eos_token_id")
    assert ours == theirs
    assert padding_token(habit.processor) == trainer._tokenizer.pad_token_id


def test_a_tokenizer_without_padding_is_left_as_it_is():
    habit = text_habit("Llama", pad=None)
    sample_rollouts(habit.model, habit.processor, habit.rows, 2, lambda *_: True, seed=0, max_new_tokens=4)
    assert habit.processor.pad_token is None and habit.model.generation_config.pad_token_id is None
    habit.processor.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end-of-sequence token"):
        encode_prompts(habit.processor, habit.rows)


def test_template_arguments_that_the_trainer_gives_itself_are_refused():
    habit = text_habit()
    for name in ("tools", "chat_template", "tokenize"):
        with pytest.raises(ValueError, match=f"chat_template_kwargs holds {name}"):
            prompt_tokens(habit.processor, habit.rows, {name: None})


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("repetition_penalty", 1.3, False),
        ("top_k", 1, False),
        ("temperature", 0.1, False),
        ("no_repeat_ngram_size", 1, True),
        ("suppress_tokens", [7], True),
        ("begin_suppress_tokens", [7], True),
        ("forced_eos_token_id", 2, True),
        ("exponential_decay_length_penalty", (2, 1.5), True),
    ],
)
def test_what_the_files_of_a_policy_name_counts_off_line_as_in_training(tmp_path, monkeypatch, name, value, kept):
    """TRL sets the first three itself; what it leaves out, both take from the policy's generation_config.json."""
    habit = text_habit()
    setattr(habit.model.generation_config, name, value)
    taken = []
    original = type(habit.model)._sample

    def sample(self, ids, logits_processor, stopping_criteria, generation_config, **rest):
        taken.append(({type(each).__name__ for each in logits_processor}, generation_config))
        return original(self, ids, logits_processor, stopping_criteria, generation_config, **rest)

    monkeypatch.setattr(type(habit.model), "_sample", sample)
    trainer = trainer_of(
        TinyWorld(habit.processor, Dataset.from_list(habit.rows), lambda: habit.model), tmp_path, GRPOTrainer,
        prompts=3, n=2, reward=lambda completions, **_: [0.0] * len(completions), max_completion_length=4,
    )  # fmt: skip
    trainer.train()
    sample_rollouts(habit.model, habit.processor, habit.rows, 2, lambda *_: True, seed=0, max_new_tokens=4)
    (theirs, of_training), (ours, off_line) = taken
    assert ours == theirs and getattr(off_line, name) == getattr(of_training, name)
    assert (getattr(off_line, name) == value) is kept
    assert inherited(habit.model) == ({name: value} if kept else {})


def test_a_processor_that_pads_right_is_refused_with_guidance(tmp_path):
    """TRL pads the types of picture tokens on the tokenizer's side, and the tokens in front."""
    tiny = world("pictures")
    trainer = trainer_of(tiny, tmp_path, NPOTrainer)
    trainer.processing_class = build_processor(vocabulary())
    trainer.processing_class.tokenizer.padding_side = "right"
    with pytest.raises(ValueError, match=r"pads on the right.*padding_side = 'left'"):
        trainer.guidance = Guides()
