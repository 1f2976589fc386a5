"""What a notebook shows a person in the place of a traceback, and how its parameters are checked.

Only where a person runs the cells: under papermill and in scripts the whole error stays.
"""

import ast
import math
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .declaration import Bounds, nearest
from .progress import notebook_shell

PACKAGE = Path(__file__).resolve().parent

KINDS = {"str": str, "int": Integral, "float": Real, "bool": bool, "list": (list, tuple), "dict": dict}
"""Types that a parameter may be declared with; numpy's numbers are numbers too."""


def person_there() -> bool:
    """Whether a person runs the cells of this notebook: a program that does cannot be asked anything."""
    shell = notebook_shell()
    return shell is not None and bool(shell.kernel.get_parent().get("content", {}).get("allow_stdin"))


@contextmanager
def in_one_sentence(stopped: str | None = None, reached: Any = None) -> Iterator[None]:
    """Show a person one sentence for a refusal of this package, and for a stop; `%tb` still has the whole error.

    A refusal is a ValueError, TypeError or OSError that this package raised itself; what went wrong elsewhere keeps its
    traceback. The exceptions stay what they are.

    Args:
        stopped: What is stopped, such as the name of a run.
        reached: Called for words on how far it came, such as "step 13 of 400".
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if stopped is not None:
            _say(stop, f"{stopped}: stopped at {reached()}; run this cell again to go on.")
        raise
    except (ValueError, TypeError, OSError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).resolve().is_relative_to(PACKAGE):
            _say(error, str(error))
        raise


def _say(error: BaseException, sentence: str) -> None:
    """Have IPython show a sentence for an exception, unless it has one already."""
    if person_there() and "_render_traceback_" not in vars(error):
        error._render_traceback_ = lambda: [sentence]


def check_parameters(cells: Sequence[str], values: Mapping[str, Any], **rules: Any) -> None:
    """Refuse parameters that the notebook does not have (papermill itself only warns), and values of a wrong kind.

    Their names and types are those of the cell that declares them (`seed: int = 0`).

    Args:
        cells: Sources of the cells run so far; in a notebook that is `In`.
        values: Names and values of the notebook; there that is `globals()`.
        rules: What a parameter may be: `Bounds` of a number or of the numbers of a list, names that a text or the texts
            of a list must be among, or `Path` for a place that must be there unless it is empty.

    Raises:
        ValueError: An unknown parameter, or a value out of its bounds; the message has the nearest name.
        TypeError: A value of another type.
    """
    declared = _declared(cells)
    with in_one_sentence():
        for source in cells:
            if source.lstrip().startswith("# Parameters"):
                _refuse_unknown(source, list(declared))
        for name, kind in declared.items():
            value = values[name]
            if not isinstance(value, KINDS[kind]) or (kind in ("int", "float") and isinstance(value, bool)):
                raise TypeError(f"The parameter {name} is {value!r}; it must be of type {kind}.")
            if kind == "float" and not math.isfinite(value):
                raise ValueError(f"The parameter {name} is {value!r}; it must be a finite number.")
            if name in rules:
                for one in value if kind == "list" else [value]:
                    _check(name, one, rules[name])


def _declared(cells: Sequence[str]) -> dict[str, str]:
    """Names and types of the parameters, from the newest cell that holds nothing but annotated assignments."""
    for source in reversed(cells):
        try:
            body = ast.parse(source).body
        except SyntaxError:
            continue  # a cell with a magic command
        if body and all(isinstance(node, ast.AnnAssign) for node in body):
            return {node.target.id: ast.unparse(node.annotation) for node in body}
    raise ValueError("No cell declares parameters (`seed: int = 0`); run the notebook's first code cell.")


def _refuse_unknown(source: str, allowed: Sequence[str]) -> None:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in allowed:
            raise ValueError(f"Unknown parameter {node.id!r}{nearest(node.id, allowed)} Allowed: {list(allowed)}.")


def _check(name: str, value: Any, rule: Bounds | Collection[str] | type[Path]) -> None:
    if rule is Path:
        if value and not Path(value).exists():
            raise FileNotFoundError(f"The parameter {name} is {value!r}, and there is nothing at that place.")
    elif isinstance(rule, Bounds):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"The parameter {name} holds {value!r}; it must hold numbers.")
        if value not in rule:
            raise ValueError(f"The parameter {name} is {value}; it must be {rule}.")
    elif value not in rule:
        allowed = list(rule)
        raise ValueError(
            f"The parameter {name} is {value!r}{nearest(str(value), allowed)} Allowed: {', '.join(allowed)}."
        )
