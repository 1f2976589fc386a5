"""The eight families of visual tasks: one per benchmark suite of the paper, each with its rule and its glyphs.

A task shows a picture of up to six cells. Each cell holds one of the family's glyphs, and every glyph is an operation
on a small state. The policy reads the cells row by row, starts from the state that the prompt names, applies one
operation after the other, and answers with the whole path. `rule(state, glyph)` is the exact solver's single step: an
*elementary fact*. Every glyph permutes the states, so that no chain forgets where it came from. The states of a family
lie on a dial of its own, in no order that arithmetic or another family would tell, so that a fact is hardly inferred
from the others.

The families are ours (the paper trains on MMFineReason-123K and tests on eight public benchmarks); they keep the
number of suites and let every answer be checked exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import ImageDraw

Box = tuple[int, int, int, int]
"""Left, top, right, bottom of a glyph in pixels, inclusive."""

CELL = 16
"""Side of a picture cell in pixels: one merged vision token (patch 8, merge 2)."""


@dataclass(frozen=True)
class Family:
    """One family of tasks.

    Attributes:
        suite: Benchmark suite that the family stands in for (column of the paper's Table 1).
        title: Word that names the family in the prompt.
        states: Number of states; a state is an integer in `range(states)`, written as a digit.
        glyphs: Words for the glyphs, in order, for readers and for prompts without a picture.
        dial: The states in the order in which they lie, as the hours on a clock's face; place to state.
        move: `move(place, glyph index) -> next place`, what the glyph does on the dial.
        draw: `draw(canvas, glyph index, box)` paints one glyph.
        question: The instruction in the prompt, words separated by spaces; the start state follows.
        lengths: Shortest and longest chain, in steps.
    """

    suite: str
    title: str
    states: int
    dial: tuple[int, ...]
    glyphs: tuple[str, ...]
    move: Callable[[int, int], int]
    draw: Callable[[ImageDraw.ImageDraw, int, Box], None]
    question: str
    lengths: tuple[int, int]

    def rule(self, state: int, glyph: int) -> int:
        """Next state: the exact solver's single step."""
        return self.dial[self.move(self.dial.index(state), glyph)]

    @property
    def facts(self) -> list[tuple[str, int, int]]:
        """Every elementary fact of the family as (suite, state, glyph index)."""
        return [(self.suite, state, glyph) for state in range(self.states) for glyph in range(len(self.glyphs))]


INK, BLUE, ORANGE, GREEN, RED = (40, 40, 46), (1, 115, 178), (222, 143, 5), (2, 158, 115), (213, 94, 0)


def _line(canvas: ImageDraw.ImageDraw, points: list[tuple[int, int]], colour=INK, width: int = 2) -> None:
    canvas.line(points, fill=colour, width=width)


def _draw_bar(canvas, glyph, box):
    left, _, right, bottom = box
    canvas.rectangle((left + 2, bottom - (3, 7, 11)[glyph], right - 2, bottom), fill=BLUE)
    _line(canvas, [(left, bottom), (right, bottom)], width=1)


def _draw_arrow(canvas, glyph, box):
    left, top, right, bottom = box
    middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
    if glyph == 1:  # down
        _line(canvas, [(middle_x, top), (middle_x, bottom)])
        canvas.polygon([(middle_x, bottom), (left + 1, bottom - 5), (right - 1, bottom - 5)], fill=INK)
        return
    _line(canvas, [(left, middle_y), (right, middle_y)])
    tip, shaft = ((right, right - 5), None, (left, left + 5))[glyph]
    canvas.polygon([(tip, middle_y), (shaft, top + 1), (shaft, bottom - 1)], fill=INK)


def _draw_gear(canvas, glyph, box):
    left, top, right, bottom = box
    canvas.ellipse(box, outline=ORANGE, width=(1, 3, 1)[glyph], fill=(None, None, ORANGE)[glyph])
    middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
    _line(canvas, [(left, middle_y), (right, middle_y)], RED, 1)
    _line(canvas, [(middle_x, top), (middle_x, bottom)], RED, 1)


def _draw_dice(canvas, glyph, box):
    left, top, right, bottom = box
    canvas.rectangle(box, outline=INK)
    middle = ((left + right) // 2, (top + bottom) // 2)
    diagonal, other = [(left + 3, top + 3), (right - 3, bottom - 3)], [(left + 3, bottom - 3), (right - 3, top + 3)]
    pips = ([middle], diagonal, diagonal + other)[glyph]
    for x, y in pips:
        canvas.rectangle((x - 1, y - 1, x + 1, y + 1), fill=INK)


def _draw_swatch(canvas, glyph, box):
    canvas.rectangle(box, fill=(RED, BLUE, GREEN)[glyph], outline=INK)


def _draw_mirror(canvas, glyph, box):
    left, top, right, bottom = box
    corners = [(3, 0), (8, 0), (11, 3), (11, 8), (8, 11), (3, 11), (0, 8), (0, 3)]
    canvas.polygon([(left + x, top + y) for x, y in corners], outline=GREEN)
    if glyph == 0:  # turn
        canvas.polygon([(left + 3, top + 3), (right - 2, (top + bottom) // 2), (left + 3, bottom - 3)], fill=GREEN)
    elif glyph == 1:  # flip over an axis
        _line(canvas, [((left + right) // 2, top), ((left + right) // 2, bottom)], RED, 2)
    else:  # cross to the third corner from here
        _line(canvas, [(left + 2, top + 2), (right - 2, bottom - 2)], BLUE, 2)
        _line(canvas, [(left + 2, bottom - 2), (right - 2, top + 2)], BLUE, 2)


def _draw_gate(canvas, glyph, box):
    left, top, right, bottom = box
    middle_y = (top + bottom) // 2
    if glyph == 0:  # not: triangle with a bubble
        canvas.polygon([(left, top), (left, bottom), (right - 4, middle_y)], outline=INK)
        canvas.ellipse((right - 4, middle_y - 2, right, middle_y + 2), fill=INK)
    elif glyph == 1:  # shift: double chevron
        for offset in (0, 5):
            _line(canvas, [(left + offset, top), (left + offset + 5, middle_y), (left + offset, bottom)], BLUE, 2)
    else:  # swap: two arrows
        for y, tip, shaft in ((top + 2, right, right - 4), (bottom - 2, left, left + 4)):
            _line(canvas, [(left, y), (right, y)], RED, 1)
            canvas.polygon([(tip, y), (shaft, y - 2), (shaft, y + 2)], fill=RED)


def _draw_clock(canvas, glyph, box):
    left, top, right, bottom = box
    canvas.ellipse(box, outline=INK, fill=(236, 225, 206))
    middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
    hand = ((right, middle_y), (middle_x, bottom), (left, middle_y))[glyph]
    _line(canvas, [(middle_x, middle_y), hand], RED, 2)


LENGTHS = (4, 6)
"""Shortest and longest chain. Of 8 states, a path of four steps is guessed one time in 4,096."""


FAMILIES: tuple[Family, ...] = (
    Family(
        "mmmu_pro", "gates", 8, (3, 2, 6, 4, 0, 1, 7, 5), ("not", "shift", "swap"),
        lambda s, g: (7 - s, (2 * s) % 8 + s // 4, s // 4 + s % 4 // 2 * 2 + s % 2 * 4)[g], _draw_gate,
        "run the gates on", LENGTHS,
    ),
    Family(
        "mathvista", "chart", 8, (3, 1, 0, 6, 5, 2, 7, 4), ("low", "middle", "high"),
        lambda s, g: (s + (1, 2, 3)[g]) % 8, _draw_bar,
        "add the bars to", LENGTHS,
    ),
    Family(
        "mathvision", "path", 8, (4, 2, 3, 1, 6, 5, 0, 7), ("right", "down", "left"),
        lambda s, g: 4 * ((s // 4 + g % 2) % 2) + (s % 4 + 1 - g) % 4, _draw_arrow,
        "walk the arrows from", LENGTHS,
    ),
    Family(
        "zerobench", "gears", 8, (4, 1, 7, 0, 2, 6, 5, 3), ("thin", "thick", "full"),
        lambda s, g: ((3 * s + 1) % 8, (5 * s + 2) % 8, (7 * s + 3) % 8)[g], _draw_gear,
        "turn the gears at", LENGTHS,
    ),
    Family(
        "wemath", "dice", 9, (2, 6, 3, 7, 4, 0, 1, 8, 5), ("one", "two", "four"),
        lambda s, g: ((1, 2, 4)[g] * s + 1) % 9, _draw_dice,
        "multiply the dice onto", LENGTHS,
    ),
    Family(
        "mmbench", "colours", 8, (0, 3, 6, 1, 4, 7, 5, 2), ("red", "blue", "green"),
        lambda s, g: (s + (2, 4, 5)[g]) % 8, _draw_swatch,
        "spin the wheel from", LENGTHS,
    ),
    Family(
        "mmstar", "clock", 8, (0, 7, 6, 4, 1, 3, 5, 2), ("quarter", "half", "last"),
        lambda s, g: (s - (1, 4, 6)[g]) % 8, _draw_clock,
        "move the clock back from", LENGTHS,
    ),
    Family(
        "mathverse", "octagon", 8, (1, 2, 0, 4, 7, 6, 3, 5), ("turn", "flip", "cross"),
        lambda s, g: ((s + 1) % 8, (2 - s) % 8, (s + 3) % 8)[g], _draw_mirror,
        "follow the corner from", LENGTHS,
    ),
)  # fmt: skip
"""The eight families, in the order of the paper's Table 1."""

SUITES: tuple[str, ...] = tuple(family.suite for family in FAMILIES)
"""Suite names, in the order of the paper's Table 1."""


def family_of(suite: str) -> Family:
    """Family that stands in for `suite`.

    Raises:
        ValueError: Unknown suite.
    """
    for family in FAMILIES:
        if family.suite == suite:
            return family
    raise ValueError(f"Unknown suite {suite!r}. Allowed: {', '.join(SUITES)}.")
