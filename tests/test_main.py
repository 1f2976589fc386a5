"""The command line: one line for a bad setting, all settings listed, and nothing heavy loaded for a help text."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from npo_core.__main__ import main
from npo_core.declaration import declarations
from npo_core.runs.config import RunConfig, resolve_config
from npo_core.stages import cost

ROOT = Path(__file__).parents[1]


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["grpo", "--set", "tau_gat=0.5"], "did you mean 'tau_gate'"),
        (["autonpo", "--set", "tau_gate=2"], "tau_gate is 2.0"),
        (["autonpo", "--set", "learning_rate=fast"], "learning_rate is 'fast' of type str; it must be float"),
        (["grpo", "--set", "compute_steps=1.5"], "compute_steps"),
        (["grpo", "--set", "compute_steps=true"], "compute_steps"),
        (["grpo", "--set", "tau_gate"], "write NAME=VALUE"),
        (["grpo", "--set", "seed=3"], "'seed' has a parameter of its own"),
        (["grpo", "--preset", "smok"], "did you mean 'smoke'"),
        (["plan", "--set", 'suites=["mathvison"]'], "did you mean 'mathvision'"),
        (["run", "--config", "no/such/config.json"], "no/such/config.json"),
    ],
)
def test_a_bad_setting_ends_with_status_2_and_one_line(arguments, complaint, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"npo_core {arguments[0]}: ")
    assert complaint in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_a_command_that_is_stopped_says_so_in_one_line(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cost, "plan", stopped)
    assert main(["plan", "--preset", "smoke"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "npo_core plan: stopped. What is done is kept; the same command goes on.\n")


def test_so_does_the_process():
    done = python("-m", "npo_core", "grpo", "--set", "tau_gat=0.5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "tau_gate" in done.stderr


@pytest.mark.parametrize("content", ["", "[1]", '{"tau_gat": 1}', "not json"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, capsys):
    (tmp_path / "config.json").write_text(content)
    assert main(["run", "--config", str(tmp_path / "config.json")]) == 2
    assert capsys.readouterr().err.startswith("npo_core run: ")


@pytest.mark.parametrize("arguments", [[], ["train"], ["grpo", "--seed", "x"], ["run"]])
def test_a_command_that_does_not_exist_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m npo_core" in capsys.readouterr().err


def test_a_stream_without_greek_gets_all_that_is_printed():
    printed = {}
    for encoding in ("utf-8", "latin-1", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        command = [sys.executable, "-m", "npo_core", "settings"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
        assert (done.returncode, done.stderr) == (0, b"")
        printed[encoding] = done.stdout
    text = printed["utf-8"].decode()
    assert not text.isascii(), "nothing to be seen here"
    for encoding, shown in printed.items():
        assert shown == text.encode(encoding, "backslashreplace")


def test_a_reader_that_has_read_enough_ends_nothing_with_a_traceback():
    """As `python -m npo_core settings | head -1`."""
    command = [sys.executable, "-m", "npo_core", "settings"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait() == 0


def test_a_plan_is_made_where_the_locale_knows_ascii_only_and_the_folder_has_other_letters(tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "npo_core", "plan", "--preset", "smoke", "--root", str(tmp_path / "Δ a=1 [b]")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert (done.returncode, done.stdout.isascii()) == (0, True), done.stderr
    assert done.stdout.count(b"\n") > 5


def test_all_settings_are_listed(capsys):
    assert main(["settings"]) == 0
    blocks = [block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n")]
    listed = {line.split()[0]: (block[0], line) for block in blocks for line in block[1:]}
    assert list(listed) == [setting.name for setting in fields(RunConfig)]
    for name, setting in declarations(RunConfig).items():
        group, line = listed[name]
        assert group == setting.group and setting.help in line and line.endswith(f"; {setting.source}]"), name
    assert "[a number from 0 to 1; paper]" in listed["tau_gate"][1]
    assert "['replace', 'append'; paper]" in listed["placement"][1]
    assert len(blocks) == len({setting.group for setting in declarations(RunConfig).values()})


def test_the_list_of_settings_in_the_documentation_is_that_of_the_code(capsys):
    assert main(["settings", "--markdown"]) == 0
    table = capsys.readouterr().out
    documented = (ROOT / "docs" / "implementation.md").read_text()
    _, section = documented.split("## All settings\n")
    assert table in section, "`python -m npo_core settings --markdown` prints what belongs at the end of the document"
    assert "| `tau_gate` | `0.6` | a number from 0 to 1 | paper |" in table
    assert "\n| **Guidance** | | | | |\n| `tau_gate` |" in table


def test_help_and_settings_load_nothing_heavy():
    code = (
        "import sys\nfrom npo_core.__main__ import main\n"
        "for arguments in (['--help'], ['grpo', '--help'], ['settings']):\n"
        "    try:\n        main(arguments)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "print('loaded:', *sorted({'trl', 'transformers', 'torch', 'datasets'} & sys.modules.keys()))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "loaded:"
    assert any("autonpo" in line for line in lines)


@pytest.fixture
def ran(monkeypatch):
    """Stages that only note what they were asked to run."""
    from npo_core.stages import run as stages

    asked = []

    def run(config, root, quiet, label=""):
        asked.append((config, root, quiet))
        result = {"base": {"average": 0.25}, "final": {"average": 0.5}}
        return SimpleNamespace(path=Path(config.run_name), result=lambda: result)

    monkeypatch.setattr(stages, "run", run)
    return asked


@pytest.mark.parametrize("method", ["grpo", "autonpo"])
def test_the_stage_is_the_method_and_values_are_json_or_bare_words(ran, method, capsys):
    settings = ["tau_gate=0.5", "learning_rate=1e-4", 'suites=["mathvista", "mmstar"]', "ratio_mode=exact"]
    settings += ['cache_rule="shortest"', "cache_stop=false", "freeze_vision=false", "policy=/a=b"]
    arguments = [method, "--preset", "smoke", "--seed", "3", "--root", "elsewhere", "--quiet"]
    assert main([*arguments, *(part for setting in settings for part in ("--set", setting))]) == 0
    overrides = {
        "tau_gate": 0.5,
        "learning_rate": 1.0e-4,
        "suites": ["mathvista", "mmstar"],
        "ratio_mode": "exact",
        "cache_rule": "shortest",
        "cache_stop": False,
        "freeze_vision": False,
        "policy": "/a=b",
    }
    expected = resolve_config(method, "smoke", 3, overrides)
    assert ran == [(expected, Path("elsewhere"), True)]
    assert "0.250 -> 0.500" in capsys.readouterr().out


def test_a_launcher_starts_the_run_and_is_not_started_again_inside(ran, tmp_path, monkeypatch):
    from npo_core.stages import launch

    started = []
    monkeypatch.setattr(
        launch, "start", lambda config, root: started.append(config) or launch.BackgroundRun(config, None, root)
    )
    monkeypatch.setattr(
        launch.BackgroundRun,
        "wait",
        lambda self: SimpleNamespace(path="there", result=lambda: {"base": {"average": 0}, "final": {"average": 1}}),
    )
    config = resolve_config("grpo", "smoke", 0, {"launcher": "two_cpu", "micro_batch": 8})
    settings = ["--set", "launcher=two_cpu", "--set", "micro_batch=8", "--root", str(tmp_path), "--quiet"]
    assert main(["grpo", "--preset", "smoke", *settings]) == 0
    assert started == [config] and ran == []
    (tmp_path / "config.json").write_text(config.to_json())
    assert main(["run", "--config", str(tmp_path / "config.json"), "--quiet"]) == 0
    assert started == [config] and [asked[0] for asked in ran] == [config]


def test_a_saved_configuration_runs_again_as_it_was(ran, tmp_path):
    config = resolve_config("autonpo", "smoke", 7, {"tau_gate": 0.25})
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config.to_json())))
    assert main(["run", "--config", str(tmp_path / "config.json")]) == 0
    assert ran == [(config, None, False)]


def test_a_run_goes_on_where_its_folder_is(ran, tmp_path):
    config = resolve_config("autonpo", "smoke", 7)
    folder = tmp_path / config.run_name
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    assert main(["run", "--config", str(folder / "config.json")]) == 0
    assert main(["run", "--config", str(folder / "config.json"), "--root", str(tmp_path / "other")]) == 0
    assert [root for _, root, _ in ran] == [tmp_path, tmp_path / "other"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "rows.jsonl", "--base", "policy"], "--data, --base given without --checkpoints"),
        (["--verifier", "mine:verdict"], "--verifier given without --checkpoints"),
        (["--checkpoints", "out", "--data", "d", "--out", "o", "--set", "seed=1"], "with --checkpoints nothing reads"),
        (["--checkpoints", "out", "--data", "d", "--out", "o", "--root", "r"], "with --checkpoints nothing reads"),
    ],
)
def test_options_of_signal_that_nothing_would_read_are_refused(arguments, words, capsys):
    assert main(["signal", *arguments]) == 2
    assert words in capsys.readouterr().err
