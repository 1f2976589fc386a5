"""What breaks in a run folder on disk: what `check` says of it, and that a restart ends where the run ended."""

import errno
import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
from kill_runs import SMALL, compare, outcome

from npo_core import files
from npo_core.__main__ import main
from npo_core.files import write_json
from npo_core.guidance.trajectories import GuidanceCache
from npo_core.lock import Holder
from npo_core.runs.check import check_run
from npo_core.runs.config import resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.stages import run as stages
from npo_core.world.policies import load_policy

CONFIG = resolve_config(
    "autonpo", "smoke", 0, {**SMALL, "checkpoint_keep": 0, "cache_rollouts": 64, "pool_cutoff": 1.0}
)


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPO_RUNS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def whole(root):
    """A finished run with a roll-back."""
    run = stages.run(CONFIG, root, quiet=True)
    assert run.result()["interventions"], "without a roll-back there is no cache that could break"
    return run


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it that may be damaged."""
    folder = tmp_path / whole.path.name
    shutil.copytree(whole.path, folder)
    return folder


def newest(folder):
    """The checkpoint at the end of the last branch."""
    branch = max((folder / "branches").iterdir())
    return max(branch.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def cut(path, left=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])


def test_a_run_that_is_whole(whole, capsys):
    found = check_run(whole.path)
    assert found.whole and found.notes == []
    assert main(["check", str(whole.path)]) == 0
    assert capsys.readouterr().out == f"{whole.path.name}: finished, {CONFIG.compute_steps} steps\n"


def test_no_run_at_all(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_a_run_that_is_not_finished_says_where_it_goes_on(copy):
    (copy / "result.json").unlink()
    shutil.rmtree(newest(copy))
    found = check_run(copy)
    steps = CONFIG.compute_steps
    assert found.whole
    segment = RunFolder(CONFIG, copy.parent).events("segment")[-1]
    place = segment["compute_start"] + int(newest(copy).name.split("-")[1]) - segment["start"]
    going_on = f"goes on from step {place} when it is started again ({steps - place} to be done once more)"
    assert segment["branch"] == 1 and 0 < steps - place < 3
    assert found.state.endswith(f"at step {steps} of {steps}, {going_on}")


def table(run, kind):
    """A table of a run: of its guidance, or of its rollouts."""
    return next((run / kind).glob("*.parquet"))


DAMAGE = {
    "weights": (lambda run: cut(newest(run) / "model.safetensors"), r"model\.safetensors cannot be read"),
    "missing": (lambda run: (newest(run) / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "cache": (lambda run: cut(table(run, "guidance")), r"guidance/\S+ cannot be read .*copy it again"),
    "no cache": (lambda run: table(run, "guidance").unlink(), r"guidance/\S+ is missing"),
    "rollouts": (lambda run: cut(table(run, "rollouts")), r"rollouts/\S+ cannot be read .*delete it"),
    "result": (lambda run: cut(run / "result.json"), r"result\.json: "),
    "middle": (
        lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("\n", "x\n", 1)),
        r"metrics\.jsonl.*line 1 is not JSON",
    ),
    "two": (
        lambda run: (run / "metrics.jsonl").write_text(2 * (run / "metrics.jsonl").read_text()),
        r"compute step 1 comes after 12",
    ),
    "config": (lambda run: cut(run / "config.json"), r"config\.json: "),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_what_to_do(copy, capsys, name):
    harm, words = DAMAGE[name]
    harm(copy)
    assert main(["check", str(copy)]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"damaged: .*{words}", said), said


def test_what_a_restart_mends_is_a_note(copy):
    (copy / "result.json").unlink()
    with (copy / "metrics.jsonl").open("a") as log:
        log.write('{"compute_step": 13, "npo')
    (newest(copy) / "complete.json").unlink()
    (copy / f".config.json.{2**22 + 1}-0a1b2c3d").write_text("{")
    write_json(copy / "lock.json", asdict(replace(Holder.this_process(), process=2**22 + 1)))
    found = check_run(copy)
    assert found.whole
    text = "\n".join(found.notes)
    for words in ("the last line is cut off", "is half written", "1 files that a killed process", "wrote, and is dead"):
        assert words in text


def test_a_folder_under_another_name_is_noted(copy):
    moved = copy.rename(copy.with_name("mine"))
    (note,) = check_run(moved).notes
    assert CONFIG.run_name in note


def test_weights_and_caches_that_were_cut_off_are_refused_by_who_reads_them(whole, copy):
    cut(newest(copy) / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-\d+"):
        load_policy(newest(copy))
    cache = table(copy, "guidance")
    cut(cache)
    with pytest.raises(ValueError, match="is not a parquet file"):
        GuidanceCache.load(cache)
    rollouts = table(copy, "rollouts")
    cut(rollouts)
    with pytest.raises(ValueError, match=r"is damaged .*Delete it and start again"):
        files.read_table(rollouts)


# A restart ends where the run ended


def unfinished(copy, back=0):
    """The copy as a kill would have left it: no result, and as many checkpoints fewer."""
    (copy / "result.json").unlink()
    for _ in range(back):
        shutil.rmtree(newest(copy))


def again(copy, root):
    """Start it again; what differs from the whole run."""
    stages.run(CONFIG, copy.parent, quiet=True)
    reference = {name: value for name, value in outcome(root).items() if name.startswith(copy.name)}
    assert len(reference) > 2
    return compare(reference, outcome(copy.parent))


@pytest.mark.parametrize("part", ["optimizer.pt", "model.safetensors", "complete.json"])
def test_a_checkpoint_that_is_half_copied_is_passed_over(copy, root, part):
    unfinished(copy)
    (newest(copy) / part).unlink() if part == "complete.json" else cut(newest(copy) / part)
    with (copy / "metrics.jsonl").open("a") as log:
        log.write('{"compute_step": 13, "npo')
    assert again(copy, root) == []


def test_a_disk_that_is_full_loses_nothing(copy, root, monkeypatch):
    """It fills up while a step is logged; part of the line is written, as a file system does."""
    unfinished(copy, back=1)
    real, room = files.json.dumps, [1]

    def full(record, **options):
        text = real(record, **options)
        if isinstance(record, dict) and "npo/reward" in record and not options.get("indent"):
            room[0] -= 1
            if room[0] < 0:
                with (copy / "metrics.jsonl").open("a") as log:
                    log.write(text[:40])
                raise OSError(errno.ENOSPC, "No space left on device")
        return text

    with monkeypatch.context() as patch:
        patch.setattr(files.json, "dumps", full)
        with pytest.raises(OSError, match="No space left"):
            again(copy, root)
    assert RunFolder(CONFIG, copy.parent).result() is None
    assert not (copy / "lock.json").exists()
    assert check_run(copy).whole
    assert again(copy, root) == []


def test_a_full_disk_is_said_with_the_file_and_what_to_do(tmp_path):
    def write(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.json"
    write_json(path, 1)
    with pytest.raises(OSError, match=r"make room and start again, what is on disk is kept: '.*x\.json'") as caught:
        files.write_whole(path, write)
    assert caught.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == 1 and [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_clock_that_is_set_back_changes_nothing(copy, root, monkeypatch):
    unfinished(copy, back=1)
    past = [1e9]

    def clock():
        past[0] -= 3600
        return past[0]

    monkeypatch.setattr("npo_core.runs.folder.time.time", clock)
    assert again(copy, root) == []
    assert check_run(copy).whole


def test_a_finished_run_in_a_folder_that_cannot_be_written_is_loaded(copy, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "touch", "write_text"):
        monkeypatch.setattr(f"pathlib.Path.{name}", refused)
    assert stages.run(CONFIG, copy.parent, quiet=True).result()["status"] == "finished"
    (copy / "result.json").rename(copy / "other.json")
    with pytest.raises(OSError, match=r"cannot be written \(Read-only file system\).*NPO_RUNS"):
        RunFolder(CONFIG, copy.parent)
