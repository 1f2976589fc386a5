"""Factories of one's own: what is refused before the first step, and that a replay sees the prompts it repeats."""

import pytest
import torch
from datasets import Dataset
from factories import Factory, controller_of, own_config
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler
from worlds import WIDTH, Guides, trainer_of, world

import npo_core.control.watch
from npo_core import GuidanceCache, training_schedule
from npo_core.control.agreement import FIXED, keep_order, prompt_order, require_agreement, require_same_prompts
from npo_core.control.auto import AutoNPO
from npo_core.control.scheduled import ScheduledNPO
from npo_core.guidance.verdicts import verifier_reward
from npo_core.guidance.verifiers import BoxedVerifier
from npo_core.method.trigger import PlateauTrigger, PlateauWarning
from npo_core.runs.folder import RunFolder
from npo_core.trainer.config import NPOConfig

UIDS = world("text").dataset["uid"][:]
WATCH = TrainerCallback()
CONFIG = own_config()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    return Factory(CONFIG)(folder, None, [WATCH])


def require(trainer, config=CONFIG, **changes):
    given = {"output_dir": trainer.args.output_dir, "guidance": None, "watch": WATCH, "uids": UIDS, **changes}
    require_agreement(trainer, config, **given)


def test_a_trainer_that_fits_is_taken(trainer):
    require(trainer)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 400, "learning_rate": 0.5, "loss_type": "dapo", "beta": 0.1, "seed": 7},
        {"ratio_gamma": 0.7, "ratio_truncation": 9.0},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 4},
        {"save_total_limit": 20},
        {"temperature": 0.6, "tau_gate": 0.5, "ratio_mode": "exact", "save_steps": 5, "bf16": True},
    ],
    ids=["the optimiser's", "of another ratio mode", "passes", "a limit that lets everything be", "read from it"],
)
def test_what_does_no_harm_is_the_factorys_own(trainer, monkeypatch, changes):
    for name, value in changes.items():
        monkeypatch.setattr(trainer.args, name, value)
    require(trainer)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("save_steps", 0.5, "save_steps is 0.5; it must be a number of steps"),
        ("save_strategy", "no", "save_strategy is 'no'; it must be 'steps'"),
        ("save_only_model", True, "save_only_model is True; .* cannot be rolled back to"),
        ("load_best_model_at_end", True, "load_best_model_at_end is True; it must be False"),
        ("logging_strategy", "epoch", "logging_strategy is 'epoch'"),
        ("logging_steps", 5, "logging_steps is 5; it must be 1"),
        ("num_iterations", 2, "num_iterations is 2; it must be 1: a roll-back between two updates"),
        ("ignore_data_skip", True, "ignore_data_skip is True"),
        ("remove_unused_columns", True, "remove_unused_columns is True"),
        ("sync_ref_model", True, "sync_ref_model is True"),
        ("cast_lm_head_to_fp32", True, "cast_lm_head_to_fp32 is True; .* have their head as it was saved"),
        ("max_steps", 3, "max_steps is 3; it must be at least compute_steps = 4"),
        ("max_steps", -1, "max_steps is -1; it must be at least compute_steps = 4"),
        ("steps_per_generation", 2, "steps_per_generation is 2; it must be gradient_accumulation_steps = 1"),
        ("save_total_limit", 3, "save_total_limit is 3; it must be None: checkpoint_keep = 20"),
        ("output_dir", "out", "output_dir is out; it must be what the factory is given"),
    ],
)
def test_an_argument_that_breaks_a_run_is_refused(trainer, monkeypatch, name, value, message):
    folder = trainer.args.output_dir
    monkeypatch.setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message) as refused:
        require(trainer, output_dir=folder)
    assert str(refused.value).count("\n  - ") == 1, "one complaint and no other"


def test_what_the_factory_is_given_must_arrive(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "verifier", None)
    with pytest.raises(ValueError, match="verifier is None") as refused:
        require(trainer, watch=TrainerCallback(), guidance=Guides(), uids=UIDS[:10])
    listed = str(refused.value)
    assert "callbacks is without the one" in listed and "guidance is not what the factory is given" in listed
    assert f"rows of the controller lack 2 prompts of train_dataset, such as {min(UIDS[10:])!r}" in listed
    monkeypatch.setattr(trainer, "train_dataset", trainer.train_dataset.remove_columns("uid"))
    with pytest.raises(ValueError, match="train_dataset has no column uid"):
        require(trainer)


def test_a_trainer_of_trl_is_not_enough(tmp_path):
    with pytest.raises(TypeError, match=r"returned a GRPOTrainer; it must return an NPOTrainer"):
        require(trainer_of(world("text"), tmp_path, GRPOTrainer))


def test_what_is_compared_is_there(trainer):
    assert FIXED.keys() <= NPOConfig.__dataclass_fields__.keys()


def test_a_run_with_a_factory_that_does_not_fit_trains_no_step(tmp_path):
    """Every mismatch in one message, and again at the next try: nothing of the run is on disk by then."""
    wrong = Factory(CONFIG, logging_steps=5, num_iterations=2, verifier=None)
    for _ in range(2):
        with pytest.raises(ValueError, match="does not fit the run") as refused:
            controller_of(wrong, tmp_path).run()
        for name in ("logging_steps", "num_iterations", "verifier"):
            assert f"\n  - {name} is " in str(refused.value)
    controller = controller_of(Factory(CONFIG), tmp_path)
    assert controller.run_folder.metrics() == [] and not list(controller.run_folder.path.glob("branches/*/*"))
    controller.run()
    assert len(controller.run_folder.metrics()) == CONFIG.compute_steps


UNUSABLE = {
    "uid is a number": (lambda n, row: {**row, "uid": n}, r"Row 0 has uid 0; every row needs .* \(and 11 more\)"),
    "two sources that count from 0": (lambda n, row: {**row, "uid": str(n % 6)}, "Uid '0' names two rows"),
    "an answer is missing": (
        lambda n, row: {**row, "answer": None if n == 7 else row["answer"]},
        "Row 7 .* has answer None",
    ),
    "answers are numbers": (lambda n, row: {**row, "answer": n}, r"Row 0 .* has answer 0; .* \(and 11 more\)"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_rows_that_a_roll_back_could_not_use_are_refused_before_the_first_step(tmp_path, case):
    change, complaint = UNUSABLE[case]
    rows = [change(n, row) for n, row in enumerate(world("text").dataset)]
    judge = BoxedVerifier()
    factory = Factory(CONFIG, dataset=Dataset.from_list(rows), verifier=judge, reward=verifier_reward(judge))
    run = RunFolder(CONFIG, tmp_path)
    by_uid = {row["uid"]: row for row in rows}
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"(?s)does not fit the run.*\n  - train_dataset: {complaint}"):
            AutoNPO(factory, CONFIG, run, by_uid, world("text").processor, judge, quiet=True).run()
    assert run.metrics() == [] and not list(run.path.glob("branches/*/*"))


def test_a_picture_that_no_step_could_show_is_refused_before_the_first_step(tmp_path):
    tiny = world("pictures")
    rows = [{**row, "image": Image.new("RGB", (2010, 10)) if n == 9 else row["image"]}
            for n, row in enumerate(tiny.dataset)]  # fmt: skip
    factory = Factory(CONFIG, dataset=Dataset.from_list(rows), tiny=tiny)
    with pytest.raises(ValueError, match=r"train_dataset: Row 9 .*picture of a shape that has no tokens: 2010 × 10"):
        controller_of(factory, tmp_path).run()


# The order of prompts

LONG = own_config(compute_steps=12)
"""Passes of six steps; the budget left at step 10 allows one roll-back, to step 8, inside the second pass."""


class AtTen(PlateauTrigger):
    def update(self, step, reward, entropy):
        super().update(step, reward, entropy)
        return PlateauWarning(step, reward, 0.0, entropy, -0.5) if step == 10 else None


@pytest.fixture
def warned(monkeypatch):
    monkeypatch.setattr(npo_core.control.watch, "PlateauTrigger", AtTen)


def test_a_resumed_pass_has_the_order_of_an_uninterrupted_one(tmp_path):
    """TRL's own shuffle, the second pass, its middle and its begin: same prompts, same rollouts, same weights."""
    factory = Factory(LONG, shuffle_dataset=True)
    whole = factory(tmp_path / "00")
    whole.train()
    uids = [batch["uids"] for batch in whole.generated]
    assert len(uids) == 12 and {*uids[0], *uids[1]} != {*uids[6], *uids[7]}, "the passes are alike"
    for step in (8, 6):
        again = factory(tmp_path / f"{step}")
        keep_order(again, step)
        again.train(resume_from_checkpoint=str(tmp_path / "00" / f"checkpoint-{step}"))
        assert [batch["uids"] for batch in again.generated] == uids[step:]
        for first, second in zip(whole.generated[step:], again.generated, strict=True):
            assert torch.equal(first["completion_ids"], second["completion_ids"])
        weights = [load_file(tmp_path / name / "checkpoint-12" / "model.safetensors") for name in ("00", f"{step}")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_replay_inside_a_later_pass_sees_the_same_prompts(tmp_path, warned):
    controller = controller_of(Factory(LONG, shuffle_dataset=True), tmp_path)
    controller.run()
    (rollback,) = controller.run_folder.events("rollback")
    assert (rollback["policy_step"], rollback["to"]) == (10, 8)
    lines = controller.run_folder.metrics()
    assert [line["policy_step"] for line in lines] == [*range(1, 11), 9, 10]
    assert [line["groups"].keys() for line in lines[8:10]] == [line["groups"].keys() for line in lines[10:]]
    assert sum(line["npo/replaced_slots"] for line in lines[10:]) > 0, "the cache is for these prompts"


def test_guides_are_sampled_as_the_trainers_train_whatever_the_run_says(tmp_path, warned):
    controller = controller_of(Factory(LONG, temperature=0.7, max_completion_length=8), tmp_path)
    controller.run()
    (event,) = controller.run_folder.events("cache")
    cache = GuidanceCache.load(controller.run_folder.path / event["file"])
    assert (LONG.temperature, LONG.max_completion_length) == (1.0, WIDTH) and WIDTH > 8
    assert {guide.temperature for guide in cache} == {0.7}
    assert cache.max_completion_length == 8 >= max(len(guide.token_ids) for guide in cache)


class Restless(Factory):
    """Has a sampler of its own that goes through the data in another order for every trainer."""

    def __call__(self, *args):
        trainer = super().__call__(*args)
        trainer._get_train_sampler = lambda dataset=None: RepeatSampler(
            self.dataset, self.config.num_generations, self.config.prompts_per_step, seed=100 + len(self.made)
        )
        return trainer


def test_a_replay_of_other_prompts_is_refused(tmp_path, warned):
    controller = controller_of(Restless(LONG), tmp_path)
    with pytest.raises(ValueError, match=r"Policy step 9 is replayed with other prompts.*training_schedule\(dataset"):
        controller.run()
    assert len(controller.run_folder.metrics()) == 10, "the step is not noted"


def test_only_known_prompts_are_compared():
    require_same_prompts(3, ["a", "b"], ["b", "a"])
    require_same_prompts(3, [], ["a"])
    require_same_prompts(3, ["a"], [])
    with pytest.raises(ValueError, match=r"\(a became c\)"):
        require_same_prompts(3, ["a", "b"], ["b", "c"])


# Manual interventions, whose cache is filled for the prompts of a window


def test_scheduled_interventions_need_the_schedule(tmp_path):
    config = own_config("npo", compute_steps=8, late_step=6, late_start=4)
    rows = world("text").dataset
    listed = []
    for factory in (Factory(config, shuffle_dataset=True), Factory(config, rows.select(range(10)))):
        with pytest.raises(ValueError, match=r"train on npo_core.training_schedule \(12 rows or more\)") as refused:
            controller_of(factory, tmp_path, ScheduledNPO).run()
        listed.append(str(refused.value).count("\n  - "))
    assert listed == [1, 1]
    twice = Factory(config, per_device_train_batch_size=16)  # twice the prompts in a step need twice the rows
    with pytest.raises(ValueError, match=r"training_schedule \(24 rows or more\)"):
        controller_of(twice, tmp_path, ScheduledNPO).run()
    with pytest.raises(ValueError, match="save_steps is 3; step 4, which is rolled back to, is no multiple"):
        controller_of(Factory(config, rows, save_steps=3), tmp_path, ScheduledNPO).run()
    schedule = training_schedule(rows, config.compute_steps, config.prompts_per_step, config.data_seed)
    fits = Factory(config, schedule)
    controller = controller_of(fits, tmp_path, ScheduledNPO)
    controller.run()
    assert [event["to"] for event in controller.run_folder.events("rollback")] == [4]
    assert prompt_order(fits.made[0]) == schedule["uid"][:]
