"""The lock of a folder: one writer at a time, over processes and machines, whatever their clocks say."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from npo_core import lock as locks
from npo_core.files import write_json
from npo_core.lock import Holder, Lock, Locked
from npo_core.runs.config import resolve_config
from npo_core.runs.folder import RunFolder

HOLD = """
import sys
from pathlib import Path
from npo_core.lock import Lock
with Lock(Path(sys.argv[1]), "It").holding():
    print("held", flush=True)
    sys.stdin.readline()
"""

COUNT = """
import sys, time
from pathlib import Path
from npo_core import lock as locks
from npo_core.lock import Lock
locks.LOOK = 0.01
counter = Path(sys.argv[2])
for _ in range(15):
    with Lock(Path(sys.argv[1]), "It").holding():
        before = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(before + 1))
"""

CONFIG = resolve_config("grpo", "smoke", 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(locks, "LOOK", 0.02)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock.json"


@pytest.fixture
def other(path):
    """Another process that holds the lock; a line on its input makes it give it back."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(path, **about):
    """A lock of a process on another machine."""
    holder = replace(Holder.this_process(), host="far", system="another", process=1, **about)
    write_json(path, asdict(holder))
    return holder


def test_the_second_process_waits_for_the_first_and_says_for_whom(path, other, capsys):
    lock, looks = Lock(path, "The run"), []

    def look():
        looks.append(lock.holder())
        if len(looks) == 3:
            other.stdin.write("\n")
            other.stdin.flush()

    lock.acquire(look)
    assert lock.held and lock.holder().process == os.getpid()
    assert len(looks) >= 3 and {holder.process for holder in looks[:3]} == {other.pid}
    said = capsys.readouterr().out
    assert said.count("waiting for it") == 1, "said once"
    assert f"The run is being written by process {other.pid} on {os.uname().nodename}, since " in said
    lock.release()
    assert not path.exists() and not lock.held


@pytest.mark.parametrize("asked_for", [True, False])
def test_a_killed_process_holds_nothing_even_while_its_parent_has_not_asked_for_it(path, other, asked_for):
    other.send_signal(signal.SIGKILL)
    if asked_for:
        other.wait()
    else:
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    assert path.exists()
    started = time.monotonic()
    with Lock(path, "It").holding():
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert time.monotonic() - started < 5


def test_a_number_that_was_given_to_another_process_is_not_taken_for_the_holder(path):
    write_json(path, asdict(replace(Holder.this_process(), process=os.getppid(), started="1")))
    with Lock(path, "It").holding():
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_a_clock_that_was_set_does_not_make_a_living_holder_dead(path, other):
    """When a process began is read in ticks since boot, and the file's date is only ever compared with itself."""
    for date in (0, 2**32):
        os.utime(path, (date, date))
        lock, looks = Lock(path, "It"), []

        def look(lock=lock, looks=looks):
            looks.append(lock.holder().process)
            if len(looks) == 3:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            lock.acquire(look)
        assert looks == [other.pid] * 3 and lock.holder().process == other.pid


@pytest.mark.parametrize("date", [0, None, 2**32])
def test_a_machine_that_gives_signs_of_life_is_honoured_whatever_its_clock_says(path, monkeypatch, date):
    monkeypatch.setattr(locks, "SILENCE", 1.0)
    holder = elsewhere(path)
    os.utime(path, None if date is None else (date, date))
    lock, looks = Lock(path, "The run"), []

    def look():
        looks.append(1)
        if len(looks) == 3:
            os.utime(path, (7.0, 7.0))  # a sign of life, of a machine with another clock

    with pytest.raises(Locked, match=r"The run is being written by process 1 on far.*stop it there.*is taken over"):
        lock.acquire(look)
    assert lock.holder() == holder and not lock.held


@pytest.mark.parametrize("date", [0, None, 2**32])
def test_a_machine_that_is_silent_is_taken_for_dead(path, monkeypatch, date):
    monkeypatch.setattr(locks, "SILENCE", 0.5)
    elsewhere(path)
    os.utime(path, None if date is None else (date, date))
    started = time.monotonic()
    with Lock(path, "It").holding():
        assert 0.5 <= time.monotonic() - started < 5


def test_a_container_with_the_same_host_name_is_another_machine(path, monkeypatch):
    """Its process numbers mean nothing here: that nobody has one does not say that it is dead."""
    mine = Holder.this_process()
    assert mine.here and os.readlink("/proc/self/ns/pid") in mine.system
    inside = replace(mine, system=mine.system.replace("pid:[", "pid:[1"), process=2**22 + 1)
    assert not inside.here
    write_json(path, asdict(inside))
    with pytest.raises(Locked, match="one process at a time"):
        Lock(path, "It").require()


def test_the_holder_gives_signs_of_life_until_it_lets_go(path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    lock = Lock(path, "It")
    with lock.holding():
        os.utime(path, (0, 0))
        until = time.monotonic() + 5
        while not path.stat().st_mtime and time.monotonic() < until:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0
        beating = [thread for thread in threading.enumerate() if "_beat" in thread.name]
        assert len(beating) == 1
    beating[0].join(5)
    assert not beating[0].is_alive() and not path.exists()


@pytest.mark.parametrize("text", ["", '{"host": "far"', "[]"])
def test_a_lock_that_was_cut_off_by_a_kill_is_taken_over_after_a_while(path, monkeypatch, text):
    monkeypatch.setattr(locks, "SILENCE", 0.3)
    path.write_text(text)
    with pytest.raises(Locked, match="has not said who it is"):
        Lock(path, "It").require()
    with Lock(path, "It").holding():
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_the_same_process_does_not_wait_for_itself(path):
    with Lock(path, "The run").holding():
        with pytest.raises(Locked, match="The run is being written by this very process"):
            Lock(path, "The run").acquire()
        assert path.exists(), "the one that holds it still does"


def test_taking_a_lock_that_was_interrupted_leaves_none(path, monkeypatch):
    lock = Lock(path, "It")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_wait", lambda mine, look: (lock._create(mine), stopped()))
        with pytest.raises(KeyboardInterrupt):
            lock.acquire()
    assert not path.exists()
    # even if the clearing away was interrupted too, a process knows what it holds
    write_json(path, asdict(Holder.this_process()))
    with lock.holding():
        pass


def test_who_lost_the_lock_writes_nothing_more(tmp_path):
    run = RunFolder(CONFIG, tmp_path)
    with run.writing():
        run.append_metrics({"compute_step": 1})
        thief = elsewhere(run.path / "lock.json")
        for write in (
            lambda: run.append_metrics({"compute_step": 2}),
            lambda: run.event("warning", compute_step=2),
            lambda: run.finish({}),
            lambda: run.drop_metrics_after(0),
        ):
            with pytest.raises(Locked, match="was taken from this process by process 1 on far"):
                write()
    assert run.metrics() == [{"compute_step": 1}] and run.events() == [] and run.result() is None
    assert Lock(run.path / "lock.json", "").holder() == thief, "the other's lock stays"


def test_nobody_writes_into_a_run_that_another_process_holds(tmp_path, other, path):
    run = RunFolder(CONFIG, tmp_path)
    path.rename(run.path / "lock.json")
    with pytest.raises(Locked, match=f"process {other.pid}"):
        run.append_metrics({"compute_step": 1})
    assert run.metrics() == []


def test_a_run_that_is_being_written_may_be_asked_for_again(tmp_path):
    run = RunFolder(CONFIG, tmp_path)
    with run.writing(), run.writing():
        run.event("segment", compute_step=0)
    assert not (run.path / "lock.json").exists()


def test_a_sitting_removes_what_a_killed_process_had_begun(tmp_path):
    run = RunFolder(CONFIG, tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = run.path / "rollouts" / f".step-00001.parquet.{dead.pid}-0a1b2c3d"
    left.write_text("half")
    others = run.path / f".config.json.{os.getppid()}-0a1b2c3d"
    others.write_text("a process that lives")
    (run.path / ".note").write_text("a person's")
    with run.writing():
        assert not left.exists()
    assert others.exists() and (run.path / ".note").exists()


def test_many_processes_that_want_one_lock_have_it_one_after_the_other(tmp_path, path):
    """Each adds one to a number, which loses counts as soon as two do it at a time; the first lock is a dead one's."""
    counter = tmp_path / "count"
    counter.write_text("0")
    write_json(path, asdict(replace(Holder.this_process(), process=os.getppid(), started="1")))
    command = [sys.executable, "-c", COUNT, str(path), str(counter)]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait(timeout=3600) for process in running] == [0] * 4
    assert counter.read_text() == "60"
    assert not path.exists()


def test_lines_out_of_order_are_refused(tmp_path):
    run = RunFolder(CONFIG, tmp_path)
    for step in (1, 2, 4, 3):
        run.append_metrics({"compute_step": step})
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 4: compute step 3 comes after 4\. Two processes"):
        run.metrics()
    run.metrics_path.write_text('{"compute_step": 1}\n{"compute_step": 1}\n')
    with pytest.raises(ValueError, match=r"line 2: compute step 1 comes after 1"):
        run.metrics()


def test_two_commands_on_one_run_make_one_run(tmp_path):
    """As a notebook and a command would: the second waits, then has what the first made."""
    code = "import sys; from npo_core.__main__ import main; sys.exit(main(sys.argv[1:]))"
    settings = ["--set", "compute_steps=4", "--set", "warmstart_steps=5", "--seed", "3"]
    command = [sys.executable, "-c", code, "grpo", "--preset", "smoke", "--root", str(tmp_path), *settings]
    environment = {**os.environ, "NPO_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=3600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = tmp_path.glob("grpo-smoke-s3-*")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["compute_step"] for line in lines] == [1, 2, 3, 4]
    sittings = [line for line in (folder / "events.jsonl").read_text().splitlines() if '"sitting"' in line]
    assert len(sittings) == 1, "one of them trained"
    assert sorted(text.count("waiting for it") for text in said) in ([0, 1], [0, 2], [1, 1])  # base policy and run
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1], "both print the same scores"
    assert not list(tmp_path.rglob("*lock.json"))
