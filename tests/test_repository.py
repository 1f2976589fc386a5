"""What is committed: notebooks without outputs and without code that belongs in the package, and no private names."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from committed import committed
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EVERY_NOTEBOOK_TAKES = {"preset", "seed", "overrides"}
TRAINS_NOTHING = "00_idea.ipynb"
"""Takes a seed alone: it has no run to set up."""

# Each expression is written so that it does not match itself.
PRIVATE = {
    "a path of one machine": re.compile(r"(?<![\w.~-])/(?:w[o]rk|r[o]ot|h[o]me|[o]pt|U[s]ers)/"),
    "a package registry's host": re.compile(
        r"p[y]pi\.org|pyth[o]nhosted\.org|npm[j]s\.(?:org|com)|deb[i]an\.org|downl[o]ad\.pytorch\.org|"
        r"c[o]nda\.anaconda\.org|--extra-index[-]url|--find[-]links",
        re.IGNORECASE,
    ),
}


def private_names(text: str) -> list[str]:
    """What in `text` would tell where it was written, with its line."""
    return [
        f"line {number}: {kind}: {line.strip()[:120]}"
        for number, line in enumerate(text.splitlines(), 1)
        for kind, pattern in PRIVATE.items()
        if pattern.search(line)
    ]


def code_of(cell: nbformat.NotebookNode) -> ast.Module:
    """The syntax tree of a code cell, its magics turned into calls."""
    return ast.parse(TransformerManager().transform_cell(cell.source))


def definitions(tree: ast.Module) -> list[str]:
    """Names of the classes and functions that a tree defines; a lambda has none."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [node.name for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook_path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(notebook_path) -> nbformat.NotebookNode:
    return nbformat.read(notebook_path, as_version=4)


def test_the_notebooks_folder_holds_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no .ipynb"


def test_notebook_is_valid_and_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    executed = [
        index
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None)
    ]
    assert executed == [], "these cells carry outputs or execution counts: run nbstripout"


def test_notebook_carries_no_trace_of_a_papermill_run(notebook):
    cells = [index for index, cell in enumerate(notebook.cells) if "papermill" in cell.metadata]
    assert "papermill" not in notebook.metadata and cells == []


def test_notebook_names_the_python3_kernel(notebook):
    # papermill and jupyter start no kernel for a notebook that names none.
    assert notebook.metadata.get("kernelspec", {}).get("name") == "python3"


def test_notebook_has_one_annotated_parameters_cell(notebook, notebook_path):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    statements = code_of(cell).body
    # papermill shows a parameter's type and help only where the assignment is annotated.
    assert [ast.unparse(node) for node in statements if not isinstance(node, ast.AnnAssign)] == []
    needed = {"seed"} if notebook_path.name == TRAINS_NOTHING else EVERY_NOTEBOOK_TAKES
    assert {ast.unparse(node.target) for node in statements} >= needed


def test_notebook_defines_no_class_and_no_function(notebook):
    found = [name for cell in notebook.cells if cell.cell_type == "code" for name in definitions(code_of(cell))]
    assert found == [], "move these into npo_core"


def test_a_definition_in_a_cell_is_seen():
    cell = nbformat.v4.new_code_cell(
        "%matplotlib inline\nif True:\n    def train(): ...\nclass A: ...\nf = lambda x: x"
    )
    assert sorted(definitions(code_of(cell))) == ["A", "train"]


def test_no_committed_file_tells_where_it_was_written():
    found = []
    for path in committed(ROOT):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a binary file: a picture, weights
        found += [f"{path.relative_to(ROOT)}, {complaint}" for complaint in private_names(text)]
    assert found == []


def test_an_unpacked_archive_has_the_files_of_the_checkout(tmp_path):
    """Without git's folder the tests above look at the same files."""
    for name in (".gitignore", "README.md", "tests/committed.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for ignored in ("data/runs/run/config.json", ".venv/lib.py", "tests/__pycache__/committed.pyc"):
        (tmp_path / ignored).parent.mkdir(parents=True)
        (tmp_path / ignored).write_text("not committed")
    found = {str(path.relative_to(tmp_path)) for path in committed(tmp_path)}
    assert found == {".gitignore", "README.md", "tests/committed.py"}
    assert {ROOT / name for name in found} <= set(committed(ROOT))


@pytest.mark.parametrize("folder", ["work", "root", "home", "opt", "Users"])
def test_a_machine_path_is_seen(folder):
    assert private_names(f'path = "/{folder}/someone"')
    assert private_names(f"see /{folder}/someone")


@pytest.mark.parametrize("host", ["pypi" + ".org", "files.pythonhosted" + ".org", "registry.npmjs" + ".org"])
def test_a_registry_host_is_seen(host):
    assert private_names(f"get it from {host}/simple")


@pytest.mark.parametrize(
    "text", ["data/w" + "ork/x", "frame/r" + "oot/", "~/opt/x", "a/home/b", "the python package index"]
)
def test_an_ordinary_text_is_not_mistaken(text):
    assert private_names(text) == []
