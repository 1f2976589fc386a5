"""Runs in other processes: side by side, or through accelerate's launcher, followed with a progress bar."""

import sys
from importlib.resources import files
from pathlib import Path

import pytest

from npo_core.runs.config import resolve_config
from npo_core.runs.folder import RunFolder
from npo_core.stages import launch
from npo_core.stages import run as stages


def config(**overrides):
    return resolve_config("grpo", "smoke", overrides={"compute_steps": 2, **overrides})


def test_a_run_without_a_launcher_is_done_here(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "run", lambda *arguments: asked.append(arguments) or "folder")
    assert launch.run_launched(config(), tmp_path, True) == "folder"
    assert asked == [(config(), tmp_path, True, "")]


@pytest.mark.slow
def test_a_run_with_a_launcher_is_started_through_it_and_followed(tmp_path):
    """Two processes of the CPU, for real; the bar here ends where the run does."""
    settings = config(launcher="two_cpu", micro_batch=8)
    folder = launch.run_all({"GRPO": settings}, tmp_path, quiet=True)["GRPO"]
    assert folder.result()["compute_steps"] == 2
    assert len(folder.metrics()) == 2
    again = launch.start(settings, tmp_path)
    assert again.process is None, "a finished run is not run again"
    assert again.follow(quiet=True).result() == folder.result()


def test_the_command_of_several_machines_is_said(tmp_path):
    settings = resolve_config("grpo", "paper", overrides={"launcher": "four_nodes"})
    with pytest.raises(
        ValueError, match=r"spans 4 machines.*--machine_rank RANK --main_process_ip ADDRESS.*config\.json"
    ):
        launch.start(settings, tmp_path)


@pytest.mark.slow
def test_a_run_that_fails_in_its_process_says_why(tmp_path):
    settings = config(compute_steps=3)
    folder = RunFolder(settings, tmp_path)
    (folder.path / "events.jsonl").write_text("not JSON\nnot JSON\n")
    background = launch.start(settings, tmp_path)
    with pytest.raises(RuntimeError, match=r"failed; the end of .*process\.log:\n[\s\S]*line 1 is not JSON"):
        background.follow(quiet=True)


def test_the_command_is_this_python(tmp_path):
    folder = RunFolder(config(), tmp_path)
    assert launch._launch_command(config(), folder) == [sys.executable, "-m", "npo_core"]
    command = launch._launch_command(config(launcher="two_cpu"), folder)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[-4:] == ["--main_process_port", "0", "-m", "npo_core"], "two runs of one machine meet at two ports"
    layout = Path(str(files("npo_core.runs") / "launchers" / "two_cpu.yaml")).read_text()
    (tmp_path / "own.yaml").write_text(f"{layout}main_process_port: 29777\n")
    command = launch._launch_command(config(launcher=str(tmp_path / "own.yaml")), folder)
    assert "--main_process_port" not in command, "the file says which"
