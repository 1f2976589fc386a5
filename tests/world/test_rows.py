"""The rules for one row: what becomes of answers and questions, and that places of pictures are those of TRL."""

from decimal import Decimal

import pytest
from trl.data_utils import prepare_multimodal_messages

from npo_core.guidance.verifiers import verify
from npo_core.world.rows import BrokenRule, plain_messages, reference_answer, with_places


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (" C ", "C"),
        (7, "7"),
        (3.0, "3"),
        (-0.25, "-0.25"),
        (True, "True"),
        ([" C "], "C"),
        (["1, 2"], "1, 2"),
        (Decimal("3.50"), "3.50"),
        (10**30, "1" + 30 * "0"),
        ("2     4:1", "2     4:1"),
        (r"\boxed{C}", "C"),
        (r" $\boxed{ \frac{1}{2} }$. ", r"\frac{1}{2}"),
        (r"\boxed {x}", "x"),
        ("She has 3 × 4 = <<3*4=12>>12 eggs.\n#### 12", "12"),  # GSM8K
        ("4\n####  1,234 ", "1,234"),
    ],
)
def test_an_answer_is_what_stands_in_the_box(given, answer):
    assert reference_answer(given) == answer
    assert verify(rf"so \boxed{{{answer}}}", reference_answer(given)).correct


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (None, "no answer"),
        ("  ", "no answer"),
        (float("nan"), "no answer"),
        ("$.$", "no answer"),  # the verifier would raise on it in the middle of a run
        (r"\boxed{}", "no answer"),
        ([1, 2], "answer of another kind: a list of 2"),
        ([], "no answer"),
        ([None], "no answer"),
        ({"a": 1}, "answer of another kind: a dict"),
        (r"so it is \boxed{C}", "answer among other words"),
        (r"\boxed{3} and \boxed{4}", "answer among other words"),
        (r"\boxed{3", "answer among other words"),
        ("She has 12 eggs.\n####", "no answer"),
    ],
)
def test_an_answer_that_no_response_could_match_is_refused(given, rule):
    with pytest.raises(BrokenRule) as broken:
        reference_answer(given)
    assert str(broken.value).startswith(rule)


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("prompt", "texts", "placed"),
    [
        ("<image>What is shown?", ["What is shown?"], 1),
        ("<image>\nWhat is\nshown? ", ["What is\nshown?"], 1),
        ("Look at <image> and answer.", ["Look at and answer."], 1),
        ("Which?\nA: <image>\nB: <image>", ["Which?\nA:\nB:"], 2),
        ("add 1 and 2", ["add 1 and 2"], 0),
        ([{"role": "system", "content": "be brief"}, user("<image>why?")], ["be brief", "why?"], 1),
        ([user([{"type": "image", "text": None}, {"type": "text", "text": "why?"}])], ["why?"], 1),
        ([user("why?"), {"role": "assistant", "content": None}, user("and now?")], ["why?", "", "and now?"], 0),
    ],
)
def test_a_question_becomes_messages_of_plain_text(prompt, texts, placed):
    messages, found = plain_messages(prompt)
    assert [message["content"] for message in messages] == texts
    assert found == placed
    assert messages[-1]["role"] == "user"


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        (None, "no question"),
        (" <image> ", "no question"),
        ([], "no question"),
        ([user("why?"), {"role": "assistant", "content": "because"}], "no question"),
        (5, "prompt of another kind: a int"),
        (["why?"], "prompt of another kind: why? is no chat message"),
        ('[{"role": "user", "content": "why?"}]', "prompt of another kind: chat messages written out as a text"),
        ([{"role": "human", "content": "why?"}], "prompt of another kind"),
        ([user([{"type": "video"}, {"type": "text", "text": "why?"}])], "prompt of another kind"),
        ([user(5)], "prompt of another kind: the content of a message is a int"),
    ],
)
def test_what_is_no_question_is_refused(prompt, rule):
    with pytest.raises(BrokenRule) as broken:
        plain_messages(prompt)
    assert str(broken.value).startswith(rule)


@pytest.mark.parametrize("pictures", [1, 2])
def test_pictures_have_their_places_where_trl_puts_them(pictures):
    messages = [
        {"role": "system", "content": "be brief"},
        user("why?"),
        {"role": "assistant", "content": "so"},
        user("a"),
    ]
    expected = prepare_multimodal_messages(messages, images=["picture"] * pictures)
    for message in expected:
        for part in message["content"]:
            part.pop("image", None)
    assert with_places(messages, pictures) == expected
    assert with_places(messages, 0) == messages
