"""Tasks of reasoning-gym as data: what a run gets, who is right, what is refused, and the process they live in."""

import importlib.util
import json
import logging
import re
from contextlib import closing

import pytest

from npo_core.guidance.verdicts import Verdict
from npo_core.world import gym, gym_process
from npo_core.world.gym import GymVerifier, Task, draw, make_dataset, read_source, require_tasks
from npo_core.world.gym_process import GymProcess, ProcessEnded

INEXACT = {"boxnet", "game_of_life_halting", "rush_hour"}
"""Tasks of reasoning-gym 0.1.25 that a run cannot take; see docs/implementation.md."""

KINDS = {
    "chain_sum": Task("chain_sum", {"min_terms": 2, "max_terms": 2, "max_digits": 1}),  # a number
    "sentence_reordering": Task("sentence_reordering"),  # a text
    "codeio": Task("codeio"),  # JSON, whose braces stand in the box's
    "fraction_simplification": Task("fraction_simplification", {"styles": ["latex_frac"]}),  # LaTeX
    "game_of_life": Task("game_of_life", {"grid_size_x": 3, "grid_size_y": 3, "filled_cells": 4}),  # a list of lists
    "rotate_matrix": Task("rotate_matrix", {"max_n": 4}),  # a grid of several lines
    "tower_of_hanoi": Task("tower_of_hanoi"),  # several lines of words
    "graph_color": Task("graph_color"),  # None: several are right, and one is its example
    "propositional_logic": Task("propositional_logic"),
    "rubiks_cube": Task("rubiks_cube", {"min_scramble_steps": 1, "max_scramble_steps": 2}),
}
"""A task for every kind of answer."""


@pytest.fixture(scope="module")
def running():
    with closing(GymProcess()) as process:
        yield process


@pytest.fixture
def shared(running, monkeypatch):
    """One process for all that is drawn: a start takes a second, and here no draw has to be as in a fresh one."""

    class Shared:
        ask = running.ask

        def close(self):
            pass

    monkeypatch.setattr(gym, "GymProcess", Shared)


@pytest.fixture(scope="module")
def drawn():
    """Three problems of each of those tasks, and the verifier of all."""
    problems = draw("train", list(KINDS.values()), 3 * len(KINDS), 0, 1.0)
    verifier = GymVerifier({problem.uid: problem for problem in problems}, 1.0)
    yield problems, verifier
    verifier.close()


@pytest.fixture(scope="module")
def known(running):
    return running.ask("tasks")["tasks"]


def of(drawn, task):
    return [problem for problem in drawn[0] if problem.task.name == task]


def verdict(drawn, problem, answer):
    return drawn[1](f"Let me think. \\boxed{{{answer}}} It is.", {"uid": problem.uid})


@pytest.mark.parametrize("task", KINDS)
def test_of_every_kind_the_own_answer_is_right_and_others_are_not(drawn, task):
    problems = of(drawn, task)
    assert len(problems) == 3
    for problem in problems:
        assert verdict(drawn, problem, problem.answer) is Verdict.CORRECT
        assert drawn[1](problem.answer, {"uid": problem.uid}) is Verdict.UNPARSEABLE
        for wrong in ("", " \n"):
            assert verdict(drawn, problem, wrong) is Verdict.UNPARSEABLE
        for wrong in (
            "?",
            "nan",
            "{",
            "[[1,2]",
            '{"a": 1}',
            "9" * 5000,
            "\0\ud800",
        ):
            # an open brace leaves no box that is closed
            assert verdict(drawn, problem, wrong) in (Verdict.WRONG, Verdict.UNPARSEABLE), wrong


def test_kinds_are_what_they_are_called(drawn):
    answers = {task: [problem.answer for problem in of(drawn, task)] for task in KINDS}
    assert all(re.fullmatch(r"-?\d+", answer) for answer in answers["chain_sum"])
    assert all("{" in answer for answer in answers["fraction_simplification"])
    assert all(isinstance(json.loads(answer)[0], list) for answer in answers["game_of_life"])
    assert all(answer.count("\n") >= 1 for answer in (*answers["rotate_matrix"], *answers["tower_of_hanoi"]))


def test_sums_are_sums(drawn):
    """The reference itself, by our own arithmetic, which a wrong pairing of question and answer would fail."""
    for problem in of(drawn, "chain_sum"):
        left, sign, right = re.search(r"(\d+) ([+-]) (\d+)", problem.question).groups()
        total = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert verdict(drawn, problem, str(total)) is Verdict.CORRECT
        assert verdict(drawn, problem, f"{total}.0") is Verdict.CORRECT  # reasoning-gym compares values
        assert verdict(drawn, problem, str(total + 1)) is Verdict.WRONG


def test_where_the_answer_is_none_every_right_one_counts(drawn):
    """Colourings by enumeration: each that keeps all edges is right, each that breaks one is wrong."""
    problem = of(drawn, "graph_color")[0]
    edges = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", problem.question.split("Edges:")[1])]
    own = {int(vertex): colour for vertex, colour in json.loads(problem.answer).items()}
    right = wrong = 0
    for vertex in own:
        for colour in (1, 2, 3):
            other = {**own, vertex: colour}
            proper = all(other[one] != other[two] for one, two in edges)
            expected = Verdict.CORRECT if proper else Verdict.WRONG
            assert verdict(drawn, problem, json.dumps({str(key): value for key, value in other.items()})) is expected
            right, wrong = right + (proper and other != own), wrong + (not proper)
    assert right and wrong


def test_partial_scores_are_paid_from_the_threshold_on(drawn):
    """A number inside of a longer text has a share of its length as score: 1 of 4 characters, 1 of 2."""
    problem = next(one for one in of(drawn, "chain_sum") if len(one.answer) == 1)
    lenient = GymVerifier({problem.uid: problem}, 0.5)
    row = {"uid": problem.uid}
    assert not lenient(f"\\boxed{{{problem.answer} ab}}", row).correct
    assert lenient(f"\\boxed{{{problem.answer}a}}", row).correct
    assert not verdict(drawn, problem, f"{problem.answer}a").correct
    lenient.close()


def test_what_is_not_a_number_is_not_right_where_reasoning_gym_takes_it_for_right(shared, running):
    (problem,) = draw("train", [Task("complex_arithmetic")], 1, 0, 1.0)
    verifier = GymVerifier({problem.uid: problem}, 1.0)
    asked = {"task": "complex_arithmetic", "settings": {}, "entry": problem.entry}
    assert running.ask("score", answer="nan", **asked)["score"] == 1.0  # or the rule is needed no more
    assert [verifier(f"\\boxed{{{text}}}", {"uid": problem.uid}).correct for text in ("nan", "NaN + 2i")] == [False] * 2


def test_a_row_of_other_data_is_refused(drawn):
    with pytest.raises(ValueError, match="uid 'x'"):
        drawn[1](r"\boxed{1}", {"uid": "x"})


def test_problems_are_distinct_and_fresh_by_seed(shared):
    task = [Task("gcd")]
    uids = {
        (split, seed): {problem.uid for problem in draw(split, task, 600, seed, 1.0)}  # more than a chunk
        for split, seed in (("train", 0), ("train", 1), ("test", 0))
    }
    assert all(len(found) == 600 for found in uids.values())
    # reasoning-gym itself seeds problem i with seed + i: its seeds 0 and 1 have all problems but one in common
    assert len(uids["train", 0] & uids["train", 1]) < 60
    assert len(uids["train", 0] & uids["test", 0]) < 60


def test_problems_are_the_same_in_every_process_whatever_pythons_hash_seed(monkeypatch):
    """The first two of these tasks go through sets of texts, the third draws from Python's global generator."""
    tasks, found = [Task("ransom_note"), Task("isomorphic_strings"), Task("list_functions")], []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append([(problem.uid, problem.answer) for problem in draw("train", tasks, 60, 0, 1.0)])
    assert found[0] == found[1]
    monkeypatch.setattr(gym_process, "PATIENCE", 0)
    assert [(problem.uid, problem.answer) for problem in draw("train", tasks, 9, 0, 1.0)] == found[0][:9]


def test_tasks_come_in_turn_and_a_question_that_is_excluded_does_not_come(shared):
    tasks = [Task("chain_sum"), Task("gcd")]
    problems = draw("train", tasks, 6, 0, 1.0)
    assert [problem.task.name for problem in problems] == ["chain_sum", "gcd"] * 3
    without = frozenset(problem.uid for problem in problems[:3])
    assert not without & {problem.uid for problem in draw("train", tasks, 6, 0, 1.0, without=without)}


def test_more_problems_than_there_are_is_said(shared, monkeypatch):
    monkeypatch.setattr(gym, "TRIES", 200)
    few = Task("count_bits", {"min_n": 1, "max_n": 5})
    with pytest.raises(ValueError, match="9 distinct train problems of count_bits were asked for, and 5 are found"):
        draw("train", [few], 9, 0, 1.0)


def test_rows_are_what_training_reads(drawn):
    problem = of(drawn, "rotate_matrix")[0]
    (row,) = make_dataset([problem])
    assert row == {
        "uid": problem.uid,
        "prompt": [{"role": "user", "content": problem.question}],
        "answer": problem.answer,
        "suite": "rotate_matrix",
    }
    assert re.fullmatch(r"rotate_matrix/[0-9a-f]{16}", problem.uid)


@pytest.mark.parametrize(
    ("source", "tasks"),
    [
        ("reasoning_gym:chain_sum", [Task("chain_sum")]),
        ("reasoning_gym:chain_sum,min_terms=2,max_terms=4", [Task("chain_sum", {"min_terms": 2, "max_terms": 4})]),
        ("reasoning_gym:a,b=[1, 2],c=x y,d=1e+1", [Task("a", {"b": [1, 2], "c": "x y", "d": 10.0})]),
        ('reasoning_gym:a,b="x,y+z",c={"k": 1}', [Task("a", {"b": "x,y+z", "c": {"k": 1}})]),
        ("reasoning_gym:a,b=true+c,d=null+e", [Task("a", {"b": True}), Task("c", {"d": None}), Task("e")]),
        ("reasoning_gym:a,b=3x", [Task("a", {"b": "3x"})]),
        ("reasoning_gym.jsonl", None),
        ("letters:5-10", None),
        ("", None),
    ],
)
def test_sources_that_are_understood(source, tasks):
    assert read_source(source) == tasks


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym", "cannot be read from '' on"),
        ("reasoning_gym:", 'allowed is "reasoning_gym:TASK"'),
        ("reasoning_gym:chain_sum,", "cannot be read from ',' on"),
        ("reasoning_gym:chain_sum,min_terms", "from ',min_terms' on"),
        ("reasoning_gym:chain_sum,min_terms=2+", "from '' on"),
        ("reasoning_gym:chain-sum", "from '-sum' on"),
        ("reasoning_gym:a,b=1,b=2", "sets b twice"),
        ("reasoning_gym:a+a,b=1", "names a task twice"),
    ],
)
def test_sources_that_are_refused(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_source(source)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task("chain_sums"), "no task 'chain_sums' for a run; did you mean 'chain_sum'?"),
        (Task("composite"), 'several tasks are joined by "+"'),
        (Task("chain_sum", {"min_term": 2}), "no setting 'min_term'; did you mean 'min_terms'?"),
        (Task("chain_sum", {"seed": 2}), "data_seed of the run says it"),
        (Task("chain_sum", {"size": 2}), "train_problems and eval_problems of the run says it"),
        (Task("chain_sum", {"min_terms": "two"}), "it must be of type int, as its default 2."),
        (Task("chain_sum", {"min_terms": 2.5}), "it must be of type int"),
        (Task("chain_sum", {"allow_negation": "True"}), "it must be of type bool"),
        (Task("chain_sum", {"allow_negation": 1}), "it must be of type bool"),
    ],
)
def test_tasks_and_settings_that_are_not_there(task, message, known):
    with pytest.raises(ValueError, match=re.escape(message)):
        require_tasks([task], known)


def test_a_whole_number_stands_for_a_share(known):
    require_tasks([Task("syllogism", {"invalid_ratio": 1}), Task("chain_sum", {"allow_negation": True})], known)


def test_settings_that_reasoning_gym_refuses_are_said_in_its_words(shared):
    with pytest.raises(ValueError, match="makes no problems with min_terms=9: AssertionError"):
        draw("train", [Task("chain_sum", {"min_terms": 9})], 1, 0, 1.0)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("rush_hour", "problem 1: its answer is None, with no example of a right one"),
        ("boxnet", "problem 1: its answer is None, with no example of a right one"),
        ("game_of_life_halting", "no exact scoring: it scores the answer '?' with 1"),
    ],
)
def test_tasks_without_exact_scoring_are_refused(task, message, shared):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw("train", [Task(task)], 1, 0, 1.0)


def problem_of(**changes):
    return {"question": "?", "answer": "1", "entry": "", "own": 1.0, "nonsense": 0.0, **changes}


class Answers:
    """A process that makes the problems that it is given, over and over."""

    def __init__(self, *problems):
        self.problems = problems

    def ask(self, what, **request):
        number = gym.CHUNK // len(self.problems)
        return {"tasks": {"t": {}}} if what == "tasks" else {"problems": [*self.problems] * number}

    def close(self):
        pass


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (problem_of(question="bad", answer="{"), "its answer cannot stand in a box: '{'"),
        (problem_of(question="bad", answer="a } b {"), "cannot stand in a box"),
        (problem_of(question="bad", answer="so \\boxed{2}"), "cannot stand in a box"),
        (problem_of(question="bad", answer=" \n"), "cannot stand in a box"),
        (
            problem_of(question="bad", own=0.99),
            "its own answer '1' scores 0.99, which is wrong below",
        ),
        (problem_of(question="bad", own=float("nan")), "scores nan"),
        (problem_of(question="bad", answer=None), "its answer is None"),
        ({"error": "ValueError: gave up"}, "it could not be made (ValueError: gave up)"),
    ],
)
def test_problems_that_cannot_be_won_are_refused_or_replaced(bad, message, monkeypatch, caplog):
    monkeypatch.setattr(gym, "GymProcess", lambda: Answers(problem_of(), bad, problem_of(question="also")))
    with pytest.raises(ValueError, match=re.escape(message) + ".*Set skip_refused"):
        draw("train", [Task("t")], 2, 0, 1.0)
    with caplog.at_level(logging.WARNING):
        problems = draw("train", [Task("t")], 2, 0, 1.0, skip_refused=True)
    assert [problem.question for problem in problems] == ["?", "also"]
    assert "1 of 3 train problems of task t cannot be won" in caplog.text and message in caplog.text


def test_a_task_that_can_never_be_won_ends_where_all_are_refused(monkeypatch):
    monkeypatch.setattr(gym, "GymProcess", lambda: Answers(problem_of(answer=None)))
    with pytest.raises(ValueError, match="problem 1000: its answer is None"):
        draw("train", [Task("t")], 1, 0, 1.0, skip_refused=True)


def test_own_scores_below_one_are_right_below_a_threshold(monkeypatch):
    monkeypatch.setattr(gym, "GymProcess", lambda: Answers(problem_of(own=0.8, nonsense=0.1)))
    assert len(draw("train", [Task("t")], 1, 0, 0.8)) == 1
    with pytest.raises(ValueError, match=r"scores the answer '\?' with 0.1, which is right from"):
        draw("train", [Task("t")], 1, 0, 0.1)


def test_a_missing_package_is_said_with_its_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == gym.NAME else found(name, *rest)
    )
    with pytest.raises(ValueError, match=re.escape("pip install 'npo_core[reasoning-gym]'")):
        gym.require_installed("reasoning_gym:gcd")


def test_an_answer_that_never_ends_or_fills_the_memory_is_wrong_and_the_next_is_judged(shared, monkeypatch, caplog):
    """Countdown gives the expression to sympy; the cube writes a move out as often as its number says."""
    endless, large = draw("train", [Task("countdown", {"max_numbers": 4}), Task("rubiks_cube")], 2, 0, 1.0)
    monkeypatch.undo()
    verifier = GymVerifier({problem.uid: problem for problem in (endless, large)}, 1.0)
    monkeypatch.setattr(gym, "SECONDS", 2.0)
    assert verifier(r"\boxed{9**9**9**9}", {"uid": endless.uid}) is Verdict.WRONG
    assert "took too long at an answer, or ended at it: '9**9**9**9'" in caplog.text
    monkeypatch.setattr(gym, "SECONDS", 60.0)
    assert verifier(f"\\boxed{{{endless.answer}}}", {"uid": endless.uid}) is Verdict.CORRECT
    assert verifier(r"\boxed{R9999999999}", {"uid": large.uid}) is Verdict.WRONG
    assert verifier(f"\\boxed{{{large.answer}}}", {"uid": large.uid}) is Verdict.CORRECT
    verifier.close()


def test_what_an_answer_evaluates_writes_no_file_and_asks_nobody(shared, monkeypatch, tmp_path):
    """n_queens evaluates an answer in brackets as Python: it would write, wait for a line of input, end the process."""
    (problem,) = draw("train", [Task("n_queens", {"n": 4, "max_remove": 2})], 1, 0, 1.0)
    monkeypatch.undo()
    verifier = GymVerifier({problem.uid: problem}, 1.0)
    row, target = {"uid": problem.uid}, tmp_path / "written"
    for text in (f"[open({str(target)!r}, 'w').write('x')]", "[input()]", "[exit()]"):
        assert verifier(f"\\boxed{{{text}}}", row) is Verdict.WRONG
    assert target.read_text() == ""  # it was evaluated, and could not write
    assert verifier(f"\\boxed{{{problem.answer}}}", row) is Verdict.CORRECT
    verifier.close()


def test_a_process_that_was_interrupted_answers_the_next_question_and_not_the_last(monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt  # by no signal: a shell that starts the tests in the background has them ignore it

    with closing(GymProcess()) as process:
        make = {"task": "chain_sum", "settings": {}, "seed": 1, "first": gym_process.CHUNK - 1}
        first = process.ask("make", **make)
        monkeypatch.setattr(gym_process.select, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.ask("make", seconds=60, **{**make, "seed": 2})
        monkeypatch.undo()
        assert process.ask("make", **make) == first


def test_a_process_that_ended_is_said_and_started_again():
    with closing(GymProcess()) as process:
        process.ask("tasks")
        process._process.kill()
        with pytest.raises(ProcessEnded, match="at 'tasks'"):
            process.ask("tasks")
        assert "chain_sum" in process.ask("tasks")["tasks"]


@pytest.mark.slow
def test_of_all_tasks_those_with_exact_scoring_can_be_won(shared, known):
    """Each task's own answers, in a box, are right, and a word that answers nothing is wrong."""
    names = sorted(known.keys() - {gym.COMPOSITE})
    assert len(names) == 105
    refused = set()
    for name in names:
        try:
            problems = draw("train", [Task(name)], 3, 0, 1.0)
        except ValueError as error:
            assert "exact" in str(error)
            refused.add(name)
            continue
        verifier = GymVerifier({problem.uid: problem for problem in problems}, 1.0)
        for problem in problems:
            assert verifier(f"\\boxed{{{problem.answer}}}", {"uid": problem.uid}) is Verdict.CORRECT, problem
            assert verifier("\\boxed{zzz}", {"uid": problem.uid}) is Verdict.WRONG, problem
    assert refused == INEXACT


def test_a_scorer_that_raises_is_said_once_a_task(drawn, caplog):
    class Fussy:
        def score_answer(self, answer, entry):
            return 1.0 if answer.isdecimal() else int(answer)

    found = gym_process._scored(Fussy(), "seven", {})
    assert found["score"] == 0.0 and found["raised"].startswith("ValueError: invalid literal")
    assert gym_process._scored(Fussy(), "7", {}) == {"score": 1.0, "raised": ""}
    (problem, *_) = of(drawn, "chain_sum")
    verifier = GymVerifier({problem.uid: problem}, 1.0)
    verifier._process = type("Process", (), {"ask": lambda self, *_, **__: found, "close": lambda self: None})()
    with caplog.at_level("WARNING"):
        verdicts = [verifier(f"\\boxed{{{answer}}}", {"uid": problem.uid}) for answer in ("7", "8", "9")]
    assert set(verdicts) == {Verdict.WRONG}
    assert caplog.text.count("scorer of reasoning-gym's chain_sum raised ValueError") == 1
