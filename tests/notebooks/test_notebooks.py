"""The notebooks, run by papermill at the smallest size."""

import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from foreign import byte_llama
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

from npo_core.runs.config import resolve_config
from npo_core.stages import book
from npo_core.stages import run as stages
from npo_core.study.arms import ablation_configs
from npo_core.study.cells import plan_cells, run_cell
from npo_core.study.families import needed_arms
from npo_core.study.results import has_evidence
from npo_core.world import smollm

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
pytestmark = pytest.mark.slow

QUICK = {"cache_rollouts": 4, "rollout_every": 0}
"""Settings of the studies of 05 and 06, which share their runs."""

EMPTY = "get_ipython().reset()\nimport gc\ngc.collect()\ngc.freeze()\ndel gc"
"""Forget a notebook; modules stay, and no search for garbage goes through them."""

LEFT = "GRPO, best rate"
"""The arm that 06 runs itself, in a process as `study` starts them; it shares no beginning with another arm."""


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPO_RUNS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def kernel(runs):
    """One for all notebooks but the book's, which start their own: it imports for longer than most of them run."""
    manager = AsyncKernelManager(kernel_name="python3")
    run_sync(manager.start_kernel)(extra_arguments=["--HistoryManager.hist_file=:memory:"])
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.fixture(scope="module")
def execute(kernel):
    """Executes a notebook in the kernel, in which nothing is left of the one before."""

    def executed(name, folder, **parameters):
        target = folder / f"{name}.ipynb"
        NotebookClient(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(EMPTY)]), km=kernel).execute()
        papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb", target, parameters=parameters, progress_bar=False, km=kernel
        )
        return nbformat.read(target, as_version=4)

    return executed


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """Folder and chapters of a book of 01 and 03, which make their runs: GRPO's in 01, AutoNPO's in 03."""
    folder = tmp_path_factory.mktemp("book")
    return folder, book.make_book(folder, "smoke", 0, ["01_grpo", "03_autonpo"], quiet=True)


@pytest.fixture(scope="module")
def made(runs, written):
    """When the last line of each of the book's runs was written."""
    return {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}


@pytest.fixture(scope="module")
def story(execute, made, tmp_path_factory):
    """03_autonpo, executed on the runs of the book."""
    return execute("03_autonpo", tmp_path_factory.mktemp("story"), preset="smoke")


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def told(notebook):
    """The sentence under the notebook's last heading, which is computed from its runs."""
    (place,) = [place for place, cell in enumerate(notebook.cells) if cell.source.startswith("## What came out")]
    outputs = [output for cell in notebook.cells[place:] for output in cell.get("outputs", [])]
    return " ".join(output["data"]["text/markdown"] for output in outputs)


def html_of(notebook):
    return [
        output.get("data", {}).get("text/html", "") for cell in notebook.cells for output in cell.get("outputs", [])
    ]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_03_autonpo_tells_the_whole_story(runs, story):
    (folder,) = runs.glob("autonpo-smoke-s0-*")
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["compute_steps"] == 20
    (intervention,) = result["interventions"]
    assert len(intervention["candidates"]) >= 2
    for candidate in intervention["candidates"]:
        assert 0 <= candidate["quality"] <= 1
        assert candidate["variance"] >= 1
        assert candidate["signal"] == pytest.approx(candidate["quality"] / candidate["variance"])
    for name in ("training", "signal", "group", "suites"):
        for ending in ("png", "svg"):
            assert (folder / "figures" / f"{name}.{ending}").stat().st_size > 1000
    assert pictures(story) == 4
    assert sum("<iframe srcdoc=" in text for text in html_of(story)) == 1
    assert (folder / "explorer.html").is_file()
    where = f"at step {intervention['policy_step']} back by {intervention['distance']}"
    assert f"AutoNPO intervened once, {where}" in told(story) and "less GRPO's" in told(story)
    (grpo,) = runs.glob("grpo-smoke-s0-*")
    assert json.loads((grpo / "result.json").read_text())["compute_steps"] == result["compute_steps"]


def test_a_finished_run_is_loaded_not_run_again(made, story):
    assert sorted(path.parent.name.split("-")[0] for path in made) == ["autonpo", "grpo"]
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_01_grpo_shows_the_base_policy_and_the_plateau(runs, written):
    folder, (first, _) = written
    (run,) = runs.glob("grpo-smoke-s0-*")
    assert json.loads((run / "result.json").read_text())["interventions"] == []
    assert not (run / "process.log").exists(), "01 makes it itself"
    page = (folder / "01_grpo.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 and "handwritten_loop" in page
    assert not first.failed and first.ending.startswith("In 20 steps GRPO took the on-policy pass rate from")


def test_the_book_carries_the_explorer_and_the_sentences(written):
    folder, (_, third) = written
    assert not third.failed and third.ending.startswith("AutoNPO intervened once, at step")
    assert "Test pass rate after 20 executed steps, less GRPO's" in third.ending
    page = (folder / "03_autonpo.html").read_text()
    assert page.count('title="Explorer of a run"') == page.count('srcdoc="&lt;!doctype html') == 1
    assert re.findall(r"(?:src|href)=[\"'](?:https?:)?//", page) == [], "it would load something from elsewhere"


def test_02_npo_runs_all_four_arms(execute, runs, written, tmp_path):
    stages.run(resolve_config("npo", "smoke", 0, {"late_step": 0}), quiet=True)  # it would import for longer than train
    notebook = execute("02_npo", tmp_path, preset="smoke")
    arms = {folder.name.split("-")[0]: folder for folder in runs.glob("*-smoke-s0-*")}
    assert {"grpo", "npo"} <= set(arms)
    planned = [
        [entry["stage"] for entry in json.loads((folder / "result.json").read_text())["interventions"]]
        for folder in runs.glob("npo-smoke-s0-*")
    ]
    assert sorted(planned) == [["early"], ["early", "late"], ["late"]]
    assert pictures(notebook) == 2
    final = {path.parent.name: json.loads(path.read_text())["final"]["average"] for path in runs.glob("*/result.json")}
    (grpo,) = [score for name, score in final.items() if name.startswith("grpo-smoke-s0-")]
    assert f"less GRPO's {grpo:.3f}: NPO early " in told(notebook) and "; NPO early+late " in told(notebook)


def test_04_signal_measures_and_draws_the_signal(execute, runs, written, tmp_path):
    small = {"distances": 3, "prompts": 16, "gradients": 4}
    notebook = execute("04_signal", tmp_path, preset="smoke", origins=[0, 6], **small)
    (folder,) = runs.glob("grpo-smoke-s0-*/signal-*")
    found = json.loads((folder / "signal.json").read_text())
    assert set(found["origins"]) == {"0", "6"} and found["c"]["token_kl"].keys() == {
        *("gradient_current", "gradient_exact", "gradient_sequence")
    }
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("signal", "signal_1", "plane", "proxies") for kind in ("png", "svg")
    }
    assert pictures(notebook) == 4
    assert told(notebook).startswith("From policy step 0: ") and "From policy step 6: " in told(notebook)


@pytest.fixture(scope="module")
def cells(runs):
    """The study of 06, all arms but `LEFT` made here: a process for each would import for longer than it trains."""
    planned = plan_cells("smoke", [0], needed_arms(), QUICK)
    for cell in planned:
        if cell.arm != LEFT:
            run_cell(cell.config)
    return planned


@pytest.fixture(scope="module")
def benchmarks(execute, cells, tmp_path_factory):
    """The executed 06_benchmarks: a study of one seed."""
    return execute("06_benchmarks", tmp_path_factory.mktemp("benchmarks"), preset="smoke", seeds=1, overrides=QUICK)


def test_06_benchmarks_runs_a_study_and_draws_both_tables(runs, cells, benchmarks):
    assert [cell.arm for cell in cells if (cell.folder(None).path / "process.log").exists()] == [LEFT]
    about = json.loads((runs / "study-smoke" / "evidence.json").read_text())
    assert about["seeds"] == [0] and about["failed"] == [] and set(about["arms"]) == set(needed_arms())
    assert pictures(benchmarks) == 3
    text = "".join(
        str(output.get("data", {}).get("text/markdown", ""))
        for cell in benchmarks.cells
        for output in cell.get("outputs", [])
    )
    assert text.count("too few seeds") >= 5 and "the results hold no signal.json" in text
    assert "`make map` makes it" in printed(benchmarks)
    assert "rows of the table of verdicts over 1 seed: " in told(benchmarks)


def test_05_baselines_trains_the_arms_and_ablates(execute, runs, benchmarks, tmp_path):
    configs = ablation_configs("ratio", "smoke", 0, QUICK)
    run_cell(configs["ratio_mode = truncated"])  # the arms have two more, and the notebook makes the last one
    notebook = execute("05_baselines", tmp_path, preset="smoke", overrides=QUICK)
    methods = {json.loads(path.read_text())["method"] for path in runs.glob("*-smoke-s0-*/result.json")}
    assert {"grpo", "luffy", "exgrpo", "rlep", "npo", "autonpo"} <= methods
    modes = {json.loads(path.read_text())["ratio_mode"] for path in runs.glob("npo-smoke-s0-*/config.json")}
    assert modes == {"current", "exact", "truncated", "shaped"}
    assert pictures(notebook) == (4 if has_evidence() else 2)
    assert ("No study over seeds is committed for this world yet" in printed(notebook)) != has_evidence()
    assert "in brackets less GRPO's: " in told(notebook)


def test_an_unknown_parameter_is_refused(execute, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r"Unknown parameter 'sead'.*did you mean 'seed'"):
        execute("01_grpo", tmp_path, preset="smoke", sead=1)


def test_an_unknown_setting_is_refused(execute, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r"Unknown setting 'tau'"):
        execute("03_autonpo", tmp_path, preset="smoke", overrides={"tau": 0.5})


def test_00_idea_says_what_its_text_promises(execute, tmp_path):
    notebook = execute("00_idea", tmp_path)
    text = printed(notebook)
    assert len(notebook.cells) == 15 and pictures(notebook) == 1
    assert "last one replaced -0.35" in text and "2.47" in text
    assert "distance 20: signal" in text and "an edge of the range" not in text
    assert "def train_table" in text
    rates = dict(re.findall(r"(GRPO, 40 steps|the same 40 steps, guided) +0.\d+ -> (0.\d+)", text))
    assert float(rates["the same 40 steps, guided"]) > float(rates["GRPO, 40 steps"])


def test_07_real_model_runs_on_any_text_policy(execute, runs, tmp_path):
    """With a policy of one layer, which lies where SmolLM2 is once it is fetched: precisions are measured on it."""
    policy = byte_llama(runs / "base" / f"smollm2-135m-instruct-{smollm.WHEEL_SHA256[:8]}-{smollm.FORMAT}")
    small = {
        "policy": str(policy),
        "data": "letters:2-3",
        "warmstart_pass_rate": 0.0,
        "max_completion_length": 6,
        "train_problems": 60,
    }
    notebook = execute("07_real_model", tmp_path, preset="real-smoke", prompts=4, overrides=small)
    assert pictures(notebook) == 3  # curves on both clocks, over rollouts, and by length; no guide is found
    assert sum("<iframe srcdoc=" in text for text in html_of(notebook)) == 1
    text = printed(notebook)
    assert "From policy step 0:" in text and "trained tokens/s" in text
    for method in ("grpo", "npo"):
        (folder,) = runs.glob(f"{method}-real-smoke-s0-*")
        assert json.loads((folder / "result.json").read_text())["compute_steps"] == 6
