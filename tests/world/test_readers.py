"""One reader: whatever a file is like, training and signal get the same rows with the values that stand in it."""

import base64
import bz2
import gzip
import io
import json
import lzma
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from worlds import world

from npo_core.stages.signal import load_rows
from npo_core.trainer.inputs import encode_prompts
from npo_core.world.data import DataSettings, load_data, read_rows

TEXT = {"uid": "a", "prompt": "add 1 and 2", "answer": "3"}


pytestmark = pytest.mark.usefixtures("own_cache")


def png(seed=0, size=(40, 24)):
    stream = io.BytesIO()
    drawn(seed, size).save(stream, "PNG")
    return stream.getvalue()


def drawn(seed=0, size=(40, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def both(path, processor, **settings):
    """The rows for training and for signal, or the two refusals; of the latter, the columns of ours."""
    found = []
    for read in (
        lambda: load_data(DataSettings(str(path), **settings), processor),
        lambda: load_rows(DataSettings(str(path), **settings), processor),
    ):
        try:
            rows = read()
            ours = [name for name in ("uid", "prompt", "answer", "image", "images") if name in rows.column_names]
            found.append(list(rows.select_columns(ours)))
        except ValueError as error:
            found.append(str(error))
    return found


def user(text):
    return [{"role": "user", "content": text}]


MIXED = {
    "answers": ([3, "B", "x, y", 2.5], ["3", "B", "x, y", "2.5"]),
    "answers and lists": ([["3"], "B", 4, "5"], ["3", "B", "4", "5"]),
    "booleans": ([True, "B", 4, "5"], ["True", "B", "4", "5"]),
}


@pytest.mark.parametrize("case", MIXED)
def test_answers_of_several_kinds_are_what_stands_in_the_file(tmp_path, case):
    given, wanted = MIXED[case]
    rows = [{"uid": str(n), "prompt": "add 1 and 2", "answer": answer} for n, answer in enumerate(given)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    training, signal = both(path, world("text").processor)
    assert training == signal
    assert [row["answer"] for row in training] == wanted


PROMPTS = {
    "text and messages": ["add 1 and 2", user("add 1 and 2")],
    "text and parts": [user("add 1 and 2"), user([{"type": "text", "text": "add 1 and 2"}])],
    "parts of one kind": [user([{"type": "text", "text": "add 1 and 2"}])] * 2,
    "content that is missing": [[{"role": "system", "content": None}, *user("add 1 and 2")], user("add 1 and 2")],
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_of_several_kinds_are_chat_messages(tmp_path, case, kind):
    rows = [{"uid": str(n), "prompt": prompt, "answer": "3"} for n, prompt in enumerate(PROMPTS[case])]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        read_rows(tmp_path / "rows.jsonl").to_parquet(path)
    training, signal = both(path, world("text").processor)
    assert training == signal
    assert [row["prompt"][-1] for row in training] == user("add 1 and 2") * 2


def test_uids_of_several_kinds_are_text(tmp_path):
    rows = [{**TEXT, "uid": uid} for uid in (1, "b", 3)]
    training, signal = both(jsonl(tmp_path / "rows.jsonl", rows), world("text").processor)
    assert training == signal and [row["uid"] for row in training] == ["1", "b", "3"]
    for wrong in ([1], {"a": 1}, 2.5):
        path = jsonl(tmp_path / "wrong.jsonl", [{**TEXT, "uid": wrong}])
        training, signal = both(path, world("text").processor)
        assert training == signal and "uid of another kind" in training


def test_a_reference_in_a_box_is_unwrapped_and_one_among_words_refused(tmp_path):
    rows = [{**TEXT, "uid": "b", "answer": r"\boxed{3}"}, {**TEXT, "answer": r" $\boxed{4}$. "}]
    training, signal = both(jsonl(tmp_path / "rows.jsonl", rows), world("text").processor)
    assert training == signal and [row["answer"] for row in training] == ["3", "4"]
    rows = [TEXT, {**TEXT, "uid": "b", "answer": r"so \boxed{3}"}, {**TEXT, "uid": "c", "answer": None}]
    training, signal = both(jsonl(tmp_path / "rows.jsonl", rows), world("text").processor)
    assert training == signal
    assert "2 of 3 rows" in training and "answer among other words" in training and "no answer" in training


def test_a_column_inside_of_another_is_named_with_a_dot(tmp_path):
    rows = [
        {"prompt": user("add 1 and 2"), "reward_model": {"ground_truth": truth, "style": "rule"}, "extra": {"index": n}}
        for n, truth in enumerate(["3", 4])
    ]
    columns = {"prompt": "prompt", "answer": "reward_model.ground_truth", "uid": "extra.index"}
    training, signal = both(jsonl(tmp_path / "rows.jsonl", rows), world("text").processor, columns=columns)
    assert training == signal
    assert [(row["uid"], row["answer"]) for row in training] == [("0", "3"), ("1", "4")]
    wrong = {**columns, "answer": "reward_model.truth"}
    training, _ = both(tmp_path / "rows.jsonl", world("text").processor, columns=wrong)
    assert "2 of 2 rows break the rules (no answer: 2)" in training


def test_numbers_of_single_precision_are_as_they_were_written(tmp_path):
    table = pa.table({"uid": ["a"], "prompt": ["add 1 and 2"], "answer": pa.array([0.1], pa.float32())})
    pq.write_table(table, tmp_path / "rows.parquet")
    training, signal = both(tmp_path / "rows.parquet", world("text").processor)
    assert training == signal and training[0]["answer"] == "0.1"


# Files


def test_a_table_of_text_is_read_as_it_is_written(tmp_path):
    for name, between in (("rows.csv", ","), ("rows.tsv", "\t")):
        lines = [
            ["uid", "prompt", "answer"],
            ["1", '"add 1, 2"', "None"],
            ["2", "add 1 and 2", "NA"],
            ["3", "add", "3"],
        ]
        (tmp_path / name).write_text("".join(between.join(line) + "\n" for line in lines), encoding="utf-8-sig")
        training, signal = both(tmp_path / name, world("text").processor)
        assert training == signal
        assert [(row["uid"], row["answer"]) for row in training] == [("1", "None"), ("2", "NA"), ("3", "3")]
        assert training[0]["prompt"] == user("add 1, 2")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_compressed_file_is_read_and_named_without_its_suffixes(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"rows.v2.jsonl{suffix}"
    path.write_bytes(pack(json.dumps({"prompt": "add 1 and 2", "answer": 3}).encode()))
    training, signal = both(path, world("text").processor)
    assert training == signal and training[0]["uid"] == "rows.v2/0"


WAYS = {
    "byte order mark": ("utf-8-sig", '{"uid": "a", "prompt": "add 1 and 2", "answer": "3"}\n'),
    "carriage returns": ("utf-8", '{"uid": "a", "prompt": "add 1 and 2", "answer": "3"}\r\n'),
    "empty lines": ("utf-8", '\n{"uid": "a", "prompt": "add 1 and 2", "answer": "3"}\n\n'),
    "one array": ("utf-8", '[\n {"uid": "a",\n "prompt": "add 1 and 2", "answer": "3"}\n]\n'),
    "no end of line": ("utf-8", '{"uid": "a", "prompt": "add 1 and 2", "answer": "3"}'),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_json(tmp_path, way):
    encoding, text = WAYS[way]
    (tmp_path / "rows.json").write_bytes(text.encode(encoding))
    training, signal = both(tmp_path / "rows.json", world("text").processor)
    assert training == signal == [{**TEXT, "prompt": user("add 1 and 2")}]


@pytest.mark.parametrize(
    "name",
    ["a [1].jsonl", "a*.jsonl", "wh?t.jsonl", "train=1.jsonl", "Δ ü.jsonl", "a#b%20.jsonl", "test.jsonl", ".a.jsonl"],
)
def test_a_name_is_no_pattern(tmp_path, name):
    place = tmp_path / "lr=1e-4 [x]" / "checkpoint-7"
    place.mkdir(parents=True)
    for other in ("a1.jsonl", "a 1.jsonl", "what.jsonl"):
        jsonl(place / other, [{**TEXT, "uid": "wrong"}] * 2)
    training, signal = both(jsonl(place / name, [TEXT]), world("text").processor)
    assert training == signal and [row["uid"] for row in training] == ["a"]
    pd.DataFrame([TEXT]).to_parquet(place / "rows.parquet")
    assert read_rows(place)["uid"][:] == ["a"]


def test_a_name_that_stands_for_a_chain_of_archives_is_refused(tmp_path):
    for answer in both(jsonl(tmp_path / "a::b.jsonl", [TEXT]), world("text").processor):
        assert "'::' in its name or place" in answer


def test_lines_that_are_no_rows_are_refused_alike(tmp_path):
    for text in ("3\n", '{"uid": "a"', "not json\n", '"text"\n'):
        (tmp_path / "rows.jsonl").write_text(text)
        training, signal = both(tmp_path / "rows.jsonl", world("text").processor)
        assert training == signal and "rows.jsonl" in training and "\n" not in training


# Pictures

CHART = "chart : add the bars to 0"


def test_pictures_are_sought_in_the_same_places(tmp_path):
    processor = world("pictures").processor
    (tmp_path / "p.png").write_bytes(png())
    inline = "data:image/png;base64," + base64.b64encode(png()).decode()
    ways = {
        "beside the file": {"image": "p.png"},
        "full path": {"image": str(tmp_path / "p.png")},
        "a list": {"images": ["p.png"]},
        "as datasets has it": {"image": {"path": "p.png", "bytes": None}},
        "in the text": {"image": inline},
    }
    for way, shown in ways.items():
        for prompt in (
            f"<image>{CHART}",
            user(f"<image> {CHART}"),
            user([{"type": "image"}, {"type": "text", "text": CHART}]),
        ):
            row = {"uid": "a", "prompt": prompt, "answer": "3", **shown}
            training, signal = both(jsonl(tmp_path / "rows.jsonl", [row]), processor)
            assert len(training) == len(signal) == 1, (way, training)
            for rows in (training, signal):
                assert rows[0]["prompt"] == user(CHART)
                [given] = rows[0].get("images") or [rows[0]["image"]]
                assert given.tobytes() == drawn().tobytes(), way
                assert (encode_prompts(processor, rows)["input_ids"] == processor.image_token_id).any()


def test_some_rows_with_one_picture_and_some_with_a_list(tmp_path):
    (tmp_path / "p.png").write_bytes(png())
    rows = [
        {"uid": str(n), "prompt": CHART, "answer": "3", "images": given} for n, given in enumerate(["p.png", ["p.png"]])
    ]
    training, signal = both(jsonl(tmp_path / "rows.jsonl", rows), world("pictures").processor)
    assert [[each.tobytes() for each in row["images"]] for row in training] == [[drawn().tobytes()]] * 2
    assert len(signal) == 2


def test_a_verifier_of_ones_own_gets_all_columns_decoded(tmp_path):
    rows = [{"uid": str(n), "prompt": "add", "tests": tests, "answer": [1, 2]} for n, tests in enumerate(["x", [1], 3])]
    made = load_rows(jsonl(tmp_path / "rows.jsonl", rows), world("text").processor, answer=False)
    assert [(row["tests"], row["answer"]) for row in made] == [("x", [1, 2]), ([1], [1, 2]), (3, [1, 2])]


# What is wrong with a picture is said before the first step, with and without a limit


def bomb(side=60_000):
    """A PNG whose header promises more than can be held."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + png()[33:]


def cut_off(kind, **options):
    stream = io.BytesIO()
    drawn(size=(90, 60)).save(stream, kind, **options)
    return stream.getvalue()[:-200]


FAULTY = {
    "wide strip": (png(size=(2010, 10)), "picture of a shape that has no tokens: 2010 × 10"),
    "tall strip": (png(size=(4, 1000)), "picture of a shape that has no tokens: 4 × 1000"),
    "one pixel wide": (png(size=(1, 300)), "picture of a shape that has no tokens"),
    "cut-off PNG": (cut_off("PNG"), "picture cannot be decoded"),
    "cut-off JPEG": (cut_off("JPEG"), "picture cannot be decoded"),
    "cut-off WebP": (cut_off("WEBP", lossless=True), "picture cannot be decoded"),
    "cut-off TIFF": (cut_off("TIFF"), "picture cannot be decoded"),
    "empty": (b"", "picture cannot be decoded"),
    "no picture": (b"<svg></svg>", "picture cannot be decoded"),
    "a bomb": (bomb(), "picture cannot be decoded: Image size"),
}


@pytest.mark.parametrize("limit", [0, 400])
@pytest.mark.parametrize("case", FAULTY)
def test_a_picture_that_cannot_be_shown_is_refused_with_and_without_a_limit(tmp_path, case, limit):
    content, complaint = FAULTY[case]
    shown = [png(1), content]
    rows = [{"uid": str(n), "prompt": CHART, "answer": "3", "image": {"bytes": b}} for n, b in enumerate(shown)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    training, signal = both(tmp_path / "rows.parquet", world("pictures").processor, max_prompt_length=limit)
    assert training == signal
    assert f"row 1, uid '1': {complaint}" in training


def floats(kind):
    stream = io.BytesIO()
    Image.fromarray(np.float32([[0.5] * 8] * 8)).save(stream, kind)
    return stream.getvalue()


def test_other_kinds_of_pictures_are_taken(tmp_path):
    kinds = {mode: drawn().convert(mode) for mode in ("RGBA", "L", "LA", "1", "P")}
    encoded = {}
    for mode, image in kinds.items():
        stream = io.BytesIO()
        image.save(stream, "PNG")
        encoded[mode] = stream.getvalue()
    encoded["one pixel"] = png(size=(1, 1))
    encoded["appended"] = png() + b"more" * 100  # some programs write behind the end
    rows = [{"uid": name, "prompt": CHART, "answer": "3", "image": {"bytes": b}} for name, b in encoded.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    training, signal = both(tmp_path / "rows.parquet", world("pictures").processor)
    assert [row["uid"] for row in training] == [row["uid"] for row in signal] == list(encoded)
    assert encode_prompts(world("pictures").processor, training)["pixel_values"].isfinite().all()
    pq.write_table(pa.Table.from_pylist([{**rows[0], "image": {"bytes": floats("TIFF")}}]), tmp_path / "rows.parquet")
    training, signal = both(tmp_path / "rows.parquet", world("pictures").processor)
    assert training == signal and "have no agreed white" in training
