"""What a run notes of its trainer factory: another factory is refused, another machine or an older version is not."""

import json

import pytest
from factories import Factory, controller_of, own_config
from worlds import trainer_of, world

from npo_core.control.fingerprint import FILE, data_digest, fingerprint, require_same_factory
from npo_core.runs.folder import RunFolder

CONFIG = own_config()


def _different(first, second) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if first[name] != second[name]}


def test_another_factory_neither_goes_on_with_a_run_nor_gets_its_result(tmp_path):
    first = controller_of(Factory(CONFIG), tmp_path)
    first.run()
    lines = first.run_folder.metrics()
    assert controller_of(Factory(CONFIG), tmp_path).run().state.global_step == 0, "a finished run is not run again"
    other = Factory(CONFIG, learning_rate=0.5, loss_type="dapo")
    with pytest.raises(ValueError, match="holds a run of another trainer factory") as refused:
        controller_of(other, tmp_path).run()
    said = str(refused.value).splitlines()
    assert said[1:3] == ["  - learning_rate was 0.01, now it is 0.5", "  - loss_type was grpo, now it is dapo"]
    assert "another root" in said[3] and len(said) == 4
    assert first.run_folder.metrics() == lines
    other = Factory(CONFIG, world("text").dataset.select(range(8)))
    with pytest.raises(ValueError, match=r"- data \(hash of order, prompts and answers\) was [0-9a-f]{16}, now it is"):
        controller_of(other, tmp_path).run()


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """It noted nothing; the factory that it now gets is taken for its own."""
    done = controller_of(Factory(CONFIG), tmp_path)
    done.run()
    lines = done.run_folder.metrics()
    note = done.run_folder.path / FILE
    note.unlink()
    done.run_folder.drop_metrics_after(2)
    (done.run_folder.path / "branches" / "00" / "checkpoint-4" / "complete.json").unlink()
    again = controller_of(Factory(CONFIG), tmp_path)
    again.run()
    timeless = [[{**line, "step_time": 0} for line in each] for each in (lines, again.run_folder.metrics())]
    assert timeless[0] == timeless[1] and note.exists()


def test_a_setting_that_one_version_knows_is_not_compared(tmp_path):
    run, trainer = RunFolder(CONFIG, tmp_path), Factory(CONFIG)(tmp_path / "out")
    require_same_factory(run, trainer)
    noted = json.loads((run.path / FILE).read_text())
    noted.pop("epsilon")
    (run.path / FILE).write_text(json.dumps({**noted, "of_another_version": 1}))
    require_same_factory(run, trainer)


def test_what_decides_a_run_is_noted(tmp_path):
    tiny = world("text")
    plain = fingerprint(Factory(CONFIG)(tmp_path / "a"))
    assert plain == json.loads(json.dumps(plain, allow_nan=False))
    rows = list(tiny.dataset)
    reordered = tiny.dataset.select([1, 0, *range(2, len(rows))])
    reworded = tiny.dataset.map(lambda row: {"prompt": [{**row["prompt"][0], "content": "state 1"}]})
    for changed, changes in (
        ({"seed"}, {"seed": 3}),
        ({"temperature"}, {"temperature": 0.5}),
        ({"data"}, {"dataset": reordered}),
        ({"data"}, {"dataset": reworded}),
        ({"rewards"}, {"reward": lambda completions, **_: [0.0] * len(completions)}),
    ):
        assert _different(plain, fingerprint(Factory(CONFIG, **changes)(tmp_path / "b"))) == changed


def test_where_and_how_a_run_computes_is_free(tmp_path):
    plain = fingerprint(Factory(CONFIG)(tmp_path / "a"))
    free = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "report_to": [], "run_name": "x",
        "logging_first_step": True, "save_total_limit": 30, "gradient_checkpointing": True, "dataloader_num_workers": 1,
    }  # fmt: skip
    elsewhere = Factory(CONFIG, **free)(tmp_path / "b")
    assert _different(plain, fingerprint(elsewhere)) == set()
    elsewhere.model.config._name_or_path = "/somewhere/else/policy"
    there = fingerprint(elsewhere)
    elsewhere.model.config._name_or_path = "/moved/policy"
    assert fingerprint(elsewhere) == there and there["policy"] == "policy"


def test_pictures_are_not_read(tmp_path, monkeypatch):
    tiny = world("pictures")
    monkeypatch.setattr(
        "datasets.features.image.Image.decode_example", lambda *a, **k: pytest.fail("a picture was read")
    )
    assert data_digest(tiny.dataset) and len(data_digest(tiny.dataset)) == 16
    assert data_digest(tiny.dataset.remove_columns("uid")) is None
    assert data_digest(tiny.dataset.to_iterable_dataset()) is None


def test_adapters_are_noted_without_their_place(tmp_path):
    from peft import LoraConfig, get_peft_model

    trainer = trainer_of(world("text"), tmp_path)
    assert fingerprint(trainer)["adapters"] is None
    noted = []
    for rank, base in ((2, "/here/base"), (2, "/there/base"), (4, "/here/base")):
        trainer.model = get_peft_model(world("text").build(), LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
        trainer.model.peft_config["default"].base_model_name_or_path = base
        noted.append(fingerprint(trainer))
    assert noted[0] == noted[1]
    assert _different(noted[0], noted[2]) == {"adapters", "parameters"}
