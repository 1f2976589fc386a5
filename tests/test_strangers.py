"""Policies, data sets and run folders of strangers: nothing in them is executed, and it is said in a sentence."""

import json
import os
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import EpsImagePlugin
from worlds import trainer_of, world

from npo_core.guidance.trajectories import GuidanceCache
from npo_core.runs.checkpoints import mark_complete, require_complete
from npo_core.world.data import DataSettings, load_data
from npo_core.world.policies import load_policy, load_processor, save_policy
from npo_core.world.pretrained import check_policy

ROW = {"uid": ["a"], "prompt": ["add 1 and 2"], "answer": ["3"]}


class Payload:
    """Unpickled, it makes a folder: the sign that something was executed."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


@pytest.fixture
def sign(tmp_path, monkeypatch):
    """Where a hostile example leaves its sign; it must not be there at the end."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run code"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def test_the_sign_is_left_where_something_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))  # or no test here could fail
    assert (tmp_path / "executed").is_dir()


def policy(folder: Path, kind: str = "text") -> Path:
    tiny = world(kind)
    save_policy(tiny.build(), tiny.processor, folder)
    return folder


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


# Policies


def test_pickled_weights_are_not_read(tmp_path, sign):
    folder = policy(tmp_path / "policy")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(sign)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        check_policy(folder, load_processor(folder))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_policy(folder)


def test_a_pickle_that_is_named_as_weights_is_refused(tmp_path, sign):
    folder = policy(tmp_path / "policy")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(sign)))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_policy(folder)


@pytest.mark.parametrize("kind", ["text", "pictures"])
def test_code_that_a_configuration_names_is_not_loaded(tmp_path, sign, kind):
    folder = policy(tmp_path / "policy", kind)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(sign)!r})\nclass Evil: pass\n")
    autos = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")
    code = dict.fromkeys(autos, "evil.Evil")
    change(folder / "config.json", auto_map=code)
    assert load_policy(folder).config.model_type == world(kind).build().config.model_type
    change(folder / "config.json", model_type="evil")
    for load in (load_policy, load_processor):
        with pytest.raises(ValueError, match="custom code"):
            load(folder)


@pytest.mark.parametrize("kind", ["text", "pictures"])
def test_code_that_a_processor_names_is_not_loaded_and_nobody_is_asked(tmp_path, sign, kind):
    folder = policy(tmp_path / "policy", kind)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(sign)!r})\nclass Evil: pass\n")
    code = {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        "AutoProcessor": "evil.Evil",
        "AutoImageProcessor": "evil.Evil",
    }
    for path in folder.glob("*_config.json"):
        if path.name != "generation_config.json":
            change(path, auto_map=code, processor_class="Evil", tokenizer_class="Evil", image_processor_type="Evil")
            content = json.loads(path.read_text())
            if "image_processor" in content:
                change(path, image_processor={**content["image_processor"], "auto_map": code})
    try:
        load_processor(folder)
    except (ValueError, OSError) as error:  # or it is loaded by the classes of transformers
        assert "Evil" in str(error) or "custom code" in str(error)


TEMPLATES = {
    "hidden attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "modules of Jinja": "{{ cycler.__init__.__globals__.os.mkdir('SIGN') }}",
    "modules by format": "{{ '{0.__init__.__globals__}'.format(cycler) }}",
    "modules by filter": "{{ (cycler|attr('__init__')|attr('__globals__')).os.mkdir('SIGN') }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os.mkdir('SIGN') }}",
    "without end": "{% for i in range(1000000000) %}x{% endfor %}",
    "no template": "{% for %}",
    "its own refusal": "{{ raise_exception('never') }}",
}


@pytest.mark.parametrize("kind", ["text", "pictures"])
@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_reaches_for_more_than_the_messages_is_refused(tmp_path, sign, kind, case):
    folder = policy(tmp_path / "policy", kind)
    (folder / "chat_template.jinja").write_text(TEMPLATES[case].replace("SIGN", str(sign)))
    processor = load_processor(folder)
    with pytest.raises(ValueError, match=r"The chat template in .* cannot write a prompt: "):
        check_policy(folder, processor)


def test_pickled_adapters_are_not_read(tmp_path, sign):
    base, adapters = policy(tmp_path / "policy"), tmp_path / "adapters"
    adapters.mkdir()
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "auto_mapping": {"parent_library": "antigravity"},
    }
    (adapters / "adapter_config.json").write_text(json.dumps(about))
    torch.save({"weight": Payload(sign)}, adapters / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled adapters are not read"):
        load_policy(adapters)


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_with_a_pickle_is_not_resumed_from(tmp_path, sign, name, checkpoint):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    torch.save(Payload(sign), folder / name)
    torch.save(Payload(sign), folder / "training_args.bin")
    mark_complete(folder)
    require_complete(folder)
    trainer = trainer_of(world("text"), tmp_path / "out", steps=2)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer.train(resume_from_checkpoint=str(folder))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer_of(world("text"), folder, steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


# Data sets


def read(path: Path, kind: str = "text"):
    return load_data(DataSettings(str(path)), world(kind).processor)


def test_a_loading_script_is_not_run(tmp_path, sign):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("data.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(sign)!r})\n")
    with pytest.raises((ValueError, FileNotFoundError), match="data"):
        read(folder)
    with pytest.raises(ValueError, match=r"ends in '\.py'"):
        read(folder / "data.py")
    pq.write_table(pa.table(ROW), folder / "train.parquet")
    card = f"---\nconfigs: !!python/object/apply:os.mkdir [{str(sign)!r}]\n---\n"
    (folder / "README.md").write_text(card)
    assert read(folder)["uid"][:] == ["a"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".csv.xz", ".json.bz2"])
def test_a_pickle_that_is_named_as_data_is_refused(tmp_path, sign, suffix):
    (tmp_path / f"rows{suffix}").write_bytes(pickle.dumps(Payload(sign)))
    with pytest.raises(ValueError, match="rows") as refused:
        read(tmp_path / f"rows{suffix}")
    assert "\n" not in str(refused.value)


def test_pickles_in_the_metadata_of_parquet_are_not_read(tmp_path, sign):
    path, pickled = tmp_path / "rows.parquet", pickle.dumps(Payload(sign))
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled}
    fields = [pa.field("uid", pa.string()), pa.field("prompt", pa.string())]
    schema = pa.schema([*fields, pa.field("answer", pa.string(), metadata=extension)])
    pq.write_table(pa.table(ROW).cast(schema).replace_schema_metadata({"pandas": pickled}), path)
    assert read(path)["answer"][:] == ["3"], "it is a column of text"
    pq.write_table(pa.table(ROW).replace_schema_metadata({"npo_guidance": pickled}), path)
    with pytest.raises(ValueError, match="no guidance cache"):
        GuidanceCache.load(path)


@pytest.mark.parametrize("kind", ["os.system", "__import__", "Value.__init__"])
def test_a_type_of_column_that_names_code_is_refused(tmp_path, sign, kind):
    about = {"info": {"features": {"answer": {"_type": kind, "command": f"mkdir {sign}"}}}}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(ROW).replace_schema_metadata({"huggingface": json.dumps(about)}), path)
    with pytest.raises(ValueError, match=r"rows\.parquet holds no rows that can be read") as refused:
        read(path)
    assert "\n" not in str(refused.value)


def test_a_picture_that_is_a_program_is_not_run(tmp_path, sign, monkeypatch):
    """PostScript is one: Pillow would give it to Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: sign.mkdir())
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n%%EOF\n")
    row = {"prompt": "chart : add the bars to 0", "answer": "3", "image": "a.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="picture cannot be decoded: it is of kind EPS; PNG, JPEG, "):
        read(tmp_path / "rows.jsonl", "pictures")
