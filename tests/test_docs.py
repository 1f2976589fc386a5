"""The docs and what they promise: links that lead somewhere, settings with their values, messages that the code has.

`make docs` checks the site itself, strictly; nothing here needs its packages.
"""

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import yaml

import npo_core
from npo_core.__main__ import _config, _parser
from npo_core.runs.config import resolve_config
from npo_core.runs.settings import Method

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
METHODS = {path.stem: path for path in (DOCS / "methods").glob("*.md") if path.stem != "README"}
NAMED_OTHERWISE = {"explore": "explore.notebook.show"}
"""Public names that are documented where their work is done."""


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """Links of a page to places in this repository that are not there."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        place, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", place):
            continue
        there = (page.parent / place).resolve() if place else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert broken(page, page.read_text()) == []


@pytest.mark.parametrize("target", ["nowhere.md", "../docs/nowhere.md", "metrics.md#nowhere", "#nowhere"])
def test_a_broken_link_is_seen(target):
    assert broken(DOCS / "README.md", f"see [this]({target}) and [that](metrics.md#events)") == [target]


def pages_of(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages_of(part)]


def test_the_site_has_every_page_once():
    listed = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_every_notebook_has_a_line_on_its_page():
    text = (DOCS / "notebooks.md").read_text()
    linked = re.findall(r"^\| \[(\w+)\]\(\.\./notebooks/(\w+)\.ipynb\)", text, re.MULTILINE)
    assert [target for _, target in linked] == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert all(name == target for name, target in linked)


def test_every_public_name_has_an_api_entry():
    shown = re.findall(
        r"^::: npo_core\.(\S+)", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.MULTILINE
    )
    homes = {name: NAMED_OTHERWISE.get(name, f"{home}.{name}") for name, home in npo_core._HOMES.items()}
    assert set(homes.values()) <= set(shown)
    assert len(shown) == len(set(shown))


def test_every_module_of_the_method_is_shown():
    text = (DOCS / "api" / "method.md").read_text()
    modules = {path.stem for path in (ROOT / "npo_core" / "method").glob("[a-z]*.py")}
    assert set(re.findall(r"^::: npo_core\.method\.(\w+)$", text, re.MULTILINE)) == modules


def test_there_is_a_page_for_every_method():
    assert set(METHODS) == set(get_args(Method))


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_a_method_have_the_values_that_its_page_says(method):
    config = resolve_config(method, "cpu")
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", METHODS[method].read_text(), re.MULTILINE)
    assert len(rows) >= 4
    assert {name: json.loads(value) for name, value in rows} == {name: getattr(config, name) for name, _ in rows}


WITH_COMMANDS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *METHODS.values()]
WITH_COMMANDS += [
    DOCS / f"{name}.md" for name in ("README", "gates", "implementation", "metrics", "notebooks", "own_run")
]
WITH_COMMANDS += [DOCS / f"{name}.md" for name in ("scale", "symptoms", "thirty_minutes", "when")]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_of_a_page_is_one_that_the_package_takes(page):
    found = re.findall(r"(?:^|`)(python -m npo_core [^#`\n]+|make [a-z][^#`\n]*)", page.read_text(), re.MULTILINE)
    assert found
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in found:
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets
        else:
            options = _parser().parse_args(words[3:])
            if words[3] in METHODS:
                assert page.stem not in METHODS or page.stem == words[3]
                _config(options, options.name)


@cache
def texts_of_the_code() -> list[str]:
    """Every literal text of the package, those inside of f-strings in their parts."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "npo_core").rglob("*.py"))
    return [
        " ".join(node.value.split())
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_the_messages_among_the_symptoms_are_those_of_the_code():
    quoted = re.findall(r'"([^"|]+)"', without_code((DOCS / "symptoms.md").read_text()))
    pieces = [piece.strip() for quote in quoted for piece in quote.split("…") if len(piece.strip()) > 3]
    assert len(pieces) > 15
    assert [piece for piece in pieces if not any(piece in text for text in texts_of_the_code())] == []


def test_metrics_and_settings_among_the_symptoms_are_there():
    text, known = (DOCS / "symptoms.md").read_text(), (DOCS / "metrics.md").read_text()
    assert [name for name in set(re.findall(r"`(npo/\w+)`", text)) if f"`{name}`" not in known] == []
