"""What a policy could not read of a user's own prompts is said before the first step: template, context, mixtures."""

import pytest
from datasets import Dataset
from factories import Factory, controller_of, own_config
from foreign import TURNS, byte_tokenizer
from transformers import BloomConfig, GPT2Config, Qwen3Config
from worlds import Guides, trainer_of, world

from npo_core.trainer import prompts
from npo_core.trainer.dataset import require_columns
from npo_core.trainer.inputs import prompt_tokens
from npo_core.trainer.prompts import Room, context_length, require_room
from npo_core.trainer.trainer import NPOTrainer

REFUSAL = "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
NO_SYSTEM = "{% for m in messages %}" + REFUSAL + "{% endfor %}" + TURNS
"""Refuses a system's turn, as Gemma's does."""


def chats(*texts: str, before=()) -> Dataset:
    rows = [{"uid": f"u{n}", "prompt": [*before, {"role": "user", "content": text}], "answer": "1"}
            for n, text in enumerate(texts)]  # fmt: skip
    return Dataset.from_list(rows)


def length(tokenizer, row) -> int:
    return len(prompt_tokens(tokenizer, [row])[0][0])


def test_a_prompt_may_leave_just_the_longest_response():
    tokenizer, rows = byte_tokenizer(), chats("short", "q" * 300, "r" * 301, "é" * 160)
    tokens = [length(tokenizer, row) for row in rows]
    assert tokens[2] == tokens[1] + 1 and tokens[3] > tokens[2], "a letter beyond ASCII is two bytes, and tokens"
    require_columns(rows, processor=tokenizer, room=Room(max(tokens) + 8, 8))
    with pytest.raises(ValueError) as refused:
        require_columns(rows, processor=tokenizer, room=Room(tokens[1] + 8, 8))
    assert f"Row 3 (uid 'u3') has a prompt of {tokens[3]} tokens (and 1 more are too long)" in str(refused.value)
    assert f"context is {tokens[1] + 8:,}, which with responses of up to 8 (max_completion_length)" in str(
        refused.value
    )
    assert f"leaves {tokens[1]}." in str(refused.value)
    require_columns(rows, processor=tokenizer, room=Room(None, 8))
    with pytest.raises(ValueError, match=r"Uid 'u3' has a prompt of .* \(and 1 more are too long\).*max_new_tokens"):
        require_room(tokenizer, list(rows), Room(tokens[1] + 8, 8, setting="max_new_tokens"))


def test_template_arguments_count():
    template = TURNS + "{% if think is defined %}" + "t" * 50 + "{% endif %}"
    tokenizer, rows = byte_tokenizer(template=template), chats("question")
    plain = length(tokenizer, rows[0])
    require_columns(rows, processor=tokenizer, room=Room(plain + 8, 8))
    with pytest.raises(ValueError, match=f"a prompt of {plain + 50} tokens;"):
        require_columns(rows, processor=tokenizer, room=Room(plain + 8, 8, {"think": True}))


def test_only_prompts_that_could_be_too_long_are_tokenised(monkeypatch):
    tokenizer, rows = byte_tokenizer(), chats(*("word " * n for n in range(1, 200)))
    seen = []
    whole = prompts.prompt_tokens
    monkeypatch.setattr(prompts, "prompt_tokens", lambda p, some, t: seen.append(len(some)) or whole(p, some, t))
    require_columns(rows, processor=tokenizer, room=Room(20_000, 8))
    assert seen == [1], "one of the one kind of conversation"
    require_columns(rows, processor=tokenizer, room=Room(1040, 8))
    assert 5 < sum(seen) < 40 and seen[1] == 1
    before = list(seen)
    require_columns(rows, processor=tokenizer, room=Room(1040, 8))
    assert seen == before, "what was looked through is not looked through again"


def test_each_kind_of_conversation_is_put_into_the_template():
    """A few rows of a large set may have a turn that the template refuses; their step would come late."""
    tokenizer = byte_tokenizer(template=NO_SYSTEM)
    plain = list(chats("a", "b", "c"))
    odd = {**chats("d", before=[{"role": "system", "content": "Be brief."}])[0], "uid": "odd"}
    require_columns(Dataset.from_list(plain), processor=tokenizer, room=Room(4096, 8))
    with pytest.raises(ValueError, match=r"Row 3 \(uid 'odd'\) .* chat template: System role not supported"):
        require_columns(Dataset.from_list([*plain, odd]), processor=tokenizer, room=Room(4096, 8))
    with pytest.raises(ValueError, match=r"Row 0 \(uid 'u0'\) has a prompt that cannot be put .*chat_template"):
        require_columns(chats("e"), processor=byte_tokenizer(template=None), room=Room(4096, 8))


def test_plain_texts_beside_conversations(tmp_path):
    """TRL takes the first prompt of a batch for the kind of all."""
    lines = ('{"uid": "a", "prompt": "text", "answer": "1"}', '{"uid": "b", "prompt": [{"role": "user", '
             '"content": "x"}], "answer": "1"}')  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Row 0 \(uid 'a'\) has a plain text .* Row 1 \(uid 'b'\) chat messages"):
        require_columns(rows, processor=byte_tokenizer(), room=Room(4096, 8))


@pytest.mark.parametrize(
    "text",
    ['[{"role": "user", "content": "2 + 2?"}]', "[{'content': 'what is', 'role': 'user'}]", ' [ {"from": "human"'],
)
def test_a_conversation_written_out_as_text_is_no_question(text):
    """As CSV files, and tables of JSON text, hold it: the policy would read brackets and quotation marks."""
    rows = Dataset.from_dict({"uid": ["a", "b", "c"], "prompt": ["What is [1]?", text, text], "answer": ["1"] * 3})
    with pytest.raises(ValueError, match=r"Row 1 \(uid 'b'\) has chat messages written out .* \(and 1 more\)"):
        require_columns(rows, processor=byte_tokenizer(), room=Room(4096, 8))
    require_columns(rows.select([0]), processor=byte_tokenizer(), room=Room(4096, 8))


def test_pictures_count_with_their_tokens():
    tiny = world("pictures")
    tokens = [length(tiny.processor, row) for row in tiny.dataset]
    require_columns(tiny.dataset, processor=tiny.processor, room=Room(max(tokens) + 8, 8))
    with pytest.raises(ValueError, match=f"a prompt of {max(tokens)} tokens"):
        require_columns(tiny.dataset, processor=tiny.processor, room=Room(max(tokens) + 7, 8))


def test_where_a_context_is_written():
    assert context_length(GPT2Config(n_positions=77)) == 77
    assert context_length(Qwen3Config(max_position_embeddings=99)) == 99
    assert context_length(BloomConfig()) is None


def test_a_trainer_says_it_when_it_is_given_guidance_and_a_run_before_its_first_step(tmp_path):
    """All of what is wrong in one message, whatever rule it breaks."""
    tiny = world("text")
    rows = [dict(row) for row in tiny.dataset]
    rows[3]["prompt"] = [{"role": "user", "content": rows[3]["prompt"][0]["content"] + " 0" * 600}]
    rows[5]["answer"] = ""
    dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError, match="cannot guide") as refused:
        trainer_of(tiny, tmp_path, NPOTrainer, dataset=dataset, guidance=Guides(), guides_per_group=2)
    message = str(refused.value)
    assert message.count("\n  - ") == 3
    for words in ("Row 3 ", "context is 128", "Row 5 ", "has answer ''", "guides_per_group is 2, but Guides has"):
        assert words in message
    trainer_of(tiny, tmp_path, NPOTrainer, dataset=dataset)  # without guidance GRPO's own
    rows[5]["answer"] = "1"
    factory = Factory(own_config(), dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match=r"(?s)does not fit the run.*\n  - train_dataset: Row 3 .*context is 128"):
        controller_of(factory, tmp_path / "run").run()
