"""What trainers are made of: data of one's own on a pretrained policy, from the file to the scores; TRL's arguments."""

import importlib.util
import io
import json
import shutil

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from worlds import world

from npo_core.guidance.fingerprints import image_digest
from npo_core.runs.config import resolve_config
from npo_core.runs.folder import runs_folder
from npo_core.stages import factory
from npo_core.stages import run as stages
from npo_core.stages.factory import HELD_OUT, TrainerMaker, _own_data, prepare, training_arguments
from npo_core.trainer.config import NPOConfig
from npo_core.world import policies
from npo_core.world.data import RowsByUid
from npo_core.world.policies import build_tokenizer, save_policy
from npo_core.world.tasks import make_dataset, sample_problems, vocabulary

SUITES = ["mathvista", "mmstar"]


def png(picture) -> dict:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A policy folder, and its training problems as somebody's parquet file with columns of other names."""
    folder = tmp_path_factory.mktemp("there")
    base = stages.prepare(resolve_config("grpo", "smoke"), quiet=True).base
    shutil.copytree(base, folder / "policy")
    rows = [
        {
            "id": index,
            "source": row["suite"],
            "question": "<image>" + row["prompt"][-1]["content"],
            "answer": row["answer"],
            "image": png(row["image"]),
            "teacher_response": "not used",
        }
        for index, row in enumerate(make_dataset(sample_problems("train", 40, 0, SUITES)))
    ]
    Dataset.from_list(rows).to_parquet(folder / "problems.parquet")
    return folder


@pytest.fixture
def own(there, tmp_path, monkeypatch):
    """Settings of a run on that policy and that file; runs and lists of refused rows go to a folder of the test."""
    monkeypatch.setenv("NPO_RUNS", str(tmp_path))

    def settings(method="grpo", **overrides):
        columns = ["uid=source/id", "prompt=question", "image=image", "answer=answer"]
        mine = {"policy": str(there / "policy"), "data": str(there / "problems.parquet"), "columns": columns}
        return resolve_config(method, "smoke", overrides={**mine, **overrides})

    return settings


@pytest.mark.slow
def test_a_run_on_data_of_ones_own(own, tmp_path):
    """Trained, rolled back, guided and scored like the small world: data and policy are settings."""
    run = stages.run(own("npo", compute_steps=18, cache_rollouts=64), tmp_path, quiet=True)
    result = run.result()
    assert list(result["final"]["suites"]) == [HELD_OUT] and result["final"]["items"] == run.config.eval_problems
    assert len(result["interventions"]) == 2
    asked = {uid for line in run.metrics() for uid in line["groups"]}
    assert len(asked) == 32 and all(uid.split("/")[0] in SUITES for uid in asked)


def test_examples_for_a_reader_are_sampled_on_the_device_of_the_run(monkeypatch):
    config = resolve_config("grpo", "smoke")
    moved = []

    class Policy:
        device = torch.device("cpu")

        def to(self, device):
            moved.append(device)
            return self

    monkeypatch.setattr(policies, "load_policy", lambda *_, **__: Policy())
    monkeypatch.setattr(policies, "own_device", lambda: "the GPU")
    monkeypatch.setattr(stages, "sample_rollouts", lambda policy, processor, rows, *_, **__: [[] for _ in rows])
    shown = stages.sample_responses(config, 2, 1, prepare(config, quiet=True))
    assert moved == ["the GPU"] and [example["responses"] for example in shown] == [[], []]


def test_rows_are_read_when_a_step_asks_for_them(own):
    world = prepare(own(), quiet=True)
    assert isinstance(world.rows, RowsByUid)
    assert len(world.train) == 32 and len(world.test) == 8
    assert not set(world.train["uid"]) & set(world.test["uid"])
    maker = TrainerMaker(own(), world)
    step = maker.schedule[[0, 0, 1]]
    assert step["uid"][0] == step["uid"][1] != step["uid"][2]
    assert step["image"][0] is step["image"][1], "a row was read twice"
    assert step["prompt"][0] == world.rows[step["uid"][0]]["prompt"]
    assert set(maker.schedule.column_names) == set(world.train.column_names)


def test_suites_and_a_test_file_of_ones_own(own, there, tmp_path):
    columns = ["uid=source/id", "prompt=question", "image=image", "answer=answer", "suite=source"]
    whole = Dataset.from_parquet(str(there / "problems.parquet"))
    seen, other = tmp_path / "seen.parquet", tmp_path / "other.parquet"
    whole.select(range(24)).to_parquet(seen)
    named = ["lonely", *whole["source"][25:]]
    whole.select(range(24, 40)).remove_columns("source").add_column("source", named).to_parquet(other)
    settings = {"columns": columns, "data": str(seen), "eval_problems": 15}
    with pytest.raises(ValueError, match=r"24 prompts are in data and in test_data.*must not be trained on"):
        prepare(own(**{**settings, "test_data": str(seen), "eval_problems": 24}), quiet=True)
    world = prepare(own(**{**settings, "test_data": str(other), "eval_problems": 16}), quiet=True)
    assert len(world.train) == 24
    # a suite of one row has no interval; alone, it is left out
    assert len(world.test) == 15 and set(world.test["suite"]) == set(SUITES)


def test_two_splits_without_uids_of_their_own_are_told_apart_by_what_they_hold(own, there, tmp_path):
    """Rows of each are counted from 0, under the same name where the files have it."""
    whole, places = Dataset.from_parquet(str(there / "problems.parquet")).remove_columns("id"), {}
    for name, rows in {"a/rows": range(24), "b/rows": range(24, 40), "c/other": range(20, 30), "d/one": [39]}.items():
        places[name] = tmp_path / f"{name}.parquet"
        places[name].parent.mkdir()
        whole.select(rows).to_parquet(places[name])
    settings = {"columns": ["prompt=question", "image=image", "answer=answer"], "data": str(places["a/rows"])}
    world = prepare(own(**settings, test_data=str(places["b/rows"]), eval_problems=16), quiet=True)
    assert world.train["uid"][:2] == ["rows/0", "rows/1"] and world.test["uid"][:2] == ["test/rows/0", "test/rows/1"]
    assert len(world.train) == 24 and len(world.test) == 16
    with pytest.raises(ValueError, match="4 prompts are in data and in test_data, such as 'other/0'"):
        prepare(own(**settings, test_data=str(places["c/other"]), eval_problems=16), quiet=True)
    with pytest.raises(ValueError, match="test_data has 1 rows; an interval needs 2 or more"):
        prepare(own(**settings, test_data=str(places["d/one"]), eval_problems=16), quiet=True)


def test_a_teacher_with_other_words_is_refused_before_it_is_asked(tmp_path):
    tiny = world("text")
    for name, words in (("same", vocabulary()), ("other", vocabulary()[::-1])):
        save_policy(tiny.build(), build_tokenizer(words), tmp_path / name)
    stages.require_same_tokenizer(tmp_path / "same", tiny.processor)
    with pytest.raises(ValueError, match="other has another tokenizer than the policy"):
        stages.require_same_tokenizer(tmp_path / "other", tiny.processor)
    for part in (tmp_path / "other").glob("tokenizer*"):
        part.unlink()
    stages.require_same_tokenizer(tmp_path / "other", tiny.processor)


def test_a_picture_of_any_mode_is_kept_in_the_table_of_rollouts():
    for row in ({"image": Image.new("CMYK", (8, 6))}, {"images": [Image.new("LAB", (8, 6))]}):
        kept = Image.open(io.BytesIO(factory._png(factory._picture(row))))
        assert (kept.mode, kept.size) == ("RGB", (8, 6))
    assert factory._png(factory._picture({"prompt": "no picture"})) is None


def test_instruction_and_picture_sizes_reach_the_prompt(own):
    plain = prepare(own(), quiet=True)
    world = prepare(own(instruction="= \\boxed{", max_pixels=16 * 32, min_pixels=256), quiet=True)
    assert world.train[0]["prompt"][-1]["content"] == plain.train[0]["prompt"][-1]["content"] + "\n= \\boxed{"
    assert image_digest(world.processor) != image_digest(plain.processor)
    small, large = (w.processor(images=[w.train[0]["image"]], text=["<|image_pad|>"]) for w in (world, plain))
    assert small["image_grid_thw"].prod() < large["image_grid_thw"].prod()


def test_rows_that_break_a_rule_are_listed_and_refused(own, there):
    longest = own(max_prompt_length=12)
    with pytest.raises(ValueError, match=r"40 of 40 rows break the rules \(prompt too long: 40\)"):
        prepare(longest, quiet=True)
    listed = [json.loads(line) for line in next((runs_folder() / "refused").glob("*-train.jsonl")).open()]
    assert listed and all({"index", "uid", "reason"} <= set(line) for line in listed)


def test_data_without_a_policy_that_knows_its_words_is_refused(there):
    with pytest.raises(ValueError, match=r"policy \"tiny\", whose tokenizer knows the small world's words only"):
        resolve_config("grpo", "smoke", overrides={"data": str(there / "problems.parquet")})
    with pytest.raises(ValueError, match=r"instruction is 'Think\.'; it must be empty without data"):
        resolve_config("grpo", "smoke", overrides={"instruction": "Think."})
    with pytest.raises(ValueError, match=r"columns is 'question'; it must be \"ours=theirs\""):
        resolve_config("grpo", "smoke", overrides={"columns": ["question"]})
    with pytest.raises(ValueError, match=r"columns is 'text=question'; it must be of our columns"):
        resolve_config("grpo", "smoke", overrides={"columns": ["text=question"]})


def test_settings_of_large_policies_reach_trl(tmp_path):
    plain = training_arguments(resolve_config("grpo", "smoke"), tmp_path)
    assert (plain.bf16, plain.gradient_checkpointing, plain.use_vllm, plain.report_to) == (False, False, False, [])
    large = {"mixed_precision": "bf16", "gradient_checkpointing": True, "micro_batch": 4}
    made = training_arguments(resolve_config("grpo", "smoke", overrides=large), tmp_path)
    assert made.bf16 and made.gradient_checkpointing
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (4, 4)
    assert made.steps_per_generation == 4, "one optimiser step per rollout batch"
    assert made.run_name.startswith("grpo-smoke-s0-")


@pytest.mark.parametrize("asked", ["no", "bf16"])
@pytest.mark.parametrize("said", ["no", "bf16", "fp16"])
def test_the_environment_does_not_decide_the_precision(tmp_path, monkeypatch, asked, said):
    """`accelerate launch --mixed_precision` sets it, and transformers takes it where the arguments say nothing."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
    config = resolve_config("grpo", "smoke", overrides={"mixed_precision": asked})
    assert training_arguments(config, tmp_path).mixed_precision == asked


def test_one_process_uses_one_of_several_gpus(tmp_path, monkeypatch):
    """transformers counts those that are visible, and TRL refuses to train on more than one without a launcher."""
    monkeypatch.setattr(NPOConfig, "n_gpu", property(lambda self: 4))
    made = training_arguments(resolve_config("grpo", "smoke"), tmp_path)
    assert made._n_gpu == 1


def test_passes_of_a_sharded_policy_are_reduced_one_by_one(tmp_path, monkeypatch):
    passes = {name: resolve_config("grpo", "smoke", overrides={"launcher": name}) for name in ("one_gpu", "one_node")}
    monkeypatch.setattr("npo_core.stages.factory.process_count", lambda: 1)
    for name, wanted in (("one_gpu", None), ("one_node", True)):
        made = training_arguments(passes[name], tmp_path).accelerator_config.gradient_accumulation_kwargs
        assert (made or {}).get("sync_each_batch") is wanted


def test_a_policy_scores_responses_alone_where_it_is_whole(tmp_path, monkeypatch):
    done = []
    for name in ("score_responses_alone", "train_sharded"):
        monkeypatch.setattr(f"npo_core.stages.factory.{name}", lambda given, name=name: done.append((name, given)))
    for launcher in ("one_gpu", "one_node"):
        config = resolve_config("grpo", "smoke", overrides={"launcher": launcher})
        trainer = TrainerMaker(config, prepare(config, quiet=True))(tmp_path / launcher)
        sharded = launcher == "one_node"
        assert done.pop() == (("train_sharded", trainer) if sharded else ("score_responses_alone", trainer.model))
        assert not done


def test_only_the_writing_process_lists_refused_rows(own, monkeypatch):
    """The files of all have one name on a shared disk, where process numbers of containers coincide."""
    asked = []
    monkeypatch.setattr(
        "npo_core.stages.factory.load_data", lambda settings, processor, refused: asked.append(refused) or {}
    )
    monkeypatch.setattr("npo_core.stages.factory.hold_out", lambda *_: ({"uid": []}, {"uid": []}))
    monkeypatch.setattr("npo_core.stages.factory._with_suites", lambda test: test)
    for writes in (True, False):
        monkeypatch.setattr("npo_core.stages.factory.is_writer", lambda writes=writes: writes)
        _own_data(own(), None)
    assert asked[0].name.endswith("-train.jsonl") and asked[1] is None


def test_an_engine_over_several_gpus_is_refused():
    overrides = {"vllm": "colocate", "max_prompt_length": 64, "vllm_tensor_parallel": 2}
    with pytest.raises(ValueError, match=r"vllm_tensor_parallel is 2; it must be 1: processes that share an engine"):
        resolve_config("grpo", "smoke", overrides=overrides)


def test_vllm_that_is_not_there_is_refused_before_anything_is_read(own, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vllm is 'colocate', but vLLM is not installed here"):
        prepare(own(vllm="colocate", max_prompt_length=64), quiet=True)


def test_a_tracker_is_told_every_step(own, tmp_path, monkeypatch):
    """Transformers makes a callback of a tracker's name; one that listens stands in its table here."""
    told, found = [], importlib.util.find_spec

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append((state.global_step, logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Listener)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: name == "tensorboard" or found(name, *_))
    run = stages.run(own(compute_steps=4, report_to=["tensorboard"]), tmp_path, quiet=True)
    rewards = [(step, logs["npo/reward"]) for step, logs in told if "npo/reward" in logs]
    assert rewards == [(line["policy_step"], line["npo/reward"]) for line in run.metrics()] and len(rewards) == 4


def test_a_tracker_that_is_not_there_is_refused_before_training(own, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = own(report_to=["wandb"])
    with pytest.raises(ValueError, match=r"report_to names wandb, which is not installed.*pip install wandb"):
        training_arguments(config, tmp_path)
    with pytest.raises(ValueError, match="report_to is 'weights'"):
        own(report_to=["weights"])


def test_trackers_do_not_name_the_run(own):
    assert own(report_to=["wandb"]).run_name == own().run_name
    assert own(gpu_memory=40.0, vllm_port=8001).run_name == own().run_name
    assert own(max_pixels=512).run_name != own().run_name
