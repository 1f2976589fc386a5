"""What a verifier says, and the reward that TRL gets for it."""

import re
from functools import partial

import pytest

from npo_core.guidance.verdicts import Verdict, completion_text, is_correct, require_verifier, verifier_reward
from npo_core.guidance.verifiers import BoxedVerifier


def test_reward_in_both_of_trls_forms():
    reward = verifier_reward(BoxedVerifier())
    assert reward.__name__ == "verified"
    texts = [r"\boxed{3}", r"\boxed{4}", "none"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, messages):
        rewards = reward(completions=completions, answer=["3", "3", "3"], prompts=["p"] * 3, trainer_state=object())
        assert rewards == [1.0, 0.0, 0.0]
        assert all(type(value) is float for value in rewards)


class Awaited:
    async def __call__(self, text, row): ...


async def awaited(text, row): ...


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (BoxedVerifier, r"it is the class BoxedVerifier: give an instance, BoxedVerifier\(\)"),
        (verifier_reward(BoxedVerifier()), "does not take these two: too many positional arguments"),
        (lambda text: True, "does not take these two"),
        (awaited, "a coroutine, which nobody awaits here"),
        (Awaited(), "a coroutine"),
        ("boxed", "it is a str"),
    ],
    ids=["class", "reward", "one argument", "coroutine", "awaited call", "name"],
)
def test_what_cannot_be_called_as_a_verifier_is_refused(given, complaint):
    with pytest.raises(TypeError, match=complaint):
        require_verifier(given)


def test_whatever_takes_a_text_and_a_row_is_a_verifier():
    for given in (BoxedVerifier(), BoxedVerifier().__call__, lambda text, row, strict=False: True, partial(print, "a")):
        require_verifier(given)


def test_reward_passes_each_row_its_own_columns_and_nothing_else():
    rows = []

    def verifier(completion, row):
        rows.append((completion, dict(row)))
        return Verdict.CORRECT

    columns = {"uid": ["a", "b"], "answer": ["1", "2"]}
    passed_along = {
        "trainer_state": object(),
        "log_extra": print,
        "log_metric": print,
        "other": [1, 2, 3],
        "text": "ab",
    }
    verifier_reward(verifier)(["x", "y"], **columns, **passed_along)
    assert rows == [("x", {"uid": "a", "answer": "1"}), ("y", {"uid": "b", "answer": "2"})]


def test_a_verifier_may_read_the_prompt_in_rewards_as_at_the_gate():
    """TRL hands the prompts over beside the columns, under another name than the data set's."""
    seen = []
    prompts = [[{"role": "user", "content": "3, 5 to 8"}], [{"role": "user", "content": "2, 2 to 4"}]]
    reward = verifier_reward(lambda text, row: seen.append(row["prompt"]) is None)
    assert reward(["x", "y"], prompts=prompts, uid=["a", "b"]) == [1.0, 1.0]
    assert seen == prompts


def test_completion_text():
    assert completion_text("as is") == "as is"
    parts = [{"type": "image"}, {"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "one two"
    conversation = [
        {"role": "assistant", "content": None},
        {"role": "tool", "content": r"\boxed{9}"},
        {"role": "assistant", "content": "done"},
    ]
    assert completion_text(conversation) == "\ndone"
    for wrong in (3, None, ["text"], [{"role": "assistant", "content": 3}]):
        with pytest.raises(TypeError):
            completion_text(wrong)


def test_a_verdict_may_be_a_bool():
    assert [is_correct(verdict) for verdict in (Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE, True, False)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    for unclear in (1.0, None, "correct"):
        with pytest.raises(TypeError, match=re.escape(f"returned {unclear!r}; a Verdict or a bool")):
            is_correct(unclear)
    assert verifier_reward(lambda text, row: text == "x")(["x", "y"]) == [1.0, 0.0]
