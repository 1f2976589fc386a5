r"""Tasks of reasoning-gym as data of a run: `data = "reasoning_gym:chain_sum,min_terms=2,max_terms=4"`.

A task has settings of its own, which say how hard it is; several tasks, joined by a plus, come in turn. A question is
asked as the task asks it. The answer stands in `\boxed{}`, as everywhere in this package, in place of the tags
`<answer>` of reasoning-gym's own prompts, and what the box holds is scored by the task's `score_answer`: a score that
reaches the setting `score_threshold` is right, any other is wrong. So partial scores are not paid (ours).

Nothing is trained on that cannot be won: a problem counts only if its own answer, in a box, is right, and a task that
takes nonsense for right is refused. A task whose answer is None, as several are right, is tried with its own example.
"""

import functools
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from ..declaration import nearest
from ..guidance.verdicts import Verdict
from ..guidance.verifiers import extract_answer
from ..progress import ProgressBar
from ..streams import GYM
from .gym_process import CHUNK, KINDS, NONSENSE, SECONDS, GymProcess, ProcessEnded

NAME = "reasoning_gym"
"""First word of the source."""

INSTRUCTION = r"Put the final answer in \boxed{}, in the form that the question asks for."
"""What a question ends with, unless the setting `instruction` says otherwise."""

ALLOWED = (
    f'"{NAME}:TASK", or with settings of the task "{NAME}:TASK,NAME=VALUE,…", such as '
    f'"{NAME}:chain_sum,min_terms=2,max_terms=4"; several tasks are joined by "+"'
)

OURS = {"seed": "data_seed", "size": "train_problems and eval_problems"}
"""Settings of every task that a run's own settings stand for."""

COMPOSITE = "composite"
"""Several tasks in one, in reasoning-gym's own list of tasks."""

TRIES = 1000
"""Problems in a row that are known already before a task counts as used up."""

_TASK = re.compile(r"[A-Za-z_]\w*")
_KEY = re.compile(r",\s*(\w+)\s*=\s*")
_WORD = re.compile(r"[^,+]*")
_NO_NUMBER = re.compile(r"(?<![a-z])nan(?![a-z])", re.IGNORECASE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A task of reasoning-gym.

    Attributes:
        name: Its name there.
        settings: Its own settings that are not left at their default.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A problem of a task.

    Attributes:
        task: Its task.
        question: What is asked.
        answer: A right answer, one of several where the task takes several.
        entry: What the process of reasoning-gym scores it by; read there only.
    """

    task: Task
    question: str
    answer: str
    entry: str

    @property
    def uid(self) -> str:
        """Content-based identity, the same in every run and on every machine."""
        return f"{self.task.name}/{hashlib.sha256(self.question.encode()).hexdigest()[:16]}"


class GymVerifier:
    r"""Correct when the task's own score of what the last box holds reaches the threshold (ours).

    A response without a box, or with an empty one, is `UNPARSEABLE`. An answer at which the task's scoring raises an
    error, or that takes too long or too much memory, is wrong. So is one that is not a number ("nan") where the task's
    own is: at least one task takes every distance to it for none.

    Args:
        problems: Problems that are verified, by uid.
        threshold: Score from which an answer is right.
    """

    def __init__(self, problems: Mapping[str, Problem], threshold: float):
        self.problems, self.threshold = problems, threshold
        self._process = GymProcess()
        self._score = functools.lru_cache(maxsize=1 << 16)(self._asked)
        self._raised: set[str] = set()

    def __call__(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Verify one completion.

        Args:
            completion: Completion text; any text is fine.
            row: Data set row, of which the uid is read.

        Raises:
            ValueError: The row is no problem of this source.
        """
        uid = row.get("uid")
        if uid not in self.problems:
            raise ValueError(f"the row has uid {uid!r}, which is no problem of this run's data.")
        given = extract_answer(completion)
        if not given:
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if self._score(uid, given) >= self.threshold else Verdict.WRONG

    def close(self) -> None:
        """End its process, which ends with the verifier in any case; the next answer starts another."""
        self._process.close()

    def _asked(self, uid: str, given: str) -> float:
        problem = self.problems[uid]
        if _NO_NUMBER.search(given) and not _NO_NUMBER.search(problem.answer):
            return 0.0
        asked = {"task": problem.task.name, "settings": problem.task.settings, "entry": problem.entry}
        try:
            found = self._process.ask("score", SECONDS, answer=given, **asked)
        except ProcessEnded:
            logger.warning("Task %s of reasoning-gym took too long at an answer, or ended at it: %r", uid, given[:200])
            return 0.0
        if found["raised"] and problem.task.name not in self._raised:
            self._raised.add(problem.task.name)
            said = (
                "The scorer of reasoning-gym's %s raised %s at the answer %r, which counts as wrong; said once a task"
            )
            logger.warning(said, problem.task.name, found["raised"], given[:200])
        return found["score"] if found["score"] == found["score"] else 0.0


def read_source(source: str) -> list[Task] | None:
    """Tasks that a data source such as "reasoning_gym:chain_sum,max_terms=4+gcd" names; None if it is another source.

    A value is read as JSON, else as a bare word. Whether there are such tasks and settings is not looked at.

    Raises:
        ValueError: It begins like this one, and is none that can be read.
    """
    name, _, rest = source.partition(":")
    if name != NAME:
        return None
    tasks: list[Task] = []
    place, ended = 0, False
    while found := _TASK.match(rest, place):
        place, settings = found.end(), {}
        while key := _KEY.match(rest, place):
            value, place = _value(rest, key.end())
            if key[1] in settings:
                raise ValueError(f"data is {source!r}, which sets {key[1]} twice.")
            settings[key[1]] = value
        tasks.append(Task(found.group(), settings))
        ended = not rest.startswith("+", place)
        if ended:
            break
        place += 1
    if not tasks or not ended or place != len(rest):
        raise ValueError(f"data is {source!r}, which cannot be read from {rest[place:]!r} on; allowed is {ALLOWED}.")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"data is {source!r}, which names a task twice; a task is a test suite of its own.")
    return tasks


def _value(text: str, place: int) -> tuple[Any, int]:
    """The value that stands at a place, and where it ends."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, place)
        if end == len(text) or text[end] in ",+":
            return value, end
    except json.JSONDecodeError:
        pass  # a bare word
    word = _WORD.match(text, place)
    assert word is not None  # it matches nothing, too
    return word.group().strip(), word.end()


def require_tasks(tasks: Sequence[Task], known: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Refuse tasks and settings that reasoning-gym does not have.

    Args:
        tasks: Tasks.
        known: Type and default of each setting of each task, by names; the type is empty where it is not known.

    Raises:
        ValueError: An unknown task or setting, with the nearest name, or a value of another type.
    """
    names = sorted(known.keys() - {COMPOSITE})
    for task in tasks:
        if task.name not in names:
            near = '; several tasks are joined by "+".' if task.name == COMPOSITE else nearest(task.name, names)
            raise ValueError(f"reasoning-gym has no task {task.name!r} for a run{near} Allowed: {', '.join(names)}.")
        settings = {name: one for name, one in known[task.name].items() if name not in OURS}
        for name, value in task.settings.items():
            if name in OURS:
                raise ValueError(f"{name} of task {task.name} is not set here: {OURS[name]} of the run says it.")
            if name not in settings:
                raise ValueError(
                    f"Task {task.name} of reasoning-gym has no setting {name!r}{nearest(name, settings)} Allowed: "
                    f"{', '.join(sorted(settings)) or 'none'}."
                )
            kind, default = settings[name]
            given = next((one for one, types in KINDS.items() if isinstance(value, types)), "")
            if kind not in ("", given) and (kind, given) != ("float", "int"):
                raise ValueError(
                    f"{name} of task {task.name} is {value!r}; it must be of type {kind}, as its default {default}. "
                    'Values are read as JSON (3, 0.5, true, [1, 2], {"a": 1}), else as words.'
                )


def require_installed(source: str) -> None:
    """Refuse a source where reasoning-gym is not installed."""
    if importlib.util.find_spec(NAME) is None:
        raise ValueError(
            f"data is {source!r}, but reasoning-gym is not installed here: pip install 'npo_core[reasoning-gym]'."
        )


def draw(
    split: str,
    tasks: Sequence[Task],
    count: int,
    seed: int,
    threshold: float,
    *,
    without: frozenset[str] = frozenset(),
    skip_refused: bool = False,
    quiet: bool = True,
) -> list[Problem]:
    """Draw distinct problems, the tasks in turn while they last.

    Args:
        split: "train" or "test", which draw from seeds of their own.
        tasks: Tasks, and the settings of each.
        count: Number of problems.
        seed: Seed of the draw.
        threshold: Score from which an answer is right.
        without: Uids of problems that are not drawn.
        skip_refused: Draw others in place of problems whose own answer is not right.
        quiet: Without a progress bar.

    Raises:
        ValueError: A task or setting that reasoning-gym does not have or refuses, a problem whose own answer is not
            right, or more problems asked for than there are.
    """
    found: dict[str, Problem] = {}
    # a process of its own, as a task may remember what it made
    with closing(GymProcess()) as process:
        require_tasks(tasks, process.ask("tasks")["tasks"])
        streams = [_Stream(process, task, split, seed, threshold, skip_refused) for task in tasks]
        left = list(streams)
        with ProgressBar(count, f"{split} problems", quiet, stays=False) as bar:
            while len(found) < count:
                if not left:
                    raise ValueError(
                        f"{count} distinct {split} problems of {' + '.join(task.name for task in tasks)} were asked "
                        f"for, and {len(found)} are found: lower train_problems or eval_problems, or let the settings "
                        "of the task vary more."
                    )
                stream = left.pop(0)
                draws = (next(stream.problems) for _ in range(TRIES))
                new = next((one for one in draws if one.uid not in found and one.uid not in without), None)
                if new is not None:
                    found[new.uid] = new
                    left.append(stream)
                    bar.advance()
    for stream in streams:
        if stream.refused:
            logger.warning(
                "%s of %s %s problems of task %s cannot be won and are left out, the last one for: %s.",
                *(stream.refused, stream.made, split, stream.task.name, stream.why),
            )
    return list(found.values())


class _Stream:
    """The endless problems of a task that can be won."""

    def __init__(self, process: GymProcess, task: Task, split: str, seed: int, threshold: float, skip_refused: bool):
        self.process, self.task, self.split, self.seed = process, task, split, seed
        self.threshold, self.skip_refused = threshold, skip_refused
        self.made, self.refused, self.why = 0, 0, ""
        self.problems = self._won()

    def _won(self) -> Iterator[Problem]:
        for one in self._all():
            self.made += 1
            why = self._refusal(one)
            if not why:
                yield Problem(self.task, one["question"], one["answer"], one["entry"])
                continue
            self.refused, self.why = self.refused + 1, why
            if not self.skip_refused or self.refused == self.made == TRIES:
                advice = "" if self.skip_refused else " Set skip_refused to draw others in place of such problems."
                raise ValueError(
                    f"Task {self.task.name} of reasoning-gym cannot be trained on, problem {self.made}: {why}.{advice}"
                )

    def _refusal(self, one: Mapping[str, Any]) -> str:
        """Why a problem cannot be won; empty if it can.

        Raises:
            ValueError: It is won by nonsense, and then so are others of the task.
        """
        if "error" in one:
            return f"it could not be made ({one['error']})"
        if one["nonsense"] >= self.threshold:
            raise ValueError(
                f"Task {self.task.name} of reasoning-gym has no exact scoring: it scores the answer {NONSENSE!r} with "
                f"{one['nonsense']:g}, which is right from score_threshold = {self.threshold:g} on."
            )
        answer = one["answer"]
        if answer is None:
            return "its answer is None, with no example of a right one, so whether its scoring is exact cannot be known"
        if not answer.strip() or extract_answer(f"\\boxed{{{answer}}}") != answer.strip():
            return f"its answer cannot stand in a box: {answer[:80]!r}"
        if not one["own"] >= self.threshold:
            return (
                f"no exact scoring: its own answer {answer[:80]!r} scores {one['own']:g}, which is wrong below "
                f"score_threshold = {self.threshold:g}"
            )
        return ""

    def _all(self) -> Iterator[Mapping[str, Any]]:
        chunk = 0
        while True:
            # pool_matrix seeds numpy, whose seeds end below 2³²
            seed = GYM.seed(self.seed, self.split, self.task.name, chunk) >> 1
            first = 0
            while first < CHUNK:
                request = {"task": self.task.name, "settings": self.task.settings, "seed": seed, "first": first}
                reply = self.process.ask("make", **request)
                if "error" in reply:
                    given = ", ".join(f"{name}={json.dumps(value)}" for name, value in self.task.settings.items())
                    raise ValueError(
                        f"Task {self.task.name} of reasoning-gym makes no problems with {given or 'its defaults'}: "
                        f"{reply['error']}."
                    )
                first += len(reply["problems"])
                yield from reply["problems"]
            chunk += 1


def make_dataset(problems: Sequence[Problem]) -> Dataset:
    """Rows (uid, prompt, answer, suite), one per problem; a task is a suite."""
    return Dataset.from_list(
        [
            {
                "uid": problem.uid,
                "prompt": [{"role": "user", "content": problem.question}],
                "answer": problem.answer,
                "suite": problem.task.name,
            }
            for problem in problems
        ]
    )
