"""Verification: hand cases for every rule, and properties over arbitrary text."""

import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core.guidance.answers import normalise_answer
from npo_core.guidance.verdicts import Verdict
from npo_core.guidance.verifiers import BoxedVerifier, behind_answer, extract_answer, reference_fault, verify

PUBLISHED = Path(__file__).parents[2] / "docs" / "verification.md"


def published(title: str) -> list[tuple[str, str]]:
    """References and boxed answers of a table in the documentation."""
    section = PUBLISHED.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \|", section, re.MULTILINE)


@pytest.mark.parametrize(
    ("title", "verdict", "rows"), [("The same", Verdict.CORRECT, 50), ("Not the same", Verdict.WRONG, 30)]
)
def test_the_published_tables_are_those_of_the_code(title, verdict, rows):
    table = published(title)
    assert len(table) >= rows
    assert {row: verify(rf"\boxed{{{row[1]}}}", row[0]) for row in table} == dict.fromkeys(table, verdict)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3}", "3"),
        (r"\boxed{ 3 }", "3"),
        (r"\boxed {3}", "3"),
        ("\\boxed\n{3}", "3"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"{ \boxed{a{b{c}}d} }", "a{b{c}}d"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{3}}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{}", ""),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{3", None),
        (r"\boxed{3 {", None),
        (r"\boxed 3", None),
        (r"boxed{3}", None),
        ("the answer is 3", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("given_answer", "reference"),
    [
        ("Red", "red"),
        ("  left   of ", "Left of"),
        ("red.", "red"),
        ("$red$", "red"),
        (r"\(red\)", "red"),
        ("$3$.", "3"),
        (r"\text{Red}", "red"),
        (r"\textbf{\text{red}}", "red"),
        (r"\mathrm{ red }", "red"),
        (r"3 \text{ cm}", "3 cm"),
        ("(A)", "A"),
        ("A.", "A"),
        ("A)", "a"),
        ("A:", "(a)"),
        (r"\text{(A)}", "A"),
        ("Yes.", "yes"),
        ("NO", "no"),
        ("3.0", "3"),
        ("+3", "3"),
        ("- 3", "-3"),
        ("−3", "-3"),
        ("007", "7"),
        (".5", "0.5"),
        ("5.", "5"),
        ("1,234", "1234"),
        ("1{,}234{,}567.5", "1234567.5"),
        (r"1\,234", "1234"),
        ("1e-3", "0.001"),
        ("1/2", "0.5"),
        ("- 1 / 2", "-0.5"),
        ("2/4", "1/2"),
        ("1.5/3", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac { 1 } { 2 }", "1/2"),
        (r"\dfrac{3}{4}", r"\tfrac{6}{8}"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        ("50%", "0.5"),
        (r"12.5\%", "12.5%"),
        (r"\$5", "5"),
        ("0.3333333", "1/3"),
        ("3.14159265", "3.1415926"),
        ("0", "-0.0"),
        ("1 2", "1  2"),
        ("5^(5^(5^5))", "5^(5^(5^5))"),
    ],
)
def test_equal_answers(given_answer, reference):
    assert verify(rf"\boxed{{{given_answer}}}", reference) is Verdict.CORRECT


@pytest.mark.parametrize(
    ("given_answer", "reference"),
    [
        ("4", "3"),
        ("3", "-3"),
        ("B", "A"),
        ("no", "yes"),
        ("ab", "a"),
        ("1 2", "12"),
        ("1 1/2", "1.5"),
        ("1,2", "12"),
        ("12,34", "1234"),
        ("1.2.3", "1.2"),
        ("--3", "3"),
        ("-+3", "-3"),
        ("/", "1"),
        (r"\frac{}{2}", "0"),
        ("1/0", "0"),
        ("50%", "50"),
        ("0.33333", "1/3"),
        ("0.000001", "0"),
        ("12345678", "12345679"),
        ("5^2", "25"),
        ("5^(5^(5^5))", "1"),
        ("1/2004!", "1/2006!"),
        ("٣", "3"),
        ("1e9999", "1e9998"),
        ("9" * 5000, "1"),
    ],
)
def test_different_answers(given_answer, reference):
    assert verify(rf"\boxed{{{given_answer}}}", reference) is Verdict.WRONG


@pytest.mark.parametrize("text", ["", "3", r"\boxed{3", r"\boxed{}", r"\boxed{ $.$ }", r"\boxed{\text{}}"])
def test_no_answer_is_unparseable(text):
    assert verify(text, "3") is Verdict.UNPARSEABLE


def test_only_the_last_box_counts():
    assert verify(r"\boxed{3} no, \boxed{4}", "3") is Verdict.WRONG
    assert verify(r"\boxed{4} no, \boxed{3}", "3") is Verdict.CORRECT


def test_verdict_correct():
    assert [verdict.correct for verdict in (Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE)] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("answer", ["", "  ", "$$", "."])
def test_empty_reference_is_refused(answer):
    with pytest.raises(ValueError, match="empty after normalisation"):
        verify(r"\boxed{3}", answer)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (r"\boxed{3}", "holds a box; write its content alone"),
        (r"So it is $\boxed{3}$.", "holds a box"),
        ("1 + 2 = <<1+2=3>>3\n#### 3", "holds ####, as GSM8K's solutions do"),
    ],
)
def test_a_solution_in_the_place_of_a_reference_is_refused(answer, fault):
    """Every response would be wrong, the right ones too."""
    with pytest.raises(ValueError, match=fault):
        verify(r"\boxed{3}", answer)


@pytest.mark.parametrize("answer", [3, None, ["3"]])
def test_reference_that_is_no_text_is_refused(answer):
    with pytest.raises(TypeError, match="is a string"):
        verify(r"\boxed{3}", answer)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 20_000,
        r"\boxed" + " " * 100_000,
        r"\boxed{" + r"\text{" * 20_000 + "}" * 20_001,
        r"\boxed{" + "1," * 50_000 + "}",
        r"\boxed{" + "1 " * 50_000 + "}",
        r"\boxed{" + "1,111" + ",111" * 50_000 + ",}",
        r"\boxed{" + "(" * 50_000 + "1," * 50_000 + "}",
        r"\boxed{" + "^" * 50_000 + "x" * 50_000 + "}",
        r"\boxed{" + "x^{" * 20_000 + "}" * 20_001,
        r"\boxed{" + r"\frac" * 50_000 + "}",
        r"\boxed{" + r"\, " * 50_000 + "}",
        r"\boxed{" + r"\{" + "1, " * 50_000 + r"\}}",
    ],
    ids=[
        "opened",
        "spaces",
        "wrapped",
        "commas",
        "digits",
        "thousands",
        "brackets",
        "powers",
        "deep",
        "fractions",
        "thin",
        "set",
    ],
)
def test_long_hostile_text_takes_no_time(text):
    start = time.process_time()  # a busy machine may take what time it likes
    assert verify(text, "3") is not Verdict.CORRECT
    assert verify(r"\boxed{3}", "7" + text.replace(r"\boxed", "")) is not Verdict.CORRECT
    assert time.process_time() - start < 5


def test_what_is_remembered_of_a_response_is_its_answer_alone():
    """A run verifies millions of responses, of thousands of tokens each."""
    tracemalloc.start()
    try:
        for number in range(100):
            assert verify(f"{number} " * 20_000 + r"so \boxed{3}", "3") is Verdict.CORRECT
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 100_000, "the responses are 5 million bytes"


PIECES = st.sampled_from(
    [
        *"{}$%/-+.,e()A0−^\\ \n\0",
        "\\boxed",
        "\\boxed{",
        "\\{",
        "\\frac{",
        "\\text{",
        "\\%",
        "\\,",
        "yes",
        "12",
        "\\left",
        "\\sqrt",
        "^{",
        "_",
        "×",
        "½",
        "δ",
        "Co",
        "\u2009",
        "（",
        "(",
        ")",
        "[",
        "\\begin{bmatrix}",
        "\\!",
        "\1",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_any_completion_gets_a_verdict(text):
    boxed = extract_answer(text)
    verdict = verify(text, "12")
    assert isinstance(verdict, Verdict)
    assert (verdict is Verdict.UNPARSEABLE) == (boxed is None or normalise_answer(boxed) == "")


@given(st.lists(PIECES).map("".join))
def test_any_box_content_gets_a_verdict(text):
    assert isinstance(verify("\\boxed{" + text + "}", "1/2"), Verdict)


@given(st.text(alphabet=st.characters(exclude_characters="{}\\")))
def test_an_answer_matches_itself(text):
    if not reference_fault(text):
        assert verify(rf"\boxed{{{text}}}", text) is Verdict.CORRECT


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_compared_exactly_in_every_notation(a, b):
    for notation in (f"{a}", f"{a:,}", f"{a}.0", f"{a}/1", rf"\frac{{{a}}}{{1}}", f"{a}00%"):
        assert verify(rf"\boxed{{{notation}}}", str(b)).correct == (a == b)
        assert verify(rf"\boxed{{{notation}}}", str(a)).correct


@pytest.mark.parametrize(
    ("text", "behind"),
    [
        (r"so \boxed{3}", ""),
        ("so \\boxed{3} \n", ""),
        (r"\boxed{3} } }", "} }"),
        (r"\boxed{3} or \boxed{4}.", "."),
        (r"\boxed{3} or \boxed{4", r"or \boxed{4"),
        (r"\boxed{\boxed{3} apples}", "apples}"),
        (" no box ", "no box"),
    ],
)
def test_what_stands_behind_the_answer(text, behind):
    assert behind_answer(text) == behind


def test_boxed_verifier_reads_the_row():
    verifier = BoxedVerifier()
    assert verifier(r"\boxed{3}", {"answer": "3", "uid": "x"}) is Verdict.CORRECT
    with pytest.raises(ValueError, match=r"no 'answer' column; it has \['uid'\]"):
        verifier(r"\boxed{3}", {"uid": "x"})
