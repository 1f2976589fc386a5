"""What a person sees in a notebook: bars that stay in the file, one sentence for a stop, parameters checked."""

import json
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from npo_core import progress as bars
from npo_core.declaration import COUNT, WHOLE
from npo_core.notebook import check_parameters
from npo_core.progress import bar_data, duration, tell

PARAMETERS = """preset: str = "cpu"  # Preset
seed: int = 0
rate: float = 0.5
overrides: dict = {}
arms: list = ["GRPO"]
compare: bool = True
results: str = \"\""""
VALUES = {"preset": "cpu", "seed": 0, "rate": 1, "overrides": {}, "arms": ["GRPO"], "compare": True, "results": ""}
INJECTED = "# Parameters\n{}\n"


def check(injected="", rules=None, **values):
    cells = ["", PARAMETERS, *([INJECTED.format(injected)] if injected else []), "%matplotlib inline\nimport x"]
    check_parameters(cells, {**VALUES, **values}, **(rules or {}))


def test_parameters_that_a_notebook_has_are_taken():
    check('seed = 3\npreset = "smoke"', seed=3, preset="smoke")
    check(rules={"arms": ["GRPO", "NPO"], "seed": WHOLE, "results": Path}, arms=["NPO", "GRPO"])
    check(seed=np.int64(3), rate=np.float32(0.5), arms=("NPO",), rules={"seed": WHOLE})
    check(rules={"results": Path}, results=str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "Unknown parameter 'sead'; did you mean 'seed'", {"injected": "sead = 3"}),
        (TypeError, "parameter seed is '3'; it must be of type int", {"seed": "3"}),
        (TypeError, "parameter seed is True; it must be of type int", {"seed": True}),
        (TypeError, "parameter rate is '1e-4'; it must be of type float", {"rate": "1e-4"}),
        (TypeError, "parameter arms is 'GRPO'; it must be of type list", {"arms": "GRPO"}),
        (ValueError, "arms is 'GRPPO'; did you mean 'GRPO'? Allowed: GRPO, NPO",
         {"arms": ["GRPPO"], "rules": {"arms": ["GRPO", "NPO"]}}),
        (ValueError, "seed is 0; it must be at least 1", {"rules": {"seed": COUNT}}),
        (ValueError, "arms is -1; it must be at least 0", {"arms": [0, -1], "rules": {"arms": WHOLE}}),
        (TypeError, "arms holds 'x'; it must hold numbers", {"arms": ["x"], "rules": {"arms": WHOLE}}),
        (ValueError, "preset is 'CPU'; did you mean 'cpu'?", {"preset": "CPU", "rules": {"preset": ["gpu", "cpu"]}}),
        (ValueError, "rate is nan; it must be a finite number", {"rate": float("nan")}),
        (TypeError, "seed is None; it must be of type int", {"seed": None}),
        (FileNotFoundError, "results is '/no/such'", {"results": "/no/such", "rules": {"results": Path}}),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_refused_with_what_is_allowed(error, message, arguments):
    with pytest.raises(error) as caught:
        check(**arguments)
    assert message in str(caught.value)


def test_a_notebook_whose_parameters_were_not_run_says_so():
    with pytest.raises(ValueError, match="run the notebook's first code cell"):
        check_parameters(["x = 1"], {})


def test_a_bar_is_html_that_needs_nothing_else_and_text():
    data = bar_data("GRPO <b>", 0.25, "100 of 400, reward 0.41")
    assert data["text/plain"] == "GRPO <b>: 100 of 400, reward 0.41"
    assert "GRPO &lt;b&gt;" in data["text/html"] and "width:25.0%" in data["text/html"]
    assert "<script" not in data["text/html"] and "class=" not in data["text/html"]


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (600, "10 min"), (7200, "2.0 h")])
def test_times_are_in_words(seconds, words):
    assert duration(seconds) == words


def test_in_a_terminal_a_loaded_run_is_a_line(capsys):
    tell("GRPO", "loaded, 400 steps in 12 min")
    assert capsys.readouterr().out == "GRPO: loaded, 400 steps in 12 min\n"
    assert bars.notebook_shell() is None


BARS = """
from npo_core.progress import progress, tell
with progress(4, "GRPO") as bar:
    for step in range(4):
        bar.advance(1, reward="0.41")
with progress(4, "evaluation", stays=False) as passing:
    passing.advance(4)
tell("NPO", "loaded, 400 steps in 12 min")
"""

FEWER = """
with progress(4, "study, 2 runs") as bar:
    bar.advance(3)
    bar.say("NPO, seed 0, failed: exit status 1")
"""

STOPPED = """
with progress(4, "NPO") as bar:
    bar.advance(1)
    raise RuntimeError("no")
"""


def test_a_notebook_that_ran_keeps_the_last_state_of_its_bars():
    """By the client that papermill uses: one display a bar, no widget."""
    cells = [nbformat.v4.new_code_cell(text) for text in (BARS, FEWER, STOPPED)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, allow_errors=True, kernel_name="python3").execute()
    outputs = [output["data"] for cell in notebook.cells for output in cell.outputs if "data" in output]
    texts = [data["text/plain"] for data in outputs]
    assert texts[0] == "GRPO: 4 of 4, reward 0.41, done, 0 s"
    assert texts[1] == "", "a bar that does not stay has made room"
    assert texts[2] == "NPO: loaded, 400 steps in 12 min"
    assert texts[3] == "study, 2 runs: 3 of 4, ended, 0 s", "not all of it was done"
    assert texts[4] == "NPO: 1 of 4, stopped, 0 s" and "width:25.0%" in outputs[4]["text/html"]
    assert "widget" not in json.dumps(outputs)


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def traceback_of(client, code, allow_stdin):
    """Lines of the traceback that a cell shows."""
    found = []

    def hook(message):
        if message["msg_type"] == "error":
            found.extend(message["content"]["traceback"])

    client.execute_interactive(code, allow_stdin=allow_stdin, output_hook=hook, timeout=120)
    return found


REFUSAL = """
from npo_core.notebook import in_one_sentence
from npo_core.runs.config import resolve_config
with in_one_sentence():
    resolve_config("grpo", "smoke", 0, {"tau_gat": 0.5})
"""


def test_a_refusal_is_one_sentence_for_a_person_and_whole_for_papermill(kernel):
    _, client = kernel
    (sentence,) = traceback_of(client, REFUSAL, allow_stdin=True)
    assert "tau_gat" in sentence and "did you mean 'tau_gate'" in sentence and "\n" not in sentence
    whole = "\n".join(traceback_of(client, REFUSAL, allow_stdin=False))
    assert "Traceback" in whole and "did you mean 'tau_gate'" in whole


def test_what_went_wrong_elsewhere_keeps_its_traceback(kernel):
    _, client = kernel
    code = "from npo_core.notebook import in_one_sentence\nwith in_one_sentence():\n    int('x')"
    whole = "\n".join(traceback_of(client, code, allow_stdin=True))
    assert "Traceback" in whole and "invalid literal" in whole


STOP = """
import time
from npo_core.notebook import in_one_sentence
print("training", flush=True)
with in_one_sentence("NPO", lambda: "step 13 of 400"):
    time.sleep(60)
"""


@pytest.mark.parametrize("person", [True, False])
def test_a_stop_says_how_far_it_came_and_how_to_go_on(kernel, person):
    manager, client = kernel

    def interrupt():
        time.sleep(2)
        manager.interrupt_kernel()

    thread = threading.Thread(target=interrupt)
    thread.start()
    shown = traceback_of(client, STOP, allow_stdin=person)
    thread.join()
    if person:
        assert shown == ["NPO: stopped at step 13 of 400; run this cell again to go on."]
    else:
        assert "KeyboardInterrupt" in "\n".join(shown) and len(shown) > 1
