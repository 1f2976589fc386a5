r"""When two answers are the same: one spelling for each expression, and numbers as precise as they are written (ours).

Standard library only, linear in an answer's length, and no text can make it raise or hang: nothing is evaluated, so an
expression that is not a plain number (5^(5^(5^5)), 1/2004!) is compared as text. That is stricter than a computer
algebra system: equal expressions in other forms count as wrong. `docs/verification.md` has the rules with examples.

Three steps: `normalise_answer` spells an answer in one way, command by command; `read_number` reads what is left as a
number, if it is one; `same_answer` compares.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

RELATIVE_TOLERANCE = Fraction(1, 10**6)
"""Largest relative error of a number that is not an integer; what is written may allow less."""

MAX_NUMBER_LENGTH = 64
"""Longer texts are not read as numbers."""

WORD = 3
"""Letters from which on a run of letters is a word, whose case means nothing, and no symbol or unit."""

SHORT_WORDS = frozenset(
    ("am", "an", "at", "by", "do", "go", "if", "in", "is", "it", "no", "of", "on", "or", "pm", "so", "to", "up")
)
"""Words of fewer letters."""

_DIGIT = frozenset("0123456789")
_SPACE, _THIN = " ", "\u2009"
_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ",
        (
            "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu",
            "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta",
            "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega",
        ),
        strict=True,
    )
)  # fmt: skip
_SIGNS = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # the wide forms of ASCII
        **{sign: f"^{power}" for power, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{
            sign: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("\u2044"))
            for sign in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
        },
        **dict.fromkeys("\u2212\u2013", "-"),
        **dict.fromkeys("\0\1\u200b\u2060\ufeff", ""),
        **dict.fromkeys("\u200a\u202f", _THIN),
        "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "\\div ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ",
        "±": "\\pm ", "°": "^\\circ ", "∘": "\\circ ", "√": "\\sqrt ", "∞": "\\infty ", "∪": "\\cup ",
        "∩": "\\cap ", "µ": "μ", "。": ".",
    }
)  # fmt: skip
_SPELLINGS = {
    **dict.fromkeys(("\\dfrac", "\\tfrac", "\\cfrac"), "\\frac"),
    **dict.fromkeys(("\\;", "\\:", "\\ ", "~", "\\quad", "\\qquad", "\\enspace", "\\space"), _SPACE),
    **dict.fromkeys(("\\,", "\\thinspace"), _THIN),
    **dict.fromkeys(("\\!", "\\(", "\\)", "\\[", "\\]", "$", "\\left", "\\right", "\\displaystyle", "\\textstyle"), ""),
    **dict.fromkeys(("\\big", "\\Big", "\\bigl", "\\bigr", "\\Bigl", "\\Bigr", "\\bigg", "\\Bigg"), ""),
    "\\%": "%", "\\$": "$", "\\#": "#", "\\&": "&", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lvert": "|",
    "\\rvert": "|", "\\vert": "|", "\\leq": "\\le", "\\geq": "\\ge", "\\neq": "\\ne", "\\lt": "<", "\\gt": ">",
    "\\to": "\\rightarrow", "\\varphi": "\\phi", "\\varepsilon": "\\epsilon",
}  # fmt: skip
_WRAPPERS = frozenset(
    (
        "\\text", "\\textbf", "\\textit", "\\textrm", "\\textsf", "\\texttt", "\\mathrm", "\\mathbf", "\\mathit",
        "\\mathsf", "\\mbox", "\\emph", "\\operatorname",
    )
)  # fmt: skip
_MATHS = frozenset("^_=+*<>")

_MATRIX = re.compile(r"\\(begin|end)\s*\{[bp]matrix\}")
_NO_DELIMITER = re.compile(r"\\(?:left|right)\s*\.")
_LONE_GREEK = re.compile(f"(?<![\u0370-\u03ff])[{''.join(_GREEK)}](?![\u0370-\u03ff])")
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\s+|.", re.DOTALL)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_POWER = re.compile(r"[+-]?[0-9]+")
_SEPARATED = re.compile(rf"(?<![0-9.,{_THIN}])[0-9]{{1,3}}(?:{_THIN}[0-9]{{3}})+(?![0-9{_THIN}])")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_KEPT_SPACE = re.compile(r"(?<=[0-9]) +(?=\.?[0-9])")
_BRACKET = re.compile(r"(\\[{}]|[()\[\]])")
_STRUCTURE = re.compile(r"\\[{}]|[()\[\]{},]")
_OPTION = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[):]?")
_PERCENT, _DEGREES = re.compile(r"(?<=[0-9])percent\Z"), re.compile(r"(?<=[0-9])degrees?\Z")

_PLAIN = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_DECIMAL = re.compile(rf"({_PLAIN})(?:[eE]([+-]?[0-9]{{1,3}})|(?:\\times|\\cdot|\*)10\^([+-]?[0-9]{{1,3}}))?")
_RATIO = re.compile(rf"\\frac\{{([+-]?(?:{_PLAIN}))\}}\{{([+-]?(?:{_PLAIN}))\}}|({_PLAIN})/([+-]?(?:{_PLAIN}))")
_MIXED = re.compile(r"([0-9]{1,9})\\frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}")
_UNIT = r"[A-Za-z]+(?:\^-?[0-9]+)?"
_MEASURED = re.compile(rf"(.*[0-9}}])((?:\^\\circ ?)?{_UNIT}(?:(?:/|\*|\\cdot ?){_UNIT})*)", re.DOTALL)
_WORDED = re.compile(rf"[A-Za-z]{{{WORD}}}")
_NAMED = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)=([^=]+)")


@dataclass(frozen=True)
class Number:
    """A number as it is written.

    Attributes:
        value: Its value; 50% is 0.5.
        unit: Value of the last place that is written; None for a fraction, which is exact.
        percent: Whether it is a percentage.
    """

    value: Fraction
    unit: Fraction | None
    percent: bool = False


def same_answer(given: str, reference: str) -> bool:
    r"""Whether two normalised answers are the same (ours).

    As text; as numbers; as numbers of the same unit (½ cup, 0.5 cup); as lists in the same brackets, item by item, in
    any order between `\{` and `\}`. "x=5" and "5" are the same, "x=5" and "y=5" are not. A number is the same if it is
    equal; if neither is an integer, it may be off by half a unit of the reference's last place (of a fraction: by less
    than a unit of the given number's), and by 1e-6 of the reference at most. Where the reference is a percentage, its
    number without the sign is right too.

    Args:
        given: Answer from `normalise_answer`.
        reference: Reference from `normalise_answer`.
    """
    if given == reference:
        return True
    names = _NAMED.fullmatch(given), _NAMED.fullmatch(reference)
    if (names[0] is None) != (names[1] is None):
        given = given if names[0] is None else names[0].group(1)
        reference = reference if names[1] is None else names[1].group(1)
    ours, theirs = _items(given), _items(reference)
    if ours[:2] != theirs[:2] or len(ours[2]) != len(theirs[2]):
        return False
    return all(_same_item(mine, wanted) for mine, wanted in zip(ours[2], theirs[2], strict=True))


def _same_item(given: str, reference: str) -> bool:
    if given == reference:
        return True
    mine, wanted = read_number(given), read_number(reference)
    if mine is None and wanted is None:
        (mine, ours), (wanted, theirs) = _read_measure(given), _read_measure(reference)
        if ours != theirs:
            return False
    if mine is None or wanted is None:
        return False
    if wanted.percent and not mine.percent:
        unsigned = Number(100 * wanted.value, None if wanted.unit is None else 100 * wanted.unit)
        return _close(mine, wanted) or _close(mine, unsigned)
    return _close(mine, wanted)


def _close(given: Number, reference: Number) -> bool:
    if given.value == reference.value:
        return True
    exact = given.unit is None and reference.unit is None
    if exact or 1 in (given.value.denominator, reference.value.denominator):
        return False
    written = given.unit if reference.unit is None else reference.unit / 2
    assert written is not None  # not both are exact
    return abs(given.value - reference.value) <= min(written, RELATIVE_TOLERANCE * abs(reference.value))


def read_number(text: str) -> Number | None:
    r"""The number that a normalised answer is, or None.

    Integers, decimals, exponents (1e-3, `3\times10^8`), fractions (a/b, `\frac{a}{b}`), mixed numbers
    (`1\frac{1}{2}`), percentages; a degree sign behind and a dollar sign in front change nothing.
    """
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    body = (text[1:] if text.startswith(("-", "+")) else text).removeprefix("$").removesuffix("^\\circ")
    percent = body.endswith("%")
    body = body.removesuffix("%")
    unit = None
    if found := _DECIMAL.fullmatch(body):
        scale = Fraction(10) ** int(found.group(2) or found.group(3) or 0)
        value = Fraction(found.group(1)) * scale
        unit = scale / 10 ** len(found.group(1).partition(".")[2])
    elif found := _RATIO.fullmatch(body):
        top, bottom = (Fraction(part) for part in found.groups() if part is not None)
        if not bottom:
            return None
        value = top / bottom
    elif found := _MIXED.fullmatch(body):
        whole, top, bottom = map(int, found.groups())
        if top >= bottom:
            return None
        value = whole + Fraction(top, bottom)
    else:
        return None
    scale = Fraction(1, 100 if percent else 1)
    value = (-value if text.startswith("-") else value) * scale
    return Number(value, None if unit is None else unit * scale, percent)


def _read_measure(text: str) -> tuple[Number | None, str]:
    """A number and the unit or symbol that it is so many of, if the text is that; 1/2x may be x/2 or 1/(2x), and is
    none."""
    found = _MEASURED.fullmatch(text) if len(text) <= 2 * MAX_NUMBER_LENGTH else None
    if found is None or ("/" in found.group(1) and not _WORDED.match(found.group(2))):
        return None, ""
    return read_number(found.group(1)), found.group(2)


def _items(text: str) -> tuple[str, str, list[str]]:
    """Brackets around a list and its items; of a text that is no list, none and the text itself."""
    places: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    depth, closed_at = 0, -1
    for sign in _STRUCTURE.finditer(text):
        kind = sign.group()
        if kind == ",":
            if depth in places:
                places[depth].append(sign.span())
        elif kind in ("(", "[", "{", "\\{"):
            depth += 1
        else:
            depth = max(0, depth - 1)
            closed_at = sign.end() if closed_at < 0 and depth == 0 else closed_at
    opening = "\\{" if text.startswith("\\{") else text[:1] if text[:1] in ("(", "[") else ""
    if not opening or closed_at != len(text) or not places[1]:
        return "", "", _cut(text, places[0], 0, len(text))
    closing = "\\}" if text.endswith("\\}") else text[-1:]
    items = _cut(text, places[1], len(opening), len(text) - len(closing))
    if (opening, closing) == ("\\{", "\\}"):
        items.sort(key=_order)
    return opening, closing, items


def _cut(text: str, commas: Sequence[tuple[int, int]], start: int, end: int) -> list[str]:
    starts, ends = [start, *(after for _, after in commas)], [*(before for before, _ in commas), end]
    return [text[first:last] for first, last in zip(starts, ends, strict=True)]


def _order(item: str) -> tuple[bool, Fraction, str]:
    number = read_number(item)
    return number is None, Fraction(0) if number is None else number.value, item


def normalise_answer(answer: str) -> str:
    r"""An answer in one spelling, in which two can be compared as text (ours).

    One spelling have Unicode and LaTeX signs, `\dfrac`, `\left(`, `x^{2}`, `\frac12`, `90^{\circ}`, `\text{…}` and its
    kin, math delimiters, spacing, `\$`, trailing periods. White space is kept between two digits only ("1 2" is a list
    and not 12). A comma in "1,234" separates thousands and goes; one before white space or in brackets separates the
    items of a list and stays. Words lose their case; symbols and units keep it (Co, CO, mW, MW). An answer of one
    letter, such as (A), A. or A), is an option: a.

    Args:
        answer: Content of a box, or a reference answer; any text is fine.

    Returns:
        Normalised text, possibly empty.
    """
    text = _LONE_GREEK.sub(lambda sign: f"\\{_GREEK[sign.group()]} ", answer.translate(_SIGNS))
    text = _NO_DELIMITER.sub("", _MATRIX.sub(r"\\\1{matrix}", text))
    text = _without_case(*_in_one_form(_respelled(text)))
    text = _SEPARATED.sub(lambda number: number.group().replace(_THIN, ""), text).replace(_THIN, _SPACE)
    text = _KEPT_SPACE.sub("\0", _without_thousands(text)).replace(_SPACE, "").replace("\0", " ").replace("\1", " ")
    text = _DEGREES.sub(r"^\\circ", _PERCENT.sub("%", text.lstrip("$").rstrip("$.")))
    option = _OPTION.fullmatch(text)
    return (option.group(1) or option.group(2)).lower() if option else text


def _respelled(text: str) -> list[str]:
    """Commands, characters and white space of a text, each in one spelling; white space that meets is one token."""
    out: list[str] = []
    found: list[str] = _TOKEN.findall(text)
    for given in found:
        token = _SPELLINGS.get(given, given)
        token = _SPACE if token != _THIN and token.isspace() else token
        if token in (_SPACE, _THIN) and out and out[-1] in (_SPACE, _THIN):
            out[-1] = _SPACE
        elif token:
            out.append(token)
    return out


def _in_one_form(tokens: list[str]) -> tuple[list[str], list[bool]]:
    r"""Tokens with braces only where they mean something, and which of them stand in a `\text{…}`."""
    partner = _partners(tokens)
    last, dropped, settled = len(tokens), set(), set()
    worded = [0] * (last + 1)

    def following(place: int) -> int:
        place += 1
        return place + 1 if place < last and tokens[place] in (_SPACE, _THIN) else place

    def argument(place: int) -> int:
        """Brace the argument that stands after a place; where it ends."""
        place = following(place)
        if place in partner:
            settled.update((place, partner[place]))
            return partner[place]
        if place < last and tokens[place] != "}":
            tokens[place] = f"{{{tokens[place]}}}"
        return place

    before = ""
    for place, token in enumerate(tokens):
        first = following(place)
        if token in _WRAPPERS:
            dropped.add(place)
            if first in partner:
                dropped.update((first, partner[first]))
                settled.update((first, partner[first]))
                worded[first] += 1
                worded[partner[first]] -= 1
            continue
        if token == "\\frac":
            argument(argument(place))
        elif token == "\\sqrt" and (first == last or tokens[first] != "["):
            argument(place)
        elif token in ("^", "_") and first in partner:
            settled.update((first, partner[first]))
            if _needs_no_braces(tokens, first, partner[first]):
                dropped.update((first, partner[first]))
        elif token == "{" and place in partner and place not in settled:
            if _COMMAND.fullmatch(before) or before == "}":
                settled.update((place, partner[place]))
            else:
                dropped.update((place, partner[place]))
        if token not in (_SPACE, _THIN) and place not in dropped:
            before = token
    deep, inside = 0, []
    for change in worded[:last]:
        deep += change
        inside.append(deep > 0)
    kept = [place for place in range(last) if place not in dropped]
    return [tokens[place] for place in kept], [inside[place] for place in kept]


def _partners(tokens: Sequence[str]) -> dict[int, int]:
    """Place of the closing brace for each opening one that has one."""
    opened, partner = [], {}
    for place, token in enumerate(tokens):
        if token == "{":
            opened.append(place)
        elif token == "}" and opened:
            partner[opened.pop()] = place
    return partner


def _needs_no_braces(tokens: Sequence[str], first: int, last: int) -> bool:
    """Whether a power or an index means the same without its braces: a single sign, or a whole number."""
    if last - first > MAX_NUMBER_LENGTH:
        return False
    inner = [token for token in tokens[first + 1 : last] if token not in (_SPACE, _THIN)]
    single = len(inner) == 1 or _POWER.fullmatch("".join(inner)) is not None
    return single and not (inner[-1] in _DIGIT and last + 1 < len(tokens) and tokens[last + 1] in _DIGIT)


def _without_case(tokens: Sequence[str], worded: Sequence[bool]) -> str:
    """The text of tokens, its words in lower case; a space that must stay after a command is marked."""
    runs: list[list[int]] = []
    for place, token in enumerate(tokens):
        if len(token) == 1 and token.isalpha():
            joined = runs and runs[-1][-1] == place - 1 and worded[place - 1] == worded[place]
            runs[-1].append(place) if joined else runs.append([place])
    maths = any((t in _MATHS or _COMMAND.fullmatch(t)) and not w for t, w in zip(tokens, worded, strict=True))
    words = not maths and any(len(run) >= WORD for run in runs) and not any(t in _DIGIT for t in tokens)
    out = list(tokens)
    for run in runs:
        word = "".join(tokens[place] for place in run)
        known = len(word) >= WORD or word.lower() in SHORT_WORDS
        plain = word.islower() or word.isupper() or word.istitle()
        if plain and (words or (known and (worded[run[0]] or not maths))):
            for place in run:
                out[place] = tokens[place].lower()
    for place, token in enumerate(tokens):
        after = place + 2 if place + 1 < len(tokens) and tokens[place + 1] in (_SPACE, _THIN) else place + 1
        if _COMMAND.fullmatch(token) and after < len(tokens) and tokens[after][0].isalpha():
            out[place] += "\1"
    return "".join(out)


def _without_thousands(text: str) -> str:
    """Commas that separate thousands are taken out, except in brackets, where they separate items."""
    parts, depth = _BRACKET.split(text), 0
    for place, part in enumerate(parts):
        if place % 2:
            depth = depth + 1 if part in ("(", "[", "\\{") else max(0, depth - 1)
        elif depth == 0:
            parts[place] = _THOUSANDS.sub(lambda number: number.group().replace(",", ""), part)
    return "".join(parts)
