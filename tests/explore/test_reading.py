"""What the page is told of a run: clocks, groups, guides, probes; and what is refused."""

import base64
import gzip
import json
import re
import shutil

import pytest
from made_runs import HOSTILE, make_run

from npo_core.__main__ import main
from npo_core.explore.page import packed, page, within, write_page
from npo_core.explore.reading import read_run
from npo_core.files import write_json


def data_of(text: str) -> dict:
    (packed_,) = re.findall(r'<script type="application/gzip" id="data">([A-Za-z0-9+/=]+)</script>', text)
    return json.loads(gzip.decompress(base64.b64decode(packed_)))


def prompt(run, place):
    return run["prompts"][place]["uid"]


def test_lines_carry_both_clocks_and_the_groups_of_their_step(run):
    read = read_run(run)
    assert [(each["s"], each["c"], each["b"]) for each in read["lines"]] == [
        (1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 4, 0), (3, 5, 1), (4, 6, 1),
    ]  # fmt: skip
    assert [[prompt(read, p), rate] for p, rate in read["lines"][4]["g"]] == [["a", 0.0], ["b", 0.5]]
    assert read["finished"] and read["notes"] == [] and read["scores"] == {"base": 0.25, "final": 0.5}


def test_a_table_and_the_record_of_guides_are_steps_with_their_place_on_both_clocks(run):
    steps = {(step["s"], step["b"], step["whole"]): step for step in read_run(run)["steps"]}
    assert steps.keys() == {(1, 0, True), (3, 1, False), (4, 1, False)}
    assert steps[3, 1, False]["c"] == 5, "two steps after the roll-back to step 2 at compute step 4"
    (guided,) = steps[3, 1, False]["groups"]
    last = guided["slots"][-1]
    assert (last["guide"], last["lost"], last["lostOk"], last["pieces"]) == (
        4,
        "the lost rollout",
        False,
        ["five", " six", ""],
    )
    assert (last["q"], last["l"]) == ([-0.1, -0.2, -0.5], [-0.1, -1.2, -0.4])
    assert last["a"] == pytest.approx(1.5, abs=1e-3), "one right of four"
    read = read_run(run)
    ((refused, step, text),) = steps[4, 1, False]["refused"]
    assert (prompt(read, refused), step, text) == ("d", 4, "a wrong guide")


def test_prompts_are_told_by_whatever_file_knows_them(run):
    read = read_run(run)
    known = {record["uid"]: record for record in read["prompts"]}
    assert known["a"]["question"] == "Question of a?" and known["a"]["suite"] == "dice"
    assert known["a"]["picture"].startswith("data:image/png;base64,")
    assert "question" not in known["c"]
    ((cache),) = read["caches"]
    assert sorted((prompt(read, p), text, length) for p, text, length, _ in cache["guides"]) == [
        ("a", "the guide of a", 3), ("d", "the guide of d", 3),
    ]  # fmt: skip


def test_outcomes_of_a_probe_come_by_prompt(run):
    read = read_run(run)
    (probe,) = read["probes"]
    assert [(prompt(read, p), correct, failed) for p, correct, failed in probe["prompts"]] == [("a", 2, 3), ("d", 3, 4)]
    assert probe["candidates"][1] == {"distance": 4, "sums": [0.2, 0.22], "tokens": [1, 1]}


def test_a_run_that_is_being_written_is_shown_as_far_as_it_is(tmp_path):
    run = make_run(tmp_path / "half")
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    read = read_run(run)
    assert [each["c"] for each in read["lines"]] == [1, 2, 3, 4]
    assert [step["c"] for step in read["steps"]] == [1], "what belongs to steps past the log is left out"
    assert read["notes"] == ["Not finished: 4 of 6 steps so far."] and not read["finished"]
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).unlink()
    begun = read_run(run)
    assert begun["lines"] == [] and begun["steps"] == []
    assert begun["notes"] == ["Not finished: 0 of 6 steps so far."] and "0 compute steps" in page([begun])


def test_a_run_of_another_version_says_so(tmp_path):
    run = make_run(tmp_path / "later")
    write_json(run / "result.json", {"schema": 7})
    (note,) = read_run(run)["notes"]
    assert "schema 7" in note and "another version" in note


def test_missing_and_broken_pictures_and_caches_are_no_hindrance(tmp_path):
    run = make_run(tmp_path / "bare")
    shutil.rmtree(run / "guidance")
    (run / "guided" / "pictures" / "a.png").write_bytes(b"no picture")
    shutil.rmtree(run / "rollouts")
    read = read_run(run)
    assert {record["uid"]: record.get("picture") for record in read["prompts"]}["a"] == ""
    assert read["caches"][0]["guides"] == []


def test_a_file_name_in_a_log_leads_nowhere_outside_of_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "secret.png").write_bytes((run / "guided" / "pictures" / "a.png").read_bytes())
    events = (run / "events.jsonl").read_text().replace("guidance/00-00004.parquet", "../elsewhere.parquet")
    (run / "events.jsonl").write_text(events)
    shutil.copy(run / "guidance" / "00-00004.parquet", tmp_path / "elsewhere.parquet")
    record = (run / "guided" / "b01.jsonl").read_text().replace("a.png", "../../../secret.png")
    (run / "guided" / "b01.jsonl").write_text(record)
    shutil.rmtree(run / "rollouts")
    read = read_run(run)
    assert read["caches"][0]["guides"] == []
    assert "picture" not in read["prompts"][0]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: None, "is no folder, and no run of that name"),
        (lambda folder: folder.mkdir(), "is no run: neither config.json nor metrics.jsonl"),
        (lambda folder: make_run_below(folder), "It holds the runs inner; give one of them"),
        (lambda folder: with_file(folder, "metrics.jsonl", '{"step": 1}\n'), "has a line without branch"),
        (lambda folder: with_file(folder, "metrics.jsonl", "no\n{}\n"), "line 1 is not JSON"),
        (lambda folder: with_file(folder, "config.json", "{"), "is not JSON"),
        (lambda folder: with_file(folder, "config.json", "[]"), "holds a list, not the settings"),
        (lambda folder: with_table(folder, b"no parquet"), "step-00002-b00.parquet is"),
    ],
)
def test_what_is_no_run_ends_with_one_line(tmp_path, make, complaint, capsys):
    make(tmp_path / "it")
    assert main(["explore", str(tmp_path / "it")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("npo_core explore: ") and complaint in err and err.count("\n") == 1
    assert not (tmp_path / "it" / "explorer.html").exists()


def make_run_below(folder):
    folder.mkdir()
    make_run(folder / "inner")


def with_file(folder, name, content):
    folder.mkdir()
    (folder / name).write_text(content)


def with_table(folder, content):
    make_run(folder)
    (folder / "rollouts" / "step-00002-b00.parquet").write_bytes(content)


def test_trls_log_of_completions_is_read_as_groups(trl_run):
    read = read_run(trl_run)
    (step,) = read["steps"]
    assert [[slot["r"] for slot in group["slots"]] for group in step["groups"]] == [[1, 0, 0, 0], [1, 1, 0, 1]]
    assert step["groups"][0]["slots"][0]["t"] == f"I say 0. {HOSTILE}"
    assert [record["question"] for record in read["prompts"]] == ["How many? 0", "How many? 1"]
    assert (read["lines"][0]["r"], read["lines"][0]["e"]) == (0.5, 0.7)
    assert "accuracy + format" in read["notes"][0], "the column answer is text, so no reward"


def test_the_page_holds_no_markup_from_a_run_and_asks_for_nothing(run):
    text = page([read_run(run)])
    assert HOSTILE not in text and "onerror" not in text
    assert text.count("</script>") == 2
    shown = data_of(text)["runs"][0]
    assert any(slot["t"] == HOSTILE for step in shown["steps"] for g in step["groups"] for slot in g["slots"])
    assert not re.findall(r'(?:src|href)="?https?:', text) and "default-src 'none'" in text


def test_a_page_is_kept_within_its_limit_by_leaving_whole_tables_out_first(run):
    read = read_run(run)
    whole = within([read], 2.0)[0]
    assert whole["steps"] == sorted(read["steps"], key=lambda step: step["c"])
    assert whole["notes"] == [] and [p.get("picture") for p in whole["prompts"][:2]] == [
        p["picture"] for p in read["prompts"][:2]
    ]
    sizes = [len(packed(step)) / (2 if step["whole"] else 1) for step in read["steps"]]
    bare = [{name: value for name, value in prompt.items() if name != "picture"} for prompt in read["prompts"]]
    base = len(page([{**read, "steps": [], "prompts": bare}]))
    room = base + sum(sizes) + len(read["prompts"][0]["picture"]) + 10
    (small,) = within([read], room / 1e6)
    assert [step["whole"] for step in small["steps"]] == [False, False], "guided groups stay longest"
    assert ["picture" in prompt for prompt in small["prompts"][:2]] == [True, False]
    assert small["notes"][0].endswith("the rollouts of 1 recorded steps and the pictures of 1 prompts.")
    assert len(page([read], room / 1e6)) <= room + 200, "the note itself is not counted"
    (bald,) = within([read], (room - len(read["prompts"][0]["picture"])) / 1e6)
    assert len(bald["steps"]) == 2 and not any("picture" in prompt for prompt in bald["prompts"])


def test_several_runs_are_in_one_page_and_the_first_ones_folder_gets_it(run, trl_run, tmp_path):
    path, _ = write_page(run, trl_run)
    assert path == run / "explorer.html"
    assert [each["name"] for each in data_of(path.read_text())["runs"]] == [run.name, "my-grpo"]
    other, _ = write_page(run, out=tmp_path / "new" / "page.html")
    assert other.is_file() and sorted(p.name for p in other.parent.iterdir()) == ["page.html"]
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="limit_mb"):
            write_page(run, limit_mb=wrong)


def test_without_javascript_there_is_a_figure_and_a_sentence(run):
    text = page([read_run(run)])
    still = text[text.index("<main") : text.index("</main>")]
    assert "<polyline" in still and "6 compute steps, 1 roll-back, 1 guides" in still and "needs JavaScript" in still


def test_in_a_notebook_the_frame_carries_the_whole_page(run, capsys):
    import npo_core

    shown = npo_core.explore(run)
    assert str(run / "explorer.html") in capsys.readouterr().out
    frame = shown._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and 'sandbox="allow-scripts"' in frame
    inside = re.search(r'srcdoc="([^"]*)"', frame).group(1)
    assert "<" not in inside, "the page's own markup is escaped in the attribute"


def test_what_a_factory_of_ones_own_trained_with_goes_before_what_the_run_was_told(tmp_path):
    run = make_run(tmp_path / "mine")
    write_json(run / "config.json", {"num_generations": 8, "tau_gate": 0.6, "pool_cutoff": 0.125})
    write_json(run / "factory.json", {"num_generations": 10, "tau_gate": 1.0, "placement": "append"})
    assert read_run(run)["config"].items() >= {"num_generations": 10, "tau_gate": 1.0, "pool_cutoff": 0.125}.items()
    write_json(run / "factory.json", {"num_generations": 10, "placement": "append", "guides_per_group": 2})
    assert read_run(run)["config"]["num_generations"] == 8, "the places kept for guides are no rollouts"
