"""The GPU check: order, time and what is written of parts that end, fail, hang or never begin; tiny parts themselves.

The parts' own code runs with a random Llama in the place where SmolLM2 is kept once it is converted, so that nothing is
fetched; the tokenizer is trained on the task, as the right responses must fit into a preset's length.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from foreign import TURNS, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from npo_core.__main__ import main
from npo_core.control.scheduled import planned_interventions
from npo_core.runs.config import resolve_config
from npo_core.stages import clocks, gpu_check, gpu_parts
from npo_core.stages.gpu_check import DONE, FAILED, PARTS, RUNNING, SKIPPED, STOPPED, Part, check, table
from npo_core.world import letters, smollm
from npo_core.world.policies import save_policy

ROOT = Path(__file__).parents[2]

WRITES = """
import json, pathlib, sys, time
def write(*rows):
    path = pathlib.Path({path!r})
    path.with_suffix(".new").write_text(json.dumps({{"rows": list(rows), "series": {{}}}}))
    path.with_suffix(".new").rename(path)
"""
ROW = {"name": "found", "value": 1.0, "unit": "s"}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("NPO_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def scripts(**code):
    """Commands of parts that are scripts, which call `write` with rows."""

    def command(name, work, seconds, small):
        return [sys.executable, "-c", WRITES.format(path=str(work / f"{name}.json")) + code[name]]

    return command


def states(result):
    return {part["part"]: part["state"] for part in result["parts"]}


def test_a_part_that_fails_is_written_down_with_its_error_and_the_others_go_on(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("NPO_REVISION", "abc-dirty")
    parts = [Part("one", "", 0.3), Part("two", "", 0.3, ("one",)), Part("three", "", 0.4)]
    failing = f"write({ROW})\nraise ValueError('the card is on fire')"
    out = tmp_path / "deep" / "result.json"
    result = check(parts, 60, out, True, scripts(one=failing, two="1/0", three=f"write({ROW}, {ROW})"))
    assert result == json.loads(out.read_text())
    assert states(result) == {"one": FAILED, "two": SKIPPED, "three": DONE}
    one, two, three = result["parts"]
    assert one["rows"] == [ROW], "what it had found by then stays"
    assert one["error"].splitlines()[-1] == "ValueError: the card is on fire"
    assert (two["error"], two["seconds"]) == ("it needs what one makes", 0.0)
    assert three["rows"] == [ROW, ROW] and three["error"] is None
    assert result["rehearsal"] is True and result["gpu"] is None and result["environment"]["device"] == "cpu"
    assert result["environment"]["git_revision"] == "abc-dirty", "of the parcels, which have no checkout"
    shown = table(result)
    assert "failed: ValueError: the card is on fire" in shown and "not run: it needs what one makes" in shown
    assert shown.count("found") == 3


def test_a_part_that_is_killed_says_so(runs, tmp_path):
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    result = check([Part("one", "", 1.0)], 60, tmp_path / "result.json", True, scripts(one=killed))
    assert result["parts"][0]["error"] == "it ended with status -9 and said nothing"


def test_a_part_that_hangs_is_ended_with_all_that_it_started_and_keeps_its_rows(runs, tmp_path):
    hangs = (
        f"write({ROW})\nimport subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\ntime.sleep(600)"
    )
    parts = [Part("one", "", 0.25), Part("two", "", 0.75)]
    begin = time.monotonic()
    result = check(parts, 16, tmp_path / "result.json", True, scripts(one=hangs, two=f"write({ROW})"))
    assert time.monotonic() - begin < 16
    assert states(result) == {"one": STOPPED, "two": DONE}
    assert result["parts"][0]["rows"] == [ROW] and 4 <= result["parts"][0]["seconds"] < 8
    assert "ended after 4 s" in result["parts"][0]["error"]
    child = int((tmp_path / "child").read_text())
    # one that is dead stays in the table until its new parent looks
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_check_that_is_asked_to_end_ends_what_it_has_started(tmp_path):
    """As by `timeout`, or by a batch system: the GPU is free afterwards, and the result says what ran."""
    out, environment = tmp_path / "result.json", {**os.environ, "NPO_RUNS": str(tmp_path)}
    command = [sys.executable, "-m", "npo_core", "gpu-check", "--rehearse", "--parts", "memory", "--out", str(out)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as whole:
        end = time.monotonic() + 120
        # what it asks about the machine are children too, before there is a result
        while not (out.exists() and (children := psutil.Process(whole.pid).children())):
            assert time.monotonic() < end and whole.poll() is None
            time.sleep(0.1)
        whole.terminate()
    assert whole.returncode == 128 + 15
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert gone and not alive
    assert states(json.loads(out.read_text())) == {"memory": RUNNING}


def test_another_check_beside_the_same_runs_is_waited_for(runs, tmp_path):
    runs.mkdir()
    (runs / "gpu-check").mkdir()
    (runs / "gpu-check" / "of the other").touch()
    holds = (
        "import sys, time, pathlib\nfrom npo_core.lock import Lock\nroot = pathlib.Path(sys.argv[1])\n"
        "with Lock(root / 'gpu-check.lock.json', 'The other').holding():\n"
        "    print('held', flush=True); time.sleep(2)\n"
        "    (root / 'kept').write_text(str((root / 'gpu-check' / 'of the other').exists()))"
    )
    command = [sys.executable, "-c", holds, str(runs)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        result = check([Part("one", "", 1.0)], 60, tmp_path / "result.json", True, scripts(one="pass"))
    assert (runs / "kept").read_text() == "True" and states(result) == {"one": DONE}
    assert not (runs / "gpu-check" / "of the other").exists()
    assert not (runs / "gpu-check.lock.json").exists()


def test_each_part_has_its_share_and_what_those_before_it_have_left(runs, tmp_path):
    parts = [Part("one", "", 0.5), Part("two", "", 0.1), Part("three", "", 0.4)]
    quick = dict.fromkeys(("one", "two", "three"), "pass")
    result = check(parts, 100, tmp_path / "result.json", True, scripts(**quick))
    limits = [part["limit"] for part in result["parts"]]
    assert limits[0] == pytest.approx(50, abs=1), "what the others need is theirs"
    assert 50 < limits[1] < 60 and 80 < limits[2] < 100


def test_a_part_for_which_no_time_is_left_is_not_begun(runs, tmp_path):
    parts = [Part("one", "", 1.0), Part("two", "", 0.0), Part("three", "", 0.0)]
    code = {"one": "time.sleep(600)", "two": "write()", "three": "write()"}
    result = check(parts, 4, tmp_path / "result.json", True, scripts(**code))
    assert states(result) == {"one": STOPPED, "two": SKIPPED, "three": SKIPPED}
    assert [part["error"] for part in result["parts"][1:]] == ["no time was left"] * 2


def test_the_result_on_disk_has_what_a_part_has_found_while_it_still_runs(runs, tmp_path):
    """As a visit that is cut off from outside leaves it."""
    out, gate = tmp_path / "result.json", tmp_path / "gate"
    waits = f"write({ROW})\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.05)"
    seen = []

    def look(name, work, seconds, small):
        code = f"""
import json, pathlib, time
end = time.monotonic() + 30
while time.monotonic() < end:
    found = json.loads(pathlib.Path({str(out)!r}).read_text())
    if found["parts"] and found["parts"][0]["rows"]: break
    time.sleep(0.05)
pathlib.Path({str(tmp_path / "seen")!r}).write_text(json.dumps(found)); pathlib.Path({str(gate)!r}).touch()
"""
        seen.append(subprocess.Popen([sys.executable, "-c", code]))
        return scripts(one=waits)(name, work, seconds, small)

    result = check([Part("one", "", 1.0)], 60, out, True, look)
    seen[0].wait()
    assert states(result) == {"one": DONE}
    running = json.loads((tmp_path / "seen").read_text())
    assert running["parts"][0]["rows"] == [ROW] and running["parts"][0]["state"] == RUNNING


def test_the_parts_are_those_that_there_is_code_for_and_fit_into_the_time():
    assert [part.name for part in PARTS] == list(gpu_parts.MEASURES)
    assert sum(part.share for part in PARTS) == pytest.approx(1)
    before = set()
    for part in PARTS:
        assert set(part.needs) <= before
        before.add(part.name)
    assert 60 * gpu_check.MINUTES["gpu"] * PARTS[-1].share > gpu_parts.STARTING + gpu_parts.ENDING


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--minutes", "0"], "--minutes is 0"),
        (["--python", "3.12"], "give --pack"),
        (["--pack", "somewhere", "--python", "3"], "--python is '3'"),
        (["--pack", "somewhere", "--parcel-mib", "0"], "--parcel-mib is 0"),
    ],
)
def test_bad_input_is_one_line(arguments, complaint, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["gpu-check", *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [8, 9, 30, 61, 200])
def test_a_run_of_any_length_has_its_intervention_within_its_steps(count):
    config = resolve_config("npo", "real", 0, {**gpu_parts.LARGE, **gpu_parts.schedule(count)})
    (stage,) = planned_interventions(config)
    assert (stage.at, stage.back_to, stage.guide_until) == (count // 4, 0, count // 4)
    assert stage.at + stage.guide_until <= config.compute_steps
    assert stage.at % config.checkpoint_every == 0


def test_as_many_steps_as_fit_beside_each_other():
    overhead = gpu_parts.STARTING + gpu_parts.ENDING
    assert gpu_parts.steps_that_fit(overhead + 50 * gpu_parts.SHARING * 2.0, 2.0) == 50
    assert gpu_parts.steps_that_fit(1.0, 2.0) == 8


def test_a_gpu_is_asked_to_be_done_before_its_clock_is_read(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "synchronize", asked.append)
    clocks.work_clock("cuda:0")()
    clocks.wall_clock("cuda:0")()
    assert asked == [torch.device("cuda:0")] * 2
    assert (clocks.work_unit("cuda:0"), clocks.work_unit("cpu")) == ("s", "CPU s")
    assert clocks.work_clock("cpu") is time.process_time and clocks.wall_clock("cpu") is time.perf_counter


def test_a_report_is_on_disk_at_once_and_in_strict_json(tmp_path):
    report = gpu_parts.Report(tmp_path / "part.json")
    report.add("one", 1.5, "s")
    assert json.loads(report.path.read_text())["rows"] == [{"name": "one", "value": 1.5, "unit": "s"}]
    report.add("none", float("nan"), "s")
    report.add("one", 2.5, "s")
    report.curve("line", [1, 2])
    found = json.loads(report.path.read_text())
    values = [(row["name"], row["value"]) for row in found["rows"]]
    assert values == [("one", 2.5), ("none", None)], "a number that is measured again takes its own place"
    assert found["series"] == {"line": [1, 2]}
    shown = table({"rehearsal": True, "seconds": 1.0, "parts": [{"part": "p", "state": DONE, "error": None, **found}]})
    assert re.search(r"one +2.5  s", shown) and re.search(r"none +not finite  s", shown)


# The parts themselves


def _letters_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes merged as the task's texts ask for, so that a right response is about as long as in SmolLM2's tokens."""
    words = letters.sample_words("train", 200, 7)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(
        [text for word in words for text in (word.question, word.answer, letters.SYSTEM)], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[2], pad_token=special[0], padding_side="right"
    )
    tokenizer.chat_template = TURNS
    return tokenizer


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """A folder of runs in which a random Llama stands where SmolLM2 is once it is converted."""
    root = tmp_path_factory.mktemp("runs")
    folder = root / "base" / f"smollm2-135m-instruct-{smollm.WHEEL_SHA256[:8]}-{smollm.FORMAT}"
    tokenizer = _letters_tokenizer()
    model = tiny_model("Llama", tokenizer, initializer_range=0.02)
    save_policy(model, tokenizer, folder)
    return root


def do(part, root, monkeypatch) -> dict[str, float]:
    """Rows of a part at its small size, done in this process."""
    monkeypatch.setenv("NPO_RUNS", str(root))
    work = root / "gpu-check"
    work.mkdir(exist_ok=True)
    gpu_parts.main([part, str(work), "600", "--small"])
    found = json.loads((work / f"{part}.json").read_text())
    rows = {row["name"]: row["value"] for row in found["rows"]}
    assert len(rows) == len(found["rows"]), "a name twice"
    return rows


def test_the_model_is_started_on_its_task_and_says_how_far(tiny_runs, monkeypatch):
    rows = do("model", tiny_runs, monkeypatch)
    assert rows["steps of it"] == 2 and 0 < rows["mean probability of the right response after it"] < 1e-3


def test_a_cache_costs_what_its_rollouts_cost(tiny_runs, monkeypatch):
    rows = do("cache", tiny_runs, monkeypatch)
    config = resolve_config("grpo", gpu_parts.SMALL_PRESET, 0, gpu_parts.SMALL)
    assert rows["rollouts that were sampled for it"] == config.prompts_per_step * config.cache_rollouts
    seconds = rows[f"guidance cache for the {config.prompts_per_step} prompts of 1 step(s)"]
    step = seconds / rows["the same, in GRPO steps"]
    each = seconds / rows["rollouts that were sampled for it"]
    relative = rows["a rollout for the cache / a rollout of a GRPO step"]
    assert relative == pytest.approx(each / (step / config.rollouts_per_step))


def test_a_roll_back_is_measured_up_to_the_first_step_after_it(tiny_runs, monkeypatch):
    rows = do("rollback", tiny_runs, monkeypatch)
    assert 0 < rows["a roll-back: new trainer, checkpoint, up to the first step"] < 60
    assert rows["the same, in GRPO steps"] > 0 and rows["checkpoint that can be resumed from"] > 0


def test_weights_in_16_bits_lose_what_weights_in_32_keep(tiny_runs, monkeypatch):
    """A step of 1e-5 is below the rounding of most weights in bfloat16; that is what the share is there to show."""
    rows = do("precision", tiny_runs, monkeypatch)
    share = {name: rows[f"{name}: weights that 4 steps change"] for name in ("32 bits", "weights in bfloat16")}
    assert share["32 bits"] > 0.3 > share["weights in bfloat16"]
    assert 0 < rows["log-probability of a token, bfloat16 against 32 bits, mean difference"] < 0.1


@pytest.mark.slow
def test_steps_are_measured_in_turns(tiny_runs, monkeypatch):
    assert do("steps", tiny_runs, monkeypatch)["SmolLM2, NPO / GRPO step"] > 0


@pytest.mark.slow
def test_each_figure_of_speed_is_one(tiny_runs, monkeypatch):
    rows = do("speed", tiny_runs, monkeypatch)
    assert len(rows) > 3 and all(value > 0 for value in rows.values())


@pytest.mark.slow
def test_the_small_world_is_trained_rolled_back_and_measured(tiny_runs, monkeypatch):
    rows = do("paths", tiny_runs, monkeypatch)
    assert rows["roll-backs of it"] == 1 and 0 <= rows["its pass rate in evaluation"] <= 1
    assert rows["pairs of policies measured"] > 0
    assert abs(rows["KL of the policy to a second sample of its own, 0 but for rounding"]) < 1e-5


@pytest.mark.slow
def test_a_rehearsal_from_end_to_end(tiny_runs, tmp_path, monkeypatch, capsys):
    """Each part in its process: the first, what is measured from outside, and the one that starts runs.

    The others are done above, at the same size: their processes would import for longer than they measure.
    """
    monkeypatch.setenv("NPO_RUNS", str(tiny_runs))
    out = tmp_path / "result.json"
    names = ["model", "memory", "training"]
    status = main(["gpu-check", "--rehearse", "--minutes", "60", "--parts", *names, "--out", str(out)])
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert states(result) == dict.fromkeys(names, DONE), shown
    assert status == 0 and "REHEARSAL on the CPU" in shown and "no figure of a GPU" in shown
    found = {part["part"]: {row["name"]: row["value"] for row in part["rows"]} for part in result["parts"]}
    assert found["training"]["NPO: steps done, of 6"] == found["training"]["GRPO: steps done, of 6"] == 6
    assert found["memory"]["all weights, in bfloat16: training, by the plan"] > 0
    assert not [name for name in found["memory"] if "plan / peak" in name], "resident memory is no GPU memory"
    assert {Path(path).name for path in tiny_runs.glob("gpu-check/runs/*")}, "runs stay where they can be looked at"
    assert sum(path.stat().st_size for path in tiny_runs.rglob("*") if path.is_file()) < 2**28
