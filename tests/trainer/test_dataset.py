"""Data sets that can be trained on, and the order of their prompts."""

import io
import itertools
import math

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value, concatenate_datasets, load_dataset
from datasets import Image as Pictured
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from worlds import world

from npo_core.trainer.dataset import require_columns, training_schedule, with_uids
from npo_core.world.tasks import make_dataset, sample_problems


def numbered(count: int) -> Dataset:
    return Dataset.from_dict({"uid": [str(index) for index in range(count)]})


@given(count=st.integers(9, 40), steps=st.integers(1, 12), more=st.integers(0, 12), batch=st.integers(1, 9))
def test_a_longer_schedule_begins_with_the_shorter_one(count, steps, more, batch):
    rows = numbered(count)
    short = training_schedule(rows, steps, batch, seed=1)["uid"]
    long = training_schedule(rows, steps + more, batch, seed=1)["uid"]
    assert len(short) == steps * batch
    assert list(long)[: len(short)] == list(short)
    for start in range(0, len(long), batch):
        assert len(set(long[start : start + batch])) == batch, "a prompt twice in a step"


def test_a_step_of_more_prompts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="9 distinct prompts, but the data set has 8"):
        training_schedule(numbered(8), 1, 9, seed=0)


@given(count=st.integers(1, 40), passes=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_pass_over_the_data_holds_each_row_once(count, passes, seed):
    uids = list(training_schedule(numbered(count), passes * count, 1, seed)["uid"])
    for start in range(0, len(uids), count):
        assert sorted(uids[start : start + count], key=int) == [str(index) for index in range(count)]


def test_the_order_depends_on_the_seed_and_differs_from_pass_to_pass():
    rows = numbered(50)
    one, other = (list(training_schedule(rows, 10, 10, seed)["uid"]) for seed in (0, 1))
    assert one != other
    assert one[:50] != one[50:]
    assert one == list(training_schedule(rows, 10, 10, 0)["uid"])
    # rows g·b … g·b + b − 1 are step g, so the step alone finds the place, whatever the batch
    assert one == list(training_schedule(rows, 20, 5, 0)["uid"])


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"uid": ["a"], "prompt": ["p"]}, r"not \['answer'\]"),
        ({"question": ["p"]}, r"not \['uid', 'prompt', 'answer'\]"),
        ({"uid": ["a", ""], "prompt": ["p", "q"], "answer": ["1", "2"]}, "Row 1 has uid ''"),
        ({"uid": ["a", None], "prompt": ["p", "q"], "answer": ["1", "2"]}, "Row 1 has uid None"),
        ({"uid": [1], "prompt": ["p"], "answer": ["1"]}, "Row 0 has uid 1"),
        ({"uid": ["a"], "prompt": ["p"], "answer": [" "]}, "has answer ' '"),
        ({"uid": ["a"], "prompt": ["p"], "answer": [3]}, "has answer 3"),
        ({"uid": ["a"], "prompt": [""], "answer": ["1"]}, "Row 0 .* has no prompt"),
        ({"uid": ["a", "a"], "prompt": ["p", "p"], "answer": ["1", "2"]}, "Uid 'a' names two rows"),
        ({"uid": ["a", "a"], "prompt": ["p", "q"], "answer": ["1", "1"]}, "Uid 'a' names two rows"),
    ],
)
def test_rows_that_npo_cannot_use_are_refused(columns, complaint):
    with pytest.raises(ValueError, match=complaint):
        require_columns(Dataset.from_dict(columns))


def test_a_row_without_its_picture_is_refused():
    rows = list(make_dataset(sample_problems("train", 2, 0)))
    rows[1]["image"] = None
    with pytest.raises(ValueError, match=r"Row 1 .* has no image"):
        require_columns(Dataset.from_list(rows))


def test_the_same_row_at_several_steps_is_fine():
    rows = make_dataset(sample_problems("train", 4, 0))
    require_columns(training_schedule(rows, 3, 4, 0))


def test_one_uid_for_two_pictures_is_refused():
    """A guide that saw one of them would be placed for the other."""
    rows = make_dataset(sample_problems("train", 3, 0))
    same = {name: [rows[0][name]] * 2 for name in ("uid", "prompt", "answer")}
    two = Dataset.from_dict(
        {**same, "image": [rows[0]["image"], rows[1]["image"]]}, features=rows.select_columns([*same, "image"]).features
    )
    with pytest.raises(ValueError, match=f"Uid '{rows[0]['uid']}' names two rows with different pictures"):
        require_columns(two)
    with pytest.raises(ValueError, match="names two rows with different pictures"):
        require_columns(two.select([1, 0, 0]))
    require_columns(two.select([0, 0]))
    require_columns(concatenate_datasets([two.select([0]), two.select([0])]))


def test_the_answer_is_asked_for_on_behalf_of_our_verifier_only():
    """One of the user's own may read any column, and lists in it."""
    rows = {"uid": ["a", "b"], "prompt": ["p", "q"]}
    for answers in ({}, {"answer": [["1", "2"], []]}, {"answer": [3, 4]}):
        with pytest.raises(ValueError, match="answer"):
            require_columns(Dataset.from_dict({**rows, **answers}))
        assert require_columns(Dataset.from_dict({**rows, **answers}), answer=False) == {"a", "b"}
    with pytest.raises(ValueError, match="Uid 'a' names two rows"):
        twice = {"uid": ["a", "a"], "prompt": ["p", "p"], "answer": [1, 2]}
        require_columns(Dataset.from_dict(twice), answer=False)


def test_all_that_is_wrong_is_said_at_once_with_the_first_row_of_each_kind():
    rows = {
        "uid": ["a", "", "", "d", "d", "f"],
        "prompt": ["p", "p", "p", "", "q", "r"],
        "answer": ["1", "1", "1", "1", None, "$.$"],
    }
    with pytest.raises(ValueError) as refused:
        require_columns(Dataset.from_dict(rows))
    message = str(refused.value)
    assert message.count("\n  - ") == 4
    assert "Row 1 has uid ''; every row needs a non-empty string (and 1 more)" in message
    assert "Row 4 (uid 'd') has answer None" in message and "Row 3 (uid 'd') has no prompt" in message
    assert "Uid 'd' names two rows" in message


def test_values_are_those_that_are_read_and_not_those_that_are_stored(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"uid": "a", "prompt": "p", "answer": "3"}\n{"uid": 2, "prompt": "q", "answer": "4"}\n'
    )
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    assert rows[:]["uid"] == ["a", 2], "a column of mixed types"
    with pytest.raises(ValueError, match=r"Row 1 has uid 2;") as refused:
        require_columns(rows)
    assert "more)" not in str(refused.value)
    assert require_columns(rows.select([0])) == {"a"}


def encoded(picture: Image.Image, kind: str = "PNG") -> dict:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return {"bytes": stream.getvalue(), "path": None}


def test_pictures_that_no_step_could_show_are_refused_and_none_is_decoded(monkeypatch):
    processor = world("pictures").processor
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    good, cut = encoded(noise), {**encoded(noise), "bytes": encoded(noise)["bytes"][:-300]}
    faults = {
        "a shape that has no tokens: 2010 × 10": encoded(Image.new("RGB", (2010, 10))),
        "cannot be decoded": cut,
        "no agreed white": encoded(Image.fromarray(np.float32([[0.5] * 8] * 8)), "TIFF"),
        "No such file": {"bytes": None, "path": "not/here.png"},
    }
    for complaint, bad in faults.items():
        for column, kind, values in (
            ("image", Pictured(), [good, bad]),
            ("images", List(Pictured()), [[good], [good, bad]]),
        ):
            rows = Dataset.from_dict({"uid": ["a", "b"], "prompt": ["p", "q"], "answer": ["1", "2"], column: values})
            rows = training_schedule(rows.cast_column(column, kind), 3, 2, 0)
            with pytest.raises(ValueError, match=rf"\(uid 'b'\): .*{complaint}") as refused:
                require_columns(rows, processor=processor)
            assert "more)" not in str(refused.value), "a prompt is looked at once"
    whole = Dataset.from_dict({"uid": ["a"], "prompt": ["p"], "answer": ["1"], "image": [good]})
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("a picture was decoded"))
    assert require_columns(whole.cast_column("image", Pictured()), processor=processor) == {"a"}


def test_uids_are_made_where_there_are_none_and_numbers_are_written_as_text():
    rows = [{"prompt": text, "answer": "1"} for text in ("a", "b")]
    made = with_uids(Dataset.from_list(rows), "mine")
    assert made["uid"][:] == ["mine/0", "mine/1"]
    counted = Dataset.from_list([{**row, "uid": 10 * place} for place, row in enumerate(rows)])
    with pytest.raises(ValueError, match=r"npo_core.with_uids\(dataset\) writes numbers as text"):
        require_columns(counted)
    assert require_columns(with_uids(counted)) == {"0", "10"}
    with pytest.raises(ValueError, match=r"npo_core.with_uids\(dataset\) makes the first"):
        require_columns(Dataset.from_list(rows))
    assert require_columns(made) == {"mine/0", "mine/1"}


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (["a", None, ""], ["a", "row/1", "row/2"]),
        ([7, None, 9], ["7", "row/1", "9"]),
        ([7.0, math.nan, 0.5], ["7", "row/1", "0.5"]),  # a column of a table in which one number is missing
    ],
    ids=["texts", "numbers", "floats"],
)
def test_a_uid_that_is_missing_among_others_is_the_rows_place(given, made):
    rows = Dataset.from_dict({"uid": given, "prompt": ["p", "q", "r"]})
    assert with_uids(rows)["uid"][:] == made


def test_solutions_in_the_place_of_answers_are_refused_where_the_verifier_reads_them():
    rows = [{"uid": str(n), "prompt": "p", "answer": text} for n, text in enumerate(["3", "so\n#### 4", r"\boxed{5}"])]
    made = Dataset.from_list(rows)
    with pytest.raises(ValueError, match=r"Row 1 \(uid '1'\) has an answer, .* that holds ####.* \(and 1 more\)"):
        require_columns(made)
    assert require_columns(made, answer=False) == {"0", "1", "2"}


def test_a_stream_gets_its_uids_as_it_is_read():
    read = []

    def rows():
        for place in itertools.count():
            read.append(place)
            yield {"prompt": f"p{place}", "uid": 10 * place}

    known = Features({"prompt": Value("string"), "uid": Value("int64")})
    for features in (None, known):
        stream = with_uids(IterableDataset.from_generator(rows, features=features))
        assert not read
        assert [row["uid"] for row in itertools.islice(stream, 3)] == ["0", "10", "20"]
        read.clear()
    assert stream.features == Features({"prompt": Value("string"), "uid": Value("string")})
    nameless = IterableDataset.from_generator(lambda: iter([{"prompt": "p"}, {"prompt": "q"}]))
    assert [row["uid"] for row in with_uids(nameless, "mine")] == ["mine/0", "mine/1"]


def test_a_dictionary_of_splits_gets_no_uids():
    with pytest.raises(TypeError, match="one split; got a DatasetDict"):
        with_uids(DatasetDict(train=Dataset.from_dict({"prompt": ["p"]})))
