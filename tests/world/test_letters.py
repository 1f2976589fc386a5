"""The letter count: its answers by enumeration, its verifier, its chance, and its disjoint splits."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core.guidance.verdicts import Verdict
from npo_core.world.letters import (
    LENGTHS,
    ChainVerifier,
    Word,
    make_dataset,
    random_word,
    read_source,
    sample_words,
    split_of,
)

VERIFY = ChainVerifier()
STRAW = Word("r", "straw")


def verdict(text, word=STRAW):
    return VERIFY(text, {"answer": word.answer})


def test_a_problem_reads_as_it_should():
    assert STRAW.question == "How many r are in s t r a w?"
    assert STRAW.answer == r"s0 t0 r1 a1 w1 \boxed{1}"
    assert (STRAW.uid, STRAW.difficulty, STRAW.suite) == ("r-straw", 5, "05 letters")


def test_answers_are_those_of_a_count_from_the_front():
    """Every word of three letters of an alphabet of three, against a count that adds up by hand."""
    for word in map("".join, product("abc", repeat=3)):
        total, steps = 0, []
        for letter in word:
            total += letter == "b"
            steps.append(f"{letter}{total}")
        assert Word("b", word).answer == " ".join([*steps, f"\\boxed{{{total}}}"])


def test_of_all_chains_one_is_right():
    """Every way to write three letters with counts up to two and to box a count: one in 5,832 is paid."""
    word = Word("a", "aba")
    steps = [f"{letter}{count}" for letter in "ab" for count in range(3)]
    texts = [
        f"{one} {two} {three} \\boxed{{{box}}}" for one, two, three in product(steps, repeat=3) for box in range(3)
    ]
    right = [text for text in texts if verdict(text, word) is Verdict.CORRECT]
    assert right == [r"a1 b1 a2 \boxed{2}"]
    assert all(verdict(text, word) is Verdict.WRONG for text in texts if text not in right)


def test_a_blind_count_is_right_once_in_two_to_the_length():
    """All patterns of a word are as likely: no fixed pattern of counts is right more often than another."""
    rng = np.random.default_rng(0)
    length, draws = 5, 16_000
    words = [random_word(length, rng) for _ in range(draws)]
    patterns = Counter(tuple(letter == word.letter for letter in word.word) for word in words)
    assert len(patterns) == 2**length
    # chi-square of 31 degrees of freedom: its mean is 31, and 80 is over six standard deviations away
    expected = draws / 2**length
    assert sum((count - expected) ** 2 / expected for count in patterns.values()) < 80
    assert 1 / 2 ** LENGTHS[0] <= 0.032


def test_letters_beside_the_asked_one_are_any_other():
    rng = np.random.default_rng(1)
    others = Counter()
    for _ in range(4000):
        word = random_word(6, rng)
        others.update(letter for letter in word.word if letter != word.letter)
    assert len(others) == 26
    assert max(others.values()) < 1.4 * min(others.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"s0 t0 r1 a1 w1 \boxed{1}", Verdict.CORRECT),
        ("s0\nt0\nr1\na1\nw1\n\\boxed{1}\n", Verdict.CORRECT),
        (r"\boxed{1}", Verdict.WRONG),  # the count alone is not paid
        (r"s0 t0 r1 a1 \boxed{1}", Verdict.WRONG),
        (r"s0 t0 r1 a1 w1 w1 \boxed{1}", Verdict.WRONG),
        (r"s0 t1 r1 a1 w1 \boxed{1}", Verdict.WRONG),  # one step wrong, the count right
        (r"s0 t0 r1 a1 w1 \boxed{2}", Verdict.WRONG),
        (r"s0 t0 r1 a1 w1 \boxed{1} \boxed{1}", Verdict.WRONG),
        (r"So: s0 t0 r1 a1 w1 \boxed{1}", Verdict.WRONG),
        ("s0 t0 r1 a1 w1", Verdict.UNPARSEABLE),
        (r"s0 t0 r1 a1 w1 \boxed{", Verdict.UNPARSEABLE),
        (r"s0 t0 r1 a1 w1 \boxed{}", Verdict.UNPARSEABLE),
        ("", Verdict.UNPARSEABLE),
    ],
)
def test_verdicts(text, expected):
    assert verdict(text) is expected


@given(st.text(max_size=60))
def test_any_text_gets_a_verdict(text):
    assert verdict(text) in Verdict


def test_a_row_without_answer_is_refused():
    with pytest.raises(ValueError, match="'answer'"):
        VERIFY(r"\boxed{1}", {"prompt": "?"})


def test_problems_are_distinct_reproducible_and_fresh_by_seed():
    first, again = (sample_words("train", 300, seed) for seed in (0, 0))
    assert first == again and len(set(first)) == 300
    one, other = (set(sample_words("train", 300, seed, (9, 10))) for seed in (0, 1))
    assert not one & other
    assert sample_words("train", 30, 0) == first[:30]
    assert Counter(word.difficulty for word in first) == dict.fromkeys(range(5, 11), 50)


def test_no_word_is_in_both_splits_whatever_the_letter_and_the_seed():
    train = {word.word for seed in range(3) for word in sample_words("train", 900, seed, (1, 2))}
    test = {word.word for seed in range(3) for word in sample_words("test", 60, seed, (1, 2))}
    assert not train & test
    assert {split_of(Word(letter, "straw")) for letter in "rxyz"} == {split_of(STRAW)}


def test_a_tenth_of_all_words_are_test_words():
    words = ["".join(letters) for letters in product("abcdefghijklm", repeat=3)]
    share = sum(split_of(Word("a", word)) == "test" for word in words) / len(words)
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / len(words))


def test_more_problems_than_there_are_is_said():
    with pytest.raises(ValueError, match="do not exist"):
        sample_words("test", 5000, 0, (1, 1))
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        sample_words("dev", 1, 0)


@pytest.mark.parametrize(
    ("source", "lengths"),
    [("letters", LENGTHS), ("letters:4-10", (4, 10)), ("letters:6-6", (6, 6)), ("rows.jsonl", None), ("", None),
     ("letters.jsonl", None)],
)  # fmt: skip
def test_sources_that_are_understood(source, lengths):
    assert read_source(source) == lengths


@pytest.mark.parametrize(
    "source", ["letters:", "letters:5", "letters:0-3", "letters:7-5", "letters:a-b", "letters:5-100"]
)
def test_sources_that_are_refused(source):
    with pytest.raises(ValueError, match="SHORTEST-LONGEST"):
        read_source(source)


def test_rows_are_what_training_reads():
    (row,) = make_dataset([STRAW])
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"] == STRAW.question
    assert {name: row[name] for name in ("uid", "answer", "suite", "difficulty")} == {
        "uid": "r-straw",
        "answer": STRAW.answer,
        "suite": "05 letters",
        "difficulty": 5,
    }
