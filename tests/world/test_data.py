"""Real data sets: what is made of them, every rule that a row may break, prompt lengths, held-out rows, pictures."""

import io
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile
from worlds import TinyWorld, trainer_of, world

from npo_core.guidance.fingerprints import image_digest
from npo_core.runs.config import resolve_config
from npo_core.trainer.dataset import require_columns
from npo_core.trainer.inputs import encode_prompts
from npo_core.world import data as datafiles
from npo_core.world.data import (
    DataSettings,
    RowsByUid,
    hold_out,
    image_policy,
    load_data,
    read_rows,
)
from npo_core.world.policies import build_processor, build_tokenizer
from npo_core.world.tasks import make_dataset, sample_problems

MMFINEREASON = dict(item.split("=", 1) for item in resolve_config("grpo", "gpu").columns)
"""Columns of a published data set, as the presets that train on it map them."""

WORDS = ["What", "Which", "one", "is", "the", "area", "of", "figure", "?", "add", "1", "and", "2", "be", "brief"]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def processor():
    return build_processor(WORDS)


def picture(width=40, height=24, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def published(index, **changes):
    """A row with the columns of the published MMFineReason files."""
    return {
        "source": ("MMR1", "WeMath2-SFT")[index % 2],
        "id": index // 2,
        "question": f"<image>What is the area of figure {index} ?",
        "answer": f" {index} ",
        "image": {"bytes": encoded(picture(seed=index)), "path": None},
        "original_answer": "<think>long</think>",
        "qwen3vl_235b_thinking_response": "<think>longer</think>",
        "caption": "a figure",
        "pass_rate": 0.0,
        "is_consistent": True,
        "consistency_analysis": "EQUIVALENT",
        "ori_question": "",
        **changes,
    }


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# What is made of a data set


def test_mmfinereason_rows_can_be_trained_on(tmp_path, processor):
    source = parquet(tmp_path / "train-00000-of-00001.parquet", [published(index) for index in range(6)])
    settings = DataSettings(source, columns=MMFINEREASON, instruction="be brief")
    rows = load_data(settings, processor, tmp_path / "refused.jsonl")
    require_columns(rows)
    assert rows.column_names == ["uid", "prompt", "answer", "suite", "image"]
    assert rows["uid"][:] == ["MMR1/0", "WeMath2-SFT/0", "MMR1/1", "WeMath2-SFT/1", "MMR1/2", "WeMath2-SFT/2"]
    assert rows["answer"][:] == list("012345")
    for index, row in enumerate(rows):
        assert row["prompt"] == [{"role": "user", "content": f"What is the area of figure {index} ?\nbe brief"}]
        assert row["image"].tobytes() == picture(seed=index).tobytes()
    assert (tmp_path / "refused.jsonl").read_text() == ""


def test_a_trainer_takes_the_rows(tmp_path):
    """TRL trains on them: the pictures arrive at the policy as often as there are rollouts."""
    tiny = world("pictures")
    made = make_dataset(sample_problems("train", 4, 0))
    made.to_parquet(tmp_path / "rows.parquet")
    rows = load_data(DataSettings(str(tmp_path / "rows.parquet")), tiny.processor)
    trainer = trainer_of(TinyWorld(tiny.processor, rows, tiny.build), tmp_path / "out", prompts=4, n=2)
    trainer.train()
    assert trainer.generated[0]["image_grid_thw"].shape == (8, 3)
    assert trainer.generated[0]["uids"] == [uid for uid in made["uid"] for _ in range(2)]


def test_columns_with_our_names_need_no_mapping(tmp_path, processor):
    made = make_dataset(sample_problems("train", 3, 0))
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(str(tmp_path / "saved"))
    for source in ("rows.parquet", "saved"):
        rows = load_data(DataSettings(str(tmp_path / source)), processor)
        assert set(rows.column_names) == set(made.column_names)
        for mine, row in zip(made, rows, strict=True):
            assert {**row, "image": row["image"].tobytes()} == {**mine, "image": mine["image"].tobytes()}


def test_pictures_by_path_are_found_in_the_folder_of_the_file_or_in_image_root(tmp_path, processor):
    (tmp_path / "shown").mkdir()
    for name in ("a", "b"):
        picture(seed=ord(name)).save(tmp_path / "shown" / f"{name}.png")
    beside = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a ?", "answer": 1, "image": "shown/a.png"}])
    full = str(tmp_path / "shown" / "a.png")
    lists = [
        {"prompt": "<image> <image> one ?", "answer": 1, "images": ["a.png", "b.png"]},
        {"prompt": "and ?", "answer": 2, "images": [full]},
    ]
    elsewhere = jsonl(tmp_path / "lists.jsonl", lists)
    assert load_data(DataSettings(beside), processor)[0]["image"].tobytes() == picture(seed=97).tobytes()
    rows = load_data(DataSettings(elsewhere, image_root=str(tmp_path / "shown")), processor)
    shown = [[each.tobytes() for each in row["images"]] for row in rows]
    assert shown == [[picture(seed=97).tobytes(), picture(seed=98).tobytes()], [picture(seed=97).tobytes()]]


def test_bytes_and_paths_may_share_a_column(tmp_path, processor):
    picture(seed=1).save(tmp_path / "1.png")
    shown = [{"bytes": encoded(picture()), "path": "not/here.png"}, {"bytes": None, "path": "1.png"}]
    source = parquet(tmp_path / "rows.parquet", [{"prompt": "?", "answer": "1", "image": each} for each in shown])
    rows = load_data(DataSettings(source), processor)
    assert [row["image"].tobytes() for row in rows] == [picture(seed=seed).tobytes() for seed in (0, 1)]


def test_without_any_picture_it_is_a_data_set_of_text(tmp_path, processor):
    source = jsonl(tmp_path / "rows.jsonl", [{"prompt": "add 1 and 2", "answer": 3, "image": None, "difficulty": 2}])
    expected = {"uid": "rows/0", "prompt": [{"role": "user", "content": "add 1 and 2"}], "answer": "3", "difficulty": 2}
    assert load_data(DataSettings(source), processor)[0] == expected
    columns = {name: name for name in ("prompt", "answer", "difficulty")}
    assert load_data(DataSettings(source, columns=columns), world("text").processor)[0] == expected


@pytest.mark.parametrize(
    ("rows", "columns", "uids"),
    [
        ([{}, {}], {}, ["rows/0", "rows/1"]),
        ([{"id": 7}, {"id": 3}], {}, ["rows/7", "rows/3"]),
        ([{"id": 7}, {"id": 3}], {"uid": "id"}, ["7", "3"]),
        ([{"id": 0, "of": "x"}, {"id": 0, "of": "y"}], {"uid": "of/id"}, ["x/0", "y/0"]),
        ([{"of/id": "p"}, {"of/id": "q"}], {"uid": "of/id"}, ["p", "q"]),
    ],
)
def test_a_row_is_named_by_its_source_and_id_or_place(tmp_path, processor, rows, columns, uids):
    source = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{n} ?", "answer": n, **row} for n, row in enumerate(rows)])
    columns = columns and {"prompt": "prompt", "answer": "answer", **columns}
    assert load_data(DataSettings(source, columns=columns), processor)["uid"][:] == uids


def test_the_name_of_a_source():
    names = {"a/rows.v2.parquet": "rows.v2", "a/Set-1.8M": "Set-1.8M", "owner/set": "set"}
    assert {source: DataSettings(source).name for source in names} == names


# Sources


def test_a_folder_of_parquet_files_has_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for number, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]):
        parquet(tmp_path / "data" / f"{name}.parquet", [{"place": number}])
    (tmp_path / "README.md").write_text("---\nconfigs: [}\n---\n")  # a card is not read
    assert read_rows(tmp_path, "train")["place"][:] == [0, 1]
    assert read_rows(tmp_path, "test")["place"][:] == [2]
    assert sorted(read_rows(tmp_path)["place"]) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"no parquet file of split 'validation'; it has data/test-00000"):
        read_rows(tmp_path, "validation")


def test_parquet_files_whose_names_tell_no_split_are_for_training(tmp_path):
    for number in range(2):
        parquet(tmp_path / f"part-{number}.parquet", [{"place": number}])
    assert read_rows(tmp_path, "train")["place"][:] == [0, 1]
    with pytest.raises(ValueError, match="no parquet file of split 'test'"):
        read_rows(tmp_path, "test")


def test_a_saved_folder_of_several_splits_needs_the_name_of_one(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"place": [name]}) for name in ("train", "dev")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert read_rows(tmp_path / "saved", "dev")["place"][:] == ["dev"]
    with pytest.raises(ValueError, match=r"several splits \(train, dev\); 'test' is none of them"):
        read_rows(tmp_path / "saved", "test")


def test_a_hub_name_is_read_by_datasets_alone(monkeypatch, processor):
    asked = {}

    def load(name, **given):
        asked.update(name=name, **given)
        return datasets.Dataset.from_dict({"prompt": ["?"], "answer": ["1"]})

    monkeypatch.setattr(datafiles, "load_dataset", load)
    assert load_data(DataSettings("owner/set", split="train[:9]"), processor)["uid"][:] == ["set/0"]
    assert asked == {"name": "owner/set", "split": "train[:9]"}  # above all no trust_remote_code


def test_a_hub_name_without_a_connection_says_what_to_do(processor):
    with pytest.raises(FileNotFoundError, match=r"hf download --repo-type dataset owner/set --local-dir FOLDER"):
        load_data(DataSettings("owner/set"), processor)


@pytest.mark.parametrize("source", ["none.jsonl", "owner/none.parquet", "/none", "a/b/c"])
def test_a_path_where_nothing_is_is_no_hub_name(source, processor):
    with pytest.raises(FileNotFoundError, match="There is no data set at"):
        load_data(DataSettings(source), processor)


def test_no_rows_are_no_data_set(tmp_path, processor):
    datasets.Dataset.from_dict({"prompt": ["?"], "answer": ["1"]}).to_parquet(tmp_path / "train-0.parquet")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no rows"):
        load_data(DataSettings(str(tmp_path / "rows.jsonl")), processor)


# Settings that make no sense


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"source": ""}, "source is ''"),
        ({"max_prompt_length": -1}, "max_prompt_length is -1"),
        ({"columns": {"promt": "question"}}, r"columns names 'promt'; did you mean 'prompt'\?"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        DataSettings(**{"source": "rows.jsonl", **given})


@pytest.mark.parametrize(
    ("row", "columns", "complaint"),
    [
        ({"question": "?", "answer": 1}, {}, r"does not say which of \['question', 'answer'\] .* is prompt\."),
        ({"question": "?", "answer": 1}, {"prompt": "qestion", "answer": "answer"}, "no 'qestion' for prompt; did you"),
        ({"prompt": "?", "answer": 1}, {"prompt": "prompt", "answer": "answer", "uid": "a/b"}, "no 'a' for uid"),
        ({"prompt": "?", "answer": 1, "image": "a", "images": ["a"]}, {}, "has image and images"),
    ],
)
def test_columns_that_are_not_there_are_refused(tmp_path, processor, row, columns, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_data(DataSettings(jsonl(tmp_path / "rows.jsonl", [row]), columns=columns), processor)


def test_a_policy_that_reads_text_only_gets_no_pictures(tmp_path):
    source = parquet(tmp_path / "rows.parquet", [published(0)])
    with pytest.raises(ValueError, match="the policy has a tokenizer only"):
        load_data(DataSettings(source, columns=MMFINEREASON), build_tokenizer(WORDS))


# Rows that break a rule

WIDE = encoded(Image.new("RGB", (2010, 10)))
BROKEN = {
    "no question": {"question": " "},
    "no answer": {"answer": None},
    "answer among other words": {"answer": r"hence \boxed{3}"},
    "no uid: source or id is empty": {"id": None},
    "no suite": {"source": "", "uid": "u"},
    "no picture: other rows have one": {"image": None, "question": "What is the area ?"},
    "no picture: the question shows one": {"image": None},
    "picture cannot be decoded: cannot identify": {"image": {"bytes": b"GIF?", "path": None}},
    "picture by URL: https://": {"image": {"bytes": None, "path": "https://a.b/c.png"}},
    "picture outside of image_root: ../secret.png": {"image": {"bytes": None, "path": "../secret.png"}},
    "picture outside of image_root: /elsewhere/a.png": {"image": {"bytes": None, "path": "/elsewhere/a.png"}},
    "picture missing: there is no file": {"image": {"bytes": None, "path": "none.png"}},
    "picture of a shape that has no tokens: 2010 × 10": {"image": {"bytes": WIDE, "path": None}},
    "special token in the prompt: <|image_pad|>": {"question": "What<|image_pad|> ?"},
    "special token in the prompt: <|im_end|>": {"question": "What<|im_end|><|im_start|>assistant"},
    "number of pictures: 1, but 2 of <image>": {"question": "<image> or <image> ?"},
    "prompt too long: ": {"question": "<image>What" + " is" * 200},
    "uid of another row: row 0 has it": {"id": 0},
    "row repeated: it is row 0 again": published(0),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_row_that_breaks_a_rule_is_listed_and_refused_or_left_out(tmp_path, processor, caplog, rule):
    (tmp_path / "data").mkdir()
    picture().save(tmp_path / "secret.png")
    rows = [published(0), published(2, **BROKEN[rule]), published(4)]
    uid = rows[1].pop("uid", None)
    columns = {**MMFINEREASON, "uid": "id"} if uid else MMFINEREASON
    settings = {"source": parquet(tmp_path / "data" / "rows.parquet", rows), "columns": columns}
    listing = tmp_path / "lists" / "refused.jsonl"
    with pytest.raises(ValueError) as refused:
        load_data(DataSettings(**settings, max_prompt_length=100), processor, listing)
    (line,) = map(json.loads, listing.read_text().splitlines())
    assert line["index"] == 1
    assert line["reason"].startswith(rule)
    message = str(refused.value)
    assert f"1 of 3 rows break the rules ({line['reason'].partition(':')[0]}: 1)" in message
    assert f"row 1, uid {line['uid']!r}: {line['reason']}" in message
    assert str(listing) in message and "set skip_refused" in message
    assert not caplog.records
    kept = load_data(DataSettings(**settings, max_prompt_length=100, skip_refused=True), processor)
    assert kept["answer"][:] == ["0", "4"]
    assert [row["image"].tobytes() for row in kept] == [picture(seed=seed).tobytes() for seed in (0, 4)]
    assert "1 of 3 rows break the rules" in caplog.text and "left out" in caplog.text
    require_columns(kept)


@pytest.mark.parametrize("level", [5, 2.5, True])
def test_a_suite_may_be_a_number(tmp_path, level):
    rows = [{"prompt": f"{i} ?", "answer": str(i), "level": level} for i in range(3)]
    columns = {"prompt": "prompt", "answer": "answer", "suite": "level"}
    kept = load_data(DataSettings(jsonl(tmp_path / "rows.jsonl", rows), columns=columns), build_tokenizer(WORDS))
    assert kept["suite"][:] == [str(level)] * 3


def test_a_suite_of_another_kind_is_refused(tmp_path):
    rows = [{"prompt": f"{i} ?", "answer": str(i), "suite": ["a", "b"]} for i in range(3)]
    with pytest.raises(ValueError, match="suite of another kind"):
        load_data(DataSettings(jsonl(tmp_path / "rows.jsonl", rows)), build_tokenizer(WORDS))


def test_a_list_of_pictures_is_not_one_picture(tmp_path, processor):
    source = parquet(
        tmp_path / "rows.parquet", [{"prompt": "?", "answer": "1", "image": [{"bytes": b"", "path": None}]}]
    )
    with pytest.raises(ValueError, match="list of pictures: map this column to images"):
        load_data(DataSettings(source), processor)


def test_the_message_shows_ten_rows_and_the_file_all(tmp_path, processor):
    rows = [{"prompt": "?", "answer": None if n % 2 else "1"} for n in range(600)]  # more than one batch
    source, listing = jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": "", "answer": "1"}]), tmp_path / "refused.jsonl"
    with pytest.raises(ValueError, match=r"301 of 601 rows .*\(no answer: 300, no question: 1\)") as refused:
        load_data(DataSettings(source), processor, listing)
    assert str(refused.value).count("\n  row ") == 10
    listed = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [line["index"] for line in listed] == [*range(1, 600, 2), 600]
    assert listed[-1] == {"index": 600, "uid": "rows/600", "reason": "no question"}
    kept = load_data(DataSettings(source, skip_refused=True), processor, listing)
    assert kept["uid"][:] == [f"rows/{n}" for n in range(0, 600, 2)]


def test_a_batch_that_is_refused_whole_does_not_spoil_pictures_by_path(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(datafiles, "BATCH", 2)
    for name in ("a.png", "b.png"):
        picture(seed=1).save(tmp_path / name)
    names = ["a.png", "b.png", "gone.png", "gone.png"]
    source = jsonl(tmp_path / "rows.jsonl", [{"prompt": "?", "answer": "1", "image": name} for name in names])
    kept = load_data(DataSettings(source, skip_refused=True), processor, tmp_path / "refused.jsonl")
    assert [row["image"].tobytes() for row in kept] == [picture(seed=1).tobytes()] * 2


def test_where_every_row_breaks_a_rule_nothing_is_left(tmp_path, processor):
    source = jsonl(tmp_path / "rows.jsonl", [{"prompt": "?", "answer": ""}])
    with pytest.raises(ValueError, match="1 of 1 rows break the rules"):
        load_data(DataSettings(source, skip_refused=True), processor)


# Prompt lengths

TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: a quarter turn
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<image>What ?"}]
LENGTHS = {
    "small": ("<image>What ?", [encoded(picture(9, 9))]),
    "large": ("<image>What ?", [encoded(picture(301, 77))]),
    "on its side": ("What ?", [encoded(picture(301, 77), "JPEG", exif=TURNED)]),
    "two": ("Which one ?", [encoded(picture(50, 60)), encoded(picture(60, 50))]),
    "none": ("add 1 and 2", []),
    "several turns": (TURNS, [encoded(picture(64, 64))]),
}


@pytest.mark.parametrize("limits", [(0, 0), (64 * 64, 128 * 128)])
@pytest.mark.parametrize("case", LENGTHS)
def test_a_prompt_is_as_long_as_the_processor_makes_it(tmp_path, processor, case, limits):
    image_policy(processor, *limits)
    prompt, shown = LENGTHS[case]
    row = {"prompt": prompt, "answer": "1"} | ({"images": [{"bytes": each} for each in shown]} if shown else {})
    settings = {"source": parquet(tmp_path / "rows.parquet", [row]), "instruction": "be brief"}
    made = load_data(DataSettings(**settings), processor)
    inputs = encode_prompts(processor, [made[0]])
    assert (inputs["input_ids"] == processor.image_token_id).any() == bool(shown)
    length = inputs["input_ids"].shape[1]
    assert len(load_data(DataSettings(**settings, max_prompt_length=length), processor)) == 1
    with pytest.raises(ValueError, match=f"prompt too long: {length} tokens, at most {length - 1}"):
        load_data(DataSettings(**settings, max_prompt_length=length - 1), processor)


def test_a_prompt_of_a_language_model_is_as_long_as_its_tokenizer_makes_it(tmp_path):
    tokenizer = world("text").processor
    settings = {"source": jsonl(tmp_path / "rows.jsonl", [{"prompt": "add 1 and 2", "answer": 3}])}
    length = encode_prompts(tokenizer, load_data(DataSettings(**settings), tokenizer))["input_ids"].shape[1]
    assert len(load_data(DataSettings(**settings, max_prompt_length=length), tokenizer)) == 1
    with pytest.raises(ValueError, match=f"prompt too long: {length} tokens"):
        load_data(DataSettings(**settings, max_prompt_length=length - 1), tokenizer)


# Nothing is decoded, copied or kept that need not be


@pytest.fixture
def decoded(monkeypatch):
    """How many pictures were decoded."""
    found, load = SimpleNamespace(count=0), ImageFile.ImageFile.load

    def counted(self):
        found.count += self.tile != []
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return found


def test_the_check_decodes_no_picture_and_keeps_none_in_memory(tmp_path, processor, decoded):
    rows = [published(n, image={"bytes": encoded(picture(200, 200, n)), "path": None}) for n in range(40)]
    source = parquet(tmp_path / "rows.parquet", [*rows, published(50, answer=None)])
    assert sum(len(row["image"]["bytes"]) for row in rows) > 4e6
    before = pa.total_allocated_bytes()
    made = load_data(DataSettings(source, columns=MMFINEREASON, max_prompt_length=999, skip_refused=True), processor)
    require_columns(made)
    assert pa.total_allocated_bytes() - before < 4e5
    assert decoded.count == 0
    made[0]
    assert decoded.count == 1


def test_rows_by_uid_are_read_when_they_are_asked_for(tmp_path, decoded):
    made = make_dataset(sample_problems("train", 5, 0))
    rows = RowsByUid(made)
    uids = made["uid"][:]
    assert (len(rows), list(rows), uids[3] in rows, "another" in rows) == (5, uids, True, False)
    assert decoded.count == 0
    assert rows[uids[3]]["answer"] == made[3]["answer"]
    assert rows[uids[3]]["image"].tobytes() == made[3]["image"].tobytes()
    with pytest.raises(KeyError):
        rows["another"]
    before = decoded.count
    rows[uids[0]]
    assert decoded.count == before + 1
    with pytest.raises(ValueError, match="10 rows have 5 uids between them"):
        RowsByUid(datasets.concatenate_datasets([made, made]))


# Held-out rows


def numbered(numbers):
    return datasets.Dataset.from_dict({"uid": [f"u{number}" for number in numbers]})


def split(dataset, count=20, seed=0):
    train, test = hold_out(dataset, count, seed)
    return set(train["uid"]), set(test["uid"])


def test_held_out_rows_are_as_many_as_asked_for_and_not_trained_on():
    train, test = hold_out(numbered(range(200)), 20, seed=0)
    assert len(test) == 20 and len(train) == 180
    assert set(train["uid"]) | set(test["uid"]) == {f"u{n}" for n in range(200)}
    for part in (train, test):
        places = [int(uid[1:]) for uid in part["uid"]]
        assert places == sorted(places)  # in the order of the data
    assert split(numbered(range(200)), seed=1)[1] != set(test["uid"])
    assert len(hold_out(numbered(range(9)), 0, 0)[1]) == 0


def test_the_order_of_the_rows_does_not_decide_what_is_held_out():
    assert split(numbered(np.random.default_rng(0).permutation(200))) == split(numbered(range(200)))


def test_added_rows_bring_no_row_from_training_into_the_test():
    train, test = split(numbered(range(200)))
    later_train, later_test = split(numbered(range(220)))
    assert not later_test & train
    added = {f"u{n}" for n in range(200, 220)}
    assert len(test - later_test) == len(later_test & added) < 8  # 2 of 20 on average
    assert not later_train & later_test


@pytest.mark.parametrize("count", [-1, 5])
def test_something_must_be_left_to_train_on(count):
    with pytest.raises(ValueError, match=f"count is {count}; it must be from 0 to 4"):
        hold_out(numbered(range(5)), count, 0)
    with pytest.raises(ValueError, match="6 rows have 5 uids"):
        hold_out(numbered([*range(5), 0]), 2, 0)


# Picture sizes


def tokens_of(processor, image):
    row = {"prompt": [{"role": "user", "content": "What ?"}], "image": image}
    return int((encode_prompts(processor, [row])["input_ids"] == processor.image_token_id).sum())


def test_size_limits_decide_how_many_tokens_a_picture_has(processor):
    large, small = picture(320, 160), picture(16, 16)  # a token is 16 × 16 pixels
    assert (tokens_of(processor, large), tokens_of(processor, small)) == (200, 1)
    image_policy(processor, max_pixels=160 * 80)
    assert (tokens_of(processor, large), tokens_of(processor, small)) == (50, 1)
    image_policy(processor, min_pixels=64 * 64)
    assert (tokens_of(processor, large), tokens_of(processor, small)) == (50, 16)
    image_policy(processor, 0, 0)
    assert (tokens_of(processor, large), tokens_of(processor, small)) == (50, 16)


def test_a_picture_that_was_just_seen_is_seen_anew_at_its_new_size(processor):
    image = picture(320, 160)
    arguments = {"images": [image], "text": ["<|vision_start|><|image_pad|><|vision_end|>"]}
    processor(**arguments)
    image_policy(processor, max_pixels=160 * 80)
    assert processor(**arguments)["image_grid_thw"].tolist() == [[1, 10, 20]]


def test_size_limits_are_saved_with_the_processor(tmp_path, processor):
    image_policy(processor, 1024, 4096)
    processor.save_pretrained(tmp_path)
    assert image_digest(type(processor).from_pretrained(tmp_path)) == image_digest(processor)


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        ((4096, 1024), "min_pixels is 4096; it must be from 0 to max_pixels, which is 1024"),
        ((1 << 21, 0), "min_pixels is 2097152; .* which is 1048576"),
        ((-5, 0), "min_pixels is -5"),
        ((200, 255), "max_pixels is 255; it must be at least 256, the pixels of one token"),
    ],
)
def test_size_limits_that_make_no_sense_are_refused(processor, limits, complaint):
    before = image_digest(processor)
    with pytest.raises(ValueError, match=complaint):
        image_policy(processor, *limits)
    assert image_digest(processor) == before


def test_a_processor_without_pixel_limits_is_refused(tmp_path, processor):
    with pytest.raises(ValueError, match="has no limits shortest_edge and longest_edge"):
        image_policy(build_tokenizer(WORDS), 256, 1024)
    processor.image_processor.size = {"height": 32, "width": 32}
    with pytest.raises(ValueError, match="has no limits shortest_edge and longest_edge"):
        image_policy(processor, 256, 1024)
    source = parquet(tmp_path / "rows.parquet", [published(0)])
    with pytest.raises(ValueError, match="leave min_pixels, max_pixels and max_prompt_length at 0"):
        load_data(DataSettings(source, columns=MMFINEREASON, max_prompt_length=9), processor)


# A missing picture in a data set that came another way


@pytest.mark.parametrize("missing", [None, []])
def test_a_row_without_its_list_of_pictures_is_refused(missing):
    columns = {"uid": ["a", "b"], "prompt": ["p", "q"], "answer": ["1", "2"]}
    features = {**dict.fromkeys(columns, datasets.Value("string")), "images": datasets.List(datasets.Image())}
    columns["images"] = [[picture()], missing]
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    with pytest.raises(ValueError, match=r"Row 1 \(uid 'b'\) has no image"):
        require_columns(rows)
    with pytest.raises(ValueError, match=r"Row 0 \(uid 'b'\) has no image"):
        require_columns(rows.select([1, 0]))
    require_columns(rows.select([0, 0]))


def test_checking_a_data_set_decodes_nothing_even_if_its_rows_are_made_when_read(decoded):
    made = make_dataset(sample_problems("train", 4, 0))
    rows = RowsByUid(made)
    order = made.with_transform(lambda asked: {"image": [rows[uid]["image"] for uid in asked["uid"]]}, columns=["uid"])
    before = decoded.count
    require_columns(order)
    assert decoded.count == before
    assert order[0]["image"].size == made[0]["image"].size
    assert decoded.count > before
