"""The first cells of every notebook, all in one process without a kernel: an unknown parameter is refused there."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FIRST_CELLS = """
import json, sys
import nbformat
from IPython.core.interactiveshell import InteractiveShell

class Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        pass  # there is no window

refused = {}
for path in sys.argv[1:]:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    (tagged,) = [index for index, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    shell = Shell()
    injected = "# Parameters\\nsead = 1"  # as papermill does it, in a cell after the tagged one
    for source in [*(cell.source for cell in cells[: tagged + 1]), injected]:
        shell.run_cell(source, store_history=True).raise_error()
    refused[path] = str(shell.run_cell(cells[tagged + 1].source, store_history=True).error_in_exec)
print(json.dumps(refused))
"""


def test_every_notebook_refuses_an_unknown_parameter_before_anything_runs():
    paths = [str(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    done = subprocess.run([sys.executable, "-c", FIRST_CELLS, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused = json.loads(done.stdout.splitlines()[-1])
    assert list(refused) == paths
    for path, message in refused.items():
        assert "Unknown parameter 'sead'" in message and "'seed'" in message, path


def test_06_takes_two_seeds_on_smoke_and_ten_elsewhere():
    """As its own second cell plans them, where nobody names a number."""
    cells = [cell.source for cell in nbformat.read(NOTEBOOKS / "06_benchmarks.ipynb", as_version=4).cells
             if cell.cell_type == "code"]  # fmt: skip
    planned = cells[1].partition("folder =")[0]
    assert "plan_cells" in planned
    code = "\n".join(line for line in planned.splitlines() if not line.startswith("%"))
    for preset, count in (("smoke", 2), ("cpu", 10)):
        names = {}
        parameters = cells[0].replace('preset: str = "cpu"', f'preset: str = "{preset}"')
        exec(parameters, names)
        found = names | {"In": [parameters]}
        exec(code, found)
        assert {cell.seed for cell in found["cells"]} == set(range(count))
