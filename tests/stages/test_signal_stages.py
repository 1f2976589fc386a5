"""The signal measurement for anybody's checkpoints: data, verifier, origins, and the command line."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
import torch
from PIL.Image import Image
from worlds import world

from npo_core.__main__ import main
from npo_core.files import read_table
from npo_core.guidance.verdicts import Verdict
from npo_core.guidance.verifiers import BoxedVerifier
from npo_core.runs.config import resolve_config
from npo_core.runs.settings import SignalSettings
from npo_core.stages import run as stages
from npo_core.stages import signal as signal_stages
from npo_core.stages import signal_run
from npo_core.stages.signal import MeasuredSignal, describe, find_verifier, load_rows, measure_folder
from npo_core.stages.signal_run import default_origins, measure_run, settings_for
from npo_core.world import policies
from npo_core.world.policies import save_policy
from npo_core.world.tasks import make_dataset, sample_problems

SETTINGS = SignalSettings(prompts=4, rollouts=2, scored=1, gradients=2, max_new_tokens=4, resamples=5)
ROWS = [{"uid": f"sum-{n}", "prompt": f"add 1 and {n}", "answer": str(n + 1)} for n in range(5)]

VERIFIER = """
from npo_core.guidance.verdicts import Verdict

RIGHT = Verdict.CORRECT

def by_length(text, row):
    never = row["answer"] == "1"  # Q needs a prompt that fails, whatever is sampled
    return Verdict.WRONG if never or len(text) % 3 == int(row["answer"]) % 3 else Verdict.CORRECT

class ByLength:
    def __call__(self, text, row):
        return by_length(text, row)
"""


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as transformers' Trainer leaves it: two checkpoints and a log."""
    tiny, folder = world("text"), tmp_path_factory.mktemp("run")
    for step in (1, 2):
        model = tiny.build()
        with torch.no_grad():
            model.lm_head.weight.mul_(step)
        save_policy(model, tiny.processor, folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        torch.save({}, folder / f"checkpoint-{step}" / "optimizer.pt")
    (folder / "runs").mkdir()
    return folder


def written(path, rows=ROWS):
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_verifier.py").write_text(VERIFIER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_verifier"
    sys.modules.pop("my_verifier", None)


# From a folder to a table


@pytest.mark.parametrize(("data", "verifier"), [("rows.jsonl", "boxed"), ("rows.parquet", "my_verifier:ByLength")])
def test_a_folder_of_checkpoints_is_measured(run, tmp_path, module, data, verifier):
    file, out = written(tmp_path / data), tmp_path / "out"
    measured = measure_folder(run, file, str(out), SETTINGS, verifier=verifier, quiet=True)
    assert measured.folder == out
    assert [(pair.origin, pair.source, pair.distance) for pair in measured.pairs] == [
        (1, "resample", 0),
        (1, "000002", 1),
    ]
    assert json.loads((out / "signal.json").read_text()) == measured.summary
    table = pd.read_parquet(out / "table.parquet")
    assert table["kind"].tolist() == ["resample", "future"]
    assert table["second_moment_policy"].tolist() == [pytest.approx(1.0, abs=1e-4), pytest.approx(5.0, abs=4.0)]
    samples = read_table(out / "samples" / "000001.parquet")
    assert [row["uid"] for row in samples] == [f"sum-{n}" for n in (0, 0, 1, 1, 2, 2, 3, 3)]
    judge = find_verifier(verifier)
    rows = {row["uid"]: row for row in ROWS}
    assert [row["correct"] for row in samples] == [judge(row["text"], rows[row["uid"]]).correct for row in samples]
    assert any(row["correct"] for row in samples) == (verifier != "boxed")  # a random policy writes no box
    assert "Δ*" in describe(measured)


@pytest.fixture
def asked(monkeypatch):
    """What a measurement was asked for, without making it."""
    found = SimpleNamespace()

    def measurement(folder, policies, pairs, processor, rows, verifier, settings, load=None, quiet=False, **batches):
        vars(found).update(policies=policies, pairs=pairs, processor=processor, rows=rows, verifier=verifier, **batches)
        return SimpleNamespace(folder=Path(folder), run=dict)

    monkeypatch.setattr(signal_stages, "Measurement", measurement)
    monkeypatch.setattr(signal_stages, "load_processor", lambda folder: SimpleNamespace(folder=Path(folder)))
    monkeypatch.setattr(signal_stages, "check_template", lambda folder, processor: None)
    load = signal_stages.load_rows
    monkeypatch.setattr(signal_stages, "load_rows", lambda data, _, answer: load(data, world("text").processor, answer))
    return found


def empty_checkpoints(folder, steps):
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "config.json").write_text("{}")
        (folder / f"checkpoint-{step}" / "model.safetensors").touch()
    return folder


def empty_policies(folder, *names):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "config.json").touch()


@pytest.mark.parametrize(
    ("steps", "base", "origins"),
    [
        (range(10, 101, 10), False, [10, 40, 70]),  # the first, and the fourth and the seventh of ten
        (range(10, 101, 10), True, [0, 30, 70]),
        ([5, 10, 15], False, [5, 10]),  # never the last
        ([5, 10], False, [5]),
    ],
)
def test_by_default_origins_are_the_first_and_those_a_third_and_two_thirds_on(asked, tmp_path, steps, base, origins):
    folder, data = empty_checkpoints(tmp_path / "run", steps), written(tmp_path / "rows.jsonl")
    empty_policies(tmp_path, "base")
    measure_folder(folder, data, tmp_path / "out", SETTINGS, base=tmp_path / "base" if base else None)
    assert list(dict.fromkeys(pair.origin for pair in asked.pairs)) == origins
    assert asked.processor.folder == (tmp_path / "base" if base else folder / f"checkpoint-{steps[0]}")
    assert [row["uid"] for row in asked.rows] == ["sum-0", "sum-1", "sum-2", "sum-3"]
    assert "teacher" not in asked.policies


def test_what_is_asked_for_arrives(asked, tmp_path):
    empty_policies(tmp_path, "other", "strong")
    folder, data = empty_checkpoints(tmp_path / "run", range(10, 101, 10)), written(tmp_path / "rows.jsonl")
    mine = lambda text, row: Verdict.WRONG  # noqa: E731
    measure_folder(
        folder, data, tmp_path / "out", SETTINGS, verifier=mine, processor=tmp_path / "other",
        teacher=str(tmp_path / "strong"), origins=[20], distances=2, also=[30, 31],
        rollout_batch=7, score_batch=3,
    )  # fmt: skip
    assert asked.verifier is mine
    assert (asked.rollout_batch, asked.score_batch) == (7, 3)
    assert asked.processor.folder == tmp_path / "other"
    assert asked.policies["teacher"] == tmp_path / "strong"
    assert [(pair.source, pair.distance) for pair in asked.pairs if pair.kind in ("future", "teacher")] == [
        ("000030", 10), ("000050", 30), ("000100", 80), ("teacher", None),
    ]  # fmt: skip


def test_a_single_checkpoint_has_no_distance(asked, tmp_path):
    folder, data = empty_checkpoints(tmp_path / "run", [10]), written(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"1 checkpoint.*needs two"):
        measure_folder(folder, data, tmp_path / "out", SETTINGS)
    empty_policies(tmp_path, "base")
    measure_folder(folder, data, tmp_path / "out", SETTINGS, base=tmp_path / "base")
    assert [pair.distance for pair in asked.pairs] == [0, 10]


def test_a_policy_outside_of_the_folder_may_be_named_as_on_the_hub(asked, tmp_path, monkeypatch):
    """As in `BASE = "Qwen/Qwen3-0.6B"` of the script that trained: the model is on disk by then, in the hub's cache."""
    cached = {"a/base": tmp_path / "base", "b/words": tmp_path / "words", "c/teacher": tmp_path / "teacher"}
    monkeypatch.setattr(policies, "snapshot_download", lambda name, **_: str(cached[name]))
    folder, data = empty_checkpoints(tmp_path / "run", [10]), written(tmp_path / "rows.jsonl")
    given = {"base": "a/base", "processor": "b/words", "teacher": "c/teacher"}
    measure_folder(folder, data, tmp_path / "out", SETTINGS, **given)
    assert asked.policies == {
        "000000": cached["a/base"],
        "000010": folder / "checkpoint-10",
        "teacher": cached["c/teacher"],
    }
    assert asked.processor.folder == cached["b/words"]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"nowhere.* holds no config.json, and the hub did not give it"):
        measure_folder(folder, data, tmp_path / "out", SETTINGS, base=tmp_path / "nowhere")


def test_only_a_run_that_never_rolled_back_has_distances(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=r"method is 'autonpo'.*never rolled back: grpo"):
        measure_run(resolve_config("autonpo", "smoke"), [0], SETTINGS, root=tmp_path)


def test_what_a_run_of_ours_sampled_is_kept_whatever_is_measured_from_it(monkeypatch, tmp_path):
    """Each way of sampling has a folder; what only says how rollouts are compared opens no other one."""
    config = resolve_config("grpo", "smoke", overrides={"score_batch": 32})
    rows = world("text").dataset
    made = []

    class Seen:
        def __init__(self, folder, *_, rollout_batch, score_batch, **__):
            self.folder = folder
            made.append((folder.name, rollout_batch, score_batch))

        def run(self):
            return {}

    monkeypatch.setattr(signal_run, "Measurement", Seen)
    monkeypatch.setattr(signal_run, "teacher_folder", lambda *_: tmp_path / "teacher")
    monkeypatch.setattr(signal_run, "complete_checkpoints", lambda *_, **__: {5: tmp_path / "5"})
    monkeypatch.setattr(stages, "run", lambda *_: SimpleNamespace(path=tmp_path, branch=lambda _: tmp_path / "00"))
    prepared = SimpleNamespace(base=tmp_path / "base", processor=None, train=rows, verifier=None)
    monkeypatch.setattr(stages, "prepare", lambda *_: prepared)
    same = [{}, {"scored": 2}, {"gradients": 3}, {"parameters": "norm"}, {"c": 9.0}, {"resamples": 5}]
    for change in [*same, {"rollouts": 9}, {"seed": 1}, {"max_new_tokens": 7}]:
        measure_run(config, [0], replace(SETTINGS, **change))
    folders = [folder for folder, *_ in made]
    assert len(set(folders[: len(same)])) == 1 and len(set(folders)) == 4
    measure_run(config, [0], SETTINGS, rollout_batch=7, score_batch=3)
    assert made[0][1:] == (config.rollout_batch, 32) and made[-1][1:] == (7, 3), "the run's own unless it is given"


def test_origins_of_our_own_run_have_a_checkpoint():
    config = resolve_config("grpo", "cpu", 0, {"compute_steps": 250, "late_start": 104, "checkpoint_every": 10})
    assert default_origins(config) == [0, 100, 120]
    assert default_origins(config.with_changes(late_start=129)) == [0, 120]
    assert default_origins(config.with_changes(compute_steps=80)) == [0, 40]  # no plateau in so short a run


def test_what_cannot_be_measured_is_refused_before_the_run_is_made(tmp_path, monkeypatch):
    def trained(*_):
        raise AssertionError("trained")

    monkeypatch.setattr(stages, "run", trained)
    config = resolve_config("grpo", "smoke")
    with pytest.raises(ValueError, match="Policy step 5 cannot be measured from"):
        measure_run(config, [0, 5], settings_for(config), root=tmp_path, quiet=True)
    with pytest.raises(ValueError, match="prompts is 100000, but the data has"):
        measure_run(config, [0], SignalSettings(prompts=100000), root=tmp_path, quiet=True)


def test_settings_of_our_own_run_are_the_run_s_and_no_more_prompts_than_it_has():
    config = resolve_config("grpo", "cpu", 7, {"train_problems": 40, "max_completion_length": 14, "variance_c": 3.0})
    found = settings_for(config, rollouts=4)
    assert found == SignalSettings(prompts=40, rollouts=4, max_new_tokens=14, c=3.0, seed=7)
    assert settings_for(config, gradients=64).gradients == 40
    assert settings_for(config, prompts=30, gradients=0, c=1.0) == SignalSettings(
        prompts=30, gradients=0, max_new_tokens=14, c=1.0, seed=7
    )


COMPUTING = {"computing": {"dtype": "float32", "mixed_precision": "bf16"}}


def test_the_best_distances_in_words():
    best = {"distance": 20.0, "signal": 0.3, "at_edge": False, "low": 10.0, "high": 40.0}
    edge = {"distance": 80.0, "signal": 0.3, "at_edge": True, "low": 80.0, "high": 80.0}
    optimum = {"signal_kl": best, "signal_1_gradient_exact": edge, "signal_sequence": best}
    summary = {"settings": {"rollouts": 8}, "origins": {"10": {"optimum": optimum, "premise": []}}, **COMPUTING}
    _, first, second, computed = describe(MeasuredSignal(Path(), [], summary)).splitlines()
    assert first.split() == ["10", "signal_kl", "20", "10", "to", "40"]
    assert second.split() == ["10", "signal_1_gradient_exact", "80", "80", "to", "80,", "at", "the", "edge"]
    assert computed == "Computed with weights in float32, matrix products in bfloat16."


def test_the_premise_comes_first():
    share = {"value": 0.25, "low": 0.15, "high": 0.35, "n": 60}
    own = {"value": 0.05, "low": 0.02, "high": 0.1, "n": 60}
    record = {"distance": 40, "shown": share, "own": own, "gain": {**share, "value": 0.2}, "p_holm": 0.001}
    summary = {"settings": {"rollouts": 8}, "origins": {"10": {"optimum": {}, "premise": [record]}}, **COMPUTING}
    first, _, row, *_ = describe(MeasuredSignal(Path(), [], summary)).splitlines()
    assert first == (
        "From policy step 10: Guides from Δ = 40 solve 0.25 (0.15 to 0.35) of the 60 prompts that the policy fails in "
        "8 rollouts, its own resample 0.05 (0.02 to 0.10): the premise holds."
    )
    assert " ".join(row.split()) == "40 0.250 (0.150 to 0.350) 0.050 (0.020 to 0.100) 0.200 (0.150 to 0.350) 0.001"


# Data


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_text_becomes_a_user_message(tmp_path, name):
    rows = load_rows(written(tmp_path / name), world("text").processor)
    assert [row["uid"] for row in rows] == [row["uid"] for row in ROWS]
    assert rows[2] == {**ROWS[2], "prompt": [{"role": "user", "content": "add 1 and 2"}]}


def test_chat_messages_stay_and_pictures_are_decoded(tmp_path):
    made = make_dataset(sample_problems("train", 3, 0))
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(str(tmp_path / "folder"))
    for path in (tmp_path / "rows.parquet", tmp_path / "folder"):
        rows = load_rows(path, world("pictures").processor)
        assert rows["prompt"][:] == made["prompt"][:]
        assert isinstance(rows[0]["image"], Image)
        assert rows[0]["image"].tobytes() == made[0]["image"].tobytes()


def test_data_that_is_not_there_or_of_another_format_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no data set at"):
        load_rows(tmp_path / "none.jsonl", world("text").processor)
    (tmp_path / "rows.xls").write_text("uid,prompt,answer\n")
    with pytest.raises(ValueError, match=r"ends in '\.xls'; \.parquet, \.jsonl, \.json, \.csv, \.tsv and folders"):
        load_rows(tmp_path / "rows.xls", world("text").processor)
    one = make_dataset(sample_problems("train", 2, 0), text_only=True)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"several splits \(train, test\)"):
        load_rows(tmp_path / "splits", world("text").processor)


@pytest.mark.parametrize("missing", ["prompt", "answer"])
def test_a_missing_column_is_refused(tmp_path, missing):
    rows = [{name: value for name, value in row.items() if name != missing} for row in ROWS]
    with pytest.raises(ValueError, match=rf"does not say which of .* is {missing}\."):
        load_rows(written(tmp_path / "rows.jsonl", rows), world("text").processor)


def test_rows_without_uids_are_named_by_their_place_as_in_training(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "uid"} for row in ROWS]
    named = load_rows(written(tmp_path / "rows.jsonl", rows), world("text").processor)
    assert named["uid"][:] == [f"rows/{place}" for place in range(len(ROWS))]


def test_a_verifier_of_ones_own_needs_no_answer(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "answer"} for row in ROWS]
    made = load_rows(written(tmp_path / "rows.jsonl", rows), world("text").processor, answer=False)
    assert made["uid"][:] == [row["uid"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content"), [("rows.jsonl", ""), ("rows.jsonl", '{"uid": \n'), ("rows.json", "[]"), ("rows.parquet", None)]
)
def test_data_without_rows_or_broken_is_refused(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        pd.DataFrame(ROWS)[:0].to_parquet(path)
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"{name} holds no rows") as refused:
        load_rows(path, world("text").processor)
    assert "\n" not in str(refused.value)


def test_a_saved_folder_without_rows_is_refused(tmp_path):
    make_dataset(sample_problems("train", 2, 0), text_only=True).select([]).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none holds no rows"):
        load_rows(tmp_path / "none", world("text").processor)


# Verifiers


def test_verifiers_are_found_by_name(module):
    assert isinstance(find_verifier("boxed"), BoxedVerifier)
    assert find_verifier("my_verifier:by_length")("abc", {"answer": "4"}) is Verdict.CORRECT
    of_class = find_verifier("my_verifier:ByLength")
    assert not isinstance(of_class, type)
    assert of_class("abc", {"answer": "3"}) is Verdict.WRONG


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("box", 'must be "boxed" or "module:name"'),
        ("", 'must be "boxed" or "module:name"'),
        ("no_such_module:verify", "No module named 'no_such_module'"),
        ("my_verifier:nothing", "has no attribute 'nothing'"),
        ("my_verifier:", "has no attribute"),
        ("my_verifier:RIGHT", "something that can be called"),
    ],
)
def test_a_verifier_that_does_not_exist_is_refused(module, name, complaint):
    with pytest.raises(ValueError, match=complaint):
        find_verifier(name)


# The command line


def test_the_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["signal", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    names = ["checkpoints", "data", "out", "verifier", "base", "processor", "teacher", "origins", "distances", "also"]
    names += ["rollout-batch", "score-batch"]
    names += [name.replace("_", "-") for name in asdict(SETTINGS) if name != "seed"]
    assert [name for name in names if f"--{name} " not in shown] == []
    assert "--seed " in shown


@pytest.mark.parametrize(
    ("option", "value"), [("--top-p", "0.9"), ("--temperature", "0.7"), ("--top-k", "20")]
)  # fmt: skip
def test_truncated_sampling_ends_with_status_2_and_the_reason(run, tmp_path, capsys, option, value):
    data = written(tmp_path / "rows.jsonl")
    arguments = [
        "signal",
        "--checkpoints",
        str(run),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        option,
        value,
    ]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("npo_core signal: ") and err.count("\n") == 1
    assert "importance ratio biased" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [[], ["--data", "rows.jsonl"], ["--out", "out"]])
def test_checkpoints_need_data_and_a_folder(run, capsys, given):
    assert main(["signal", "--checkpoints", str(run), *given]) == 2
    assert "--checkpoints needs --data" in capsys.readouterr().err


def test_options_arrive_where_they_belong(monkeypatch, capsys):
    given = {}

    def measure(checkpoints, data, out, settings, **others):
        given.update(folders=(checkpoints, data, out), settings=settings, **others)
        raise ValueError("enough")

    monkeypatch.setattr(signal_stages, "measure_folder", measure)
    text = "signal --checkpoints run --data rows --out here --seed 3 --prompts 8 --rollouts 4 --scored 3 --gradients 2 "
    text += (
        "--parameters layers.3 --max-new-tokens 9 --c 1.5 --resamples 7 --temperature 1 --origins 10 20 --distances 5 "
    )
    text += "--also 7 9 --verifier a:b --base b --processor p --teacher t --quiet --rollout-batch 64 --score-batch 16 "
    text += "--dtype bfloat16 --mixed-precision bf16 --chat-template-kwargs"
    assert main([*text.split(), '{"enable_thinking": false}']) == 2
    assert capsys.readouterr().err == "npo_core signal: enough\n"
    assert given.pop("folders") == (Path("run"), Path("rows"), Path("here"))
    assert given.pop("settings") == SignalSettings(8, 4, 3, 2, "layers.3", 9, 1.5, 7, 3)
    assert given == {
        "verifier": "a:b", "base": "b", "processor": "p", "teacher": "t", "origins": [10, 20],
        "distances": 5, "also": [7, 9], "quiet": True, "rollout_batch": 64, "score_batch": 16, "dtype": "bfloat16",
        "mixed_precision": "bf16", "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
