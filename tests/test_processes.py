"""Several processes that are one run: they agree, share work, and end where one process ends."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from launched import free_port, rig_process
from safetensors.torch import load_file

from npo_core.explore.reading import read_run
from npo_core.processes import agree, collect, is_writer, process_count, process_number, shared
from npo_core.runs import shared as shared_run
from npo_core.runs.config import RunConfig, resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.runs.launchers import read_launcher
from npo_core.runs.shared import SharedRunFolder, open_run
from npo_core.stages import run as stages

LAUNCHED = Path(__file__).with_name("launched.py")
SETTINGS = {"micro_batch": 8, "compute_steps": 12, "cache_rollouts": 64}
"""A step of 16 rollouts: two passes of one process, one of each of two; rollouts enough for guides in both."""

WARNS_EVERY = 4
"""Steps between the warnings of its trigger."""

CLOSE = 1e-6
"""Weights of one and of two processes add the same gradients in another order."""


def launched(config: RunConfig, folder: Path) -> RunFolder:
    """A run, done by as many processes as its launcher has."""
    (settings := folder / "config.json").write_text(config.to_json())
    command = ["accelerate.commands.launch", "--config_file", str(read_launcher(config.launcher).file)]
    command += ["--main_process_port", str(free_port()), str(LAUNCHED), str(settings), str(folder), str(WARNS_EVERY)]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCHED.parents[1])},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return RunFolder(config, folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same AutoNPO run by one process, this one, and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    config = resolve_config("autonpo", "smoke", overrides=SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        rig_process(WARNS_EVERY, patch.setattr)
        alone = stages.run(config, one, quiet=True)
    return alone, launched(config.with_changes(launcher="two_cpu"), two)


@pytest.mark.slow
def test_two_processes_take_the_decisions_of_one(both):
    one, two = ([e for e in run.events() if e["event"] != "sitting"] for run in both)
    assert [event["event"] for event in one] == [event["event"] for event in two]
    assert "rollback" in [event["event"] for event in one], "without a roll-back this says nothing"
    for kind in ("segment", "probe", "cache", "rollback"):
        timeless = [[{**e, "time": 0} for e in events if e["event"] == kind] for events in (one, two)]
        assert timeless[0] == timeless[1]
    chosen = [next(e for e in events if e["event"] == "choice") for events in (one, two)]
    assert chosen[0]["chosen"] == chosen[1]["chosen"]
    for first, second in zip(chosen[0]["candidates"], chosen[1]["candidates"], strict=True):
        assert first == pytest.approx(second, abs=CLOSE)


@pytest.mark.slow
def test_metrics_are_those_of_all_processes(both):
    one, two = (run.metrics() for run in both)
    assert len(one) == len(two) == both[0].config.compute_steps
    for first, second in zip(one, two, strict=True):
        assert first["groups"] == second["groups"] and len(first["groups"]) == both[0].config.prompts_per_step
        for name in ("npo/reward", "npo/pass_rate", "npo/all_wrong_groups", "npo/replaced_slots", "npo/gated_groups"):
            assert first[name] == pytest.approx(second[name], abs=1e-9), name
        for name in ("npo/entropy", "grad_norm", "npo/guide_kl"):
            assert first.get(name) == pytest.approx(second.get(name), abs=1e-5), name
    assert any(line["npo/replaced_slots"] for line in one), "no guide was used"


@pytest.mark.slow
def test_weights_are_those_of_one_process(both):
    one, two = ({p.relative_to(run.path): p for p in run.path.glob("branches/*/*/model.safetensors")} for run in both)
    assert one.keys() == two.keys() and len({path.parts[1] for path in one}) == 2
    for place, path in one.items():
        first, second = load_file(path), load_file(two[place])
        for name, weight in first.items():
            assert (weight - second[name]).abs().max() < CLOSE, (place, name)
    base = load_file(next(path for place, path in sorted(one.items()) if "checkpoint-2" in place.parts))
    last = load_file(one[max(one)])
    assert max((base[name] - last[name]).abs().max() for name in base) > 100 * CLOSE, "the policy hardly moved"


@pytest.mark.slow
def test_scores_and_rollout_tables_hold_the_rows_of_all_processes(both):
    import pandas as pd

    one, two = (run.result() for run in both)
    assert one["base"] == two["base"] and one["final"] == two["final"]
    for run in both:
        tables = sorted(run.path.glob("rollouts/*.parquet"))
        rows = pd.read_parquet(tables[0])
        assert sorted(set(rows["group"])) == list(range(run.config.prompts_per_step))
        assert len(rows) == run.config.rollouts_per_step
    names = [sorted(path.name for path in run.path.glob("rollouts/*.parquet")) for run in both]
    assert names[0] == names[1]


@pytest.mark.slow
def test_the_explorer_shows_the_guided_groups_of_all_processes(both):
    """Each process records its own; a reader sees every guided group of a step once, at its place in the step."""
    seen = []
    for run in both:
        page = read_run(run.path)
        names = [record["uid"] for record in page["prompts"]]
        groups = {}
        for step in page["steps"]:
            for group in step["groups"]:
                if any("guide" in slot for slot in group["slots"]):
                    texts = [(slot["t"], slot["ok"], slot.get("guide"), slot.get("lost")) for slot in group["slots"]]
                    place = step["b"], step["s"], step["whole"], group["i"]
                    assert place not in groups, "two groups at one place"
                    groups[place] = names[group["p"]], texts
        lines = {(line["branch"], line["policy_step"]): line for line in run.metrics()}
        recorded = Counter((b, s) for b, s, whole, _ in groups if not whole)
        assert recorded == {at: line["npo/replaced_slots"] for at, line in lines.items() if line["npo/replaced_slots"]}
        seen.append(groups)
    assert seen[0] == seen[1]
    files = {path.name for path in (both[1].path / "guided").glob("b*.jsonl")}
    assert any("-p1" in name for name in files) and any("-p" not in name for name in files)
    half = both[1].config.prompts_per_step // 2
    assert max(place[3] for place in seen[1]) >= half, "each process counts its groups from 0"


@pytest.mark.slow
def test_a_finished_run_of_two_processes_is_not_run_by_one(both):
    with pytest.raises(ValueError, match=r"launcher is 'two_cpu', which is 2 process.*but 1 run"):
        open_run(both[1].config, both[1].path.parent)


def test_one_process_hands_back_what_it_is_given():
    assert (process_count(), process_number(), is_writer()) == (1, 0, True)
    assert agree(lambda: "x") == "x"
    assert collect([1, 2]) == [[1, 2]]
    assert shared(range(5), lambda part: [item * item for item in part]) == [0, 1, 4, 9, 16]
    assert shared([], lambda part: list(part)) == []
    with pytest.raises(ZeroDivisionError):
        agree(lambda: 1 / 0)


def test_adapters_are_not_sharded(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_run, "process_count", lambda: 8)
    config = resolve_config("grpo", "smoke", overrides={"launcher": "one_node", "lora_rank": 4})
    with pytest.raises(ValueError, match=r"'one_node' shards the policy, and lora_rank is 4"):
        open_run(config, tmp_path)


def test_open_run_is_a_plain_folder_for_one_process(tmp_path):
    run = open_run(resolve_config("grpo", "smoke"), tmp_path)
    assert type(run) is RunFolder and not isinstance(run, SharedRunFolder)


def test_what_two_processes_share(tmp_path):
    """Two gloo processes: parts in order, an uneven number of items, an error that reaches both."""
    code = """
import sys
from pathlib import Path
import torch.distributed as dist
from npo_core.explore.reading import read_run
from npo_core.processes import agree, collect, is_writer, process_number, shared
dist.init_process_group("gloo")
me = process_number()
assert collect(me) == [0, 1]
assert agree(lambda: ("told by", me)) == ("told by", 0)
seen = []
def work(part):
    seen.extend(part)
    return [(item, me) for item in part]
assert shared(list(range(5)), work) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]
assert seen == ([0, 1, 2] if me == 0 else [3, 4, 4])
def fails():
    assert is_writer(), "only the writer decides"
    raise KeyError("no such checkpoint")
try:
    agree(fails)
except KeyError as error:
    Path(sys.argv[1], f"refused in {me}").touch()  # lines of two processes may meet on one line of stdout
dist.barrier()
dist.destroy_process_group()
"""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(free_port()),
            "--no-python",
            sys.executable,
            "-c",
            code,
            str(tmp_path),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCHED.parents[1])},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"refused in 0", "refused in 1"}


def test_settings_that_name_the_launcher_name_the_run():
    plain = resolve_config("grpo", "smoke")
    assert plain.with_changes(launcher="two_cpu").run_name != plain.run_name
    assert json.loads(plain.to_json())["launcher"] == ""
