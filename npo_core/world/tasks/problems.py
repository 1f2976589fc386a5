"""Problems of the small world: sampling, the exact solver, the picture, and the disjoint splits."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .families import CELL, FAMILIES, SUITES, Family, family_of

ROWS, COLUMNS = 2, 3
"""Cells of a picture."""

SPLITS = ("train", "test")
TEST_SHARE = 10
"""One of so many problems is a test problem."""

TRIES = 1000
"""Draws of one length in a row that give nothing new before that length counts as used up."""

SPACE = "\\quad"
"""Word between reading and box in the second form."""


@dataclass(frozen=True)
class Problem:
    """One task: a family, a start state, and the glyphs to apply in order.

    Attributes:
        suite: Benchmark suite, see `SUITES`.
        start: Start state, in `range(family.states)`.
        glyphs: Glyph indices, one per step.
    """

    suite: str
    start: int
    glyphs: tuple[int, ...]

    @property
    def uid(self) -> str:
        """Content-based identity, the same in every run and on every machine."""
        return f"{self.suite}-{self.start}-{''.join(map(str, self.glyphs))}"

    @property
    def family(self) -> Family:
        """The family that holds the rule and the glyphs."""
        return family_of(self.suite)

    @property
    def difficulty(self) -> int:
        """Number of steps in the exact solution."""
        return len(self.glyphs)

    def states(self) -> list[int]:
        """States after each step, by the exact solver."""
        state, out = self.start, []
        for glyph in self.glyphs:
            state = self.family.rule(state, glyph)
            out.append(state)
        return out

    @property
    def answer(self) -> str:
        """The whole path, as digits with spaces between: an answer that is right is right in every step."""
        return " ".join(map(str, self.states()))

    @property
    def question(self) -> str:
        """Text of the prompt; the picture comes before it."""
        return f"{self.family.title} : {self.family.question} {self.start} ."

    @property
    def reading_question(self) -> str:
        """Text of the prompt that asks for the glyphs alone; the warm start uses it."""
        return f"{self.family.title} : read ."

    @property
    def reading(self) -> str:
        """What the picture shows: the words of its glyphs, in order."""
        return " ".join(self.family.glyphs[glyph] for glyph in self.glyphs)

    def picture(self) -> Image.Image:
        """The picture: 2 × 3 cells read row by row, 48 × 32 pixels, RGB.

        Each glyph is moved by up to one pixel, by an amount that depends on the uid alone.
        """
        image = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), (250, 250, 248))
        canvas = ImageDraw.Draw(image)
        jitter = np.random.default_rng(_digest(self.uid)).integers(-1, 2, size=(len(self.glyphs), 2))
        for index, glyph in enumerate(self.glyphs):
            row, column = divmod(index, COLUMNS)
            left, top = column * CELL + 2 + int(jitter[index, 0]), row * CELL + 2 + int(jitter[index, 1])
            self.family.draw(canvas, glyph, (left, top, left + CELL - 5, top + CELL - 5))
        return image


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(problem: Problem) -> str:
    """Split that a problem belongs to: a tenth of all problems, chosen by a hash of the uid, is the test split."""
    return "test" if _digest("split:" + problem.uid) % TEST_SHARE == 0 else "train"


def write_response(problem: Problem, states: Sequence[int], second_form: bool = False) -> str:
    r"""Response text in the world's format: `\boxed{path}`, the state after each step.

    Args:
        problem: The task.
        states: State written after each step; need not be right.
        second_form: Name the glyphs first. Both forms give the same answer.
    """
    if len(states) != len(problem.glyphs):
        raise ValueError(f"Got {len(states)} states for a chain of {len(problem.glyphs)} steps; pass one per step.")
    box = " ".join(["\\boxed{", *map(str, states), "}"])
    return f"{problem.reading} {SPACE} {box}" if second_form else box


def sample_problems(split: str, count: int, seed: int, suites: Sequence[str] = SUITES) -> list[Problem]:
    """Draw distinct problems, the suites in turn, chain lengths uniform within the family's range while they last.

    Args:
        split: "train" or "test"; the splits share no problem, whatever the seeds.
        count: Number of problems.
        seed: Seed of the draw.
        suites: Suites to draw from.

    Raises:
        ValueError: Unknown split or suite, or more problems asked for than the suites hold.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Allowed: {', '.join(SPLITS)}.")
    families = [family_of(suite) for suite in suites]
    if not families:
        raise ValueError(f"No suite given. Allowed: {', '.join(SUITES)}.")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    left = {family.suite: list(range(family.lengths[0], family.lengths[1] + 1)) for family in families}
    seen: set[str] = set()
    problems: list[Problem] = []
    while len(problems) < count:
        family = families[len(problems) % len(families)]
        if not left[family.suite]:
            raise ValueError(
                f"{count} distinct {split} problems are more than {', '.join(suites)} hold; ask for fewer."
            )
        length = int(rng.choice(left[family.suite]))
        problem = _new_problem(family, length, split, seen, rng)
        if problem is None:
            left[family.suite].remove(length)
            continue
        seen.add(problem.uid)
        problems.append(problem)
    return problems


def _new_problem(
    family: Family, length: int, split: str, seen: Collection[str], rng: np.random.Generator
) -> Problem | None:
    """A problem of this split and length that was not seen; None when as good as all were."""
    for _ in range(TRIES):
        glyphs = tuple(rng.integers(0, len(family.glyphs), size=length).tolist())
        problem = Problem(family.suite, int(rng.integers(family.states)), glyphs)
        if problem.uid not in seen and split_of(problem) == split:
            return problem
    return None


def parse_uid(uid: str) -> Problem:
    """Problem with this uid.

    Raises:
        ValueError: The uid is not one of this world's.
    """
    parts = uid.split("-")
    if len(parts) != 3 or parts[0] not in SUITES or not all(p.isascii() and p.isdigit() for p in parts[1:]):
        raise ValueError(f"{uid!r} is not a uid of this world; expected suite-start-glyphs, such as mathvista-3-0112.")
    problem = Problem(parts[0], int(parts[1]), tuple(map(int, parts[2])))
    known = problem.start < problem.family.states and max(problem.glyphs) < len(problem.family.glyphs)
    if not known or problem.uid != uid:
        raise ValueError(f"{uid!r} names a state or a glyph that the family {problem.family.title} does not have.")
    return problem


def vocabulary() -> list[str]:
    """Every word that a prompt or a response can hold, in a fixed order."""
    words = [str(digit) for digit in range(10)] + [SPACE, "\\boxed{", "}", ":", ".", "read"]
    for family in FAMILIES:
        words += [family.title, *family.glyphs, *family.question.split()]
    return list(dict.fromkeys(words))
