"""Real benchmarks: the command line, what is read from lmms-eval's files, what is refused, and the comparison.

The samples are the output of two made-up trials of 8 rows a task, in the format of lmms-eval 0.7.3.
"""

import json
import shlex
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from legible import assert_legible

from npo_core import figures
from npo_core.figures import benchmark_table
from npo_core.runs.validation import SUITES
from npo_core.study.findings import paper_table
from npo_core.study.lmms_eval import (
    COLUMNS,
    SAMPLING,
    TASKS,
    BenchmarkScores,
    SuiteScore,
    command,
    compare,
    read_models,
    read_scores,
)

SAMPLES = Path(__file__).parents[1] / "samples" / "lmms_eval"
MATHVISTA = "mathvista_testmini_cot_reasoning"
WEMATH = "wemath_testmini_reasoning"


@pytest.fixture
def folder(tmp_path):
    """A copy of the samples that a test may spoil."""
    return shutil.copytree(SAMPLES, tmp_path / "models")


@pytest.fixture(scope="module")
def models():
    return read_models(SAMPLES)


def change(folder, path, value, model="base"):
    """Set the entry at a path of keys in a results file; delete it if the value is `...`."""
    (file,) = (folder / model).rglob("*_results.json")
    content = json.loads(file.read_text())
    *keys, last = path
    place = content
    for key in keys:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    file.write_text(json.dumps(content))
    return file


def samples_of(folder, task=MATHVISTA, model="base"):
    (file,) = (folder / model).rglob(f"*_samples_{task}.jsonl")
    return file


def change_line(folder, number, task=MATHVISTA, model="base", **entries):
    file = samples_of(folder, task, model)
    lines = file.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | entries)
    file.write_text("\n".join(lines) + "\n")


def options(line):
    """Values of a command line by the flag before them."""
    return {flag: value for flag, value in pairwise(line) if flag.startswith("--")}


# the command line


def test_the_command_measures_all_suites_with_the_papers_sampling():
    line = command("Qwen/Qwen3-VL-8B-Instruct", SUITES, "out/base")
    assert line[:5] == ["env", "USE_LLM_JUDGE=False", "python", "-m", "lmms_eval"]
    given = options(line)
    assert given["--model"] == "vllm"
    assert given["--model_args"] == "model=Qwen/Qwen3-VL-8B-Instruct,max_new_tokens=4096"
    assert given["--tasks"].split(",") == list(TASKS)
    assert given["--gen_kwargs"] == "temperature=0.7,top_p=0.8,top_k=20,max_new_tokens=4096"
    assert given["--output_path"] == "out/base" and "--log_samples" in line and "--limit" not in line


def test_every_suite_has_a_task_and_mmmu_pro_has_two():
    suites = [task.suite for task in TASKS.values()]
    assert tuple(dict.fromkeys(suites)) == SUITES
    assert [suite for suite in SUITES if suites.count(suite) > 1] == ["mmmu_pro"]


def test_a_trial_with_a_judge_on_transformers():
    line = command("run/checkpoint-40", ["mathvista", "mmstar"], "out", backend="hf", judge="gpt-4o-mini", limit=8)
    assert line[1:3] == ["USE_LLM_JUDGE=True", "JUDGE_MODEL_NAME=gpt-4o-mini"]
    given = options(line)
    assert (given["--model"], given["--model_args"]) == ("qwen3_vl", "pretrained=run/checkpoint-40")
    assert given["--tasks"] == f"{MATHVISTA},mmstar_reasoning"
    assert given["--limit"] == "8" and given["--log_samples_suffix"] == "judge-gpt-4o-mini"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suites": ["mathvistta"]}, "did you mean 'mathvista'"),
        ({"suites": []}, "one or more distinct suites"),
        ({"backend": "sglang"}, "one of vllm, hf"),
        ({"limit": 0.1}, "limit is 0.1; it must be a number of rows"),
        ({"limit": 0}, "a number of rows"),
        ({"limit": True}, "a number of rows"),
        ({"limit": 8, "suites": ["mathvista", "wemath"]}, "without wemath, whose score needs all"),
        ({"judge": "none"}, "the name of a model, or None"),
        ({"checkpoint": "a,b"}, "checkpoint is 'a,b'; it must be a path without commas"),
        ({"out": ""}, "out is ''"),
        ({"sampling": {"temperature": 0.7}}, "numbers for temperature, top_p, top_k, max_new_tokens"),
        ({"sampling": SAMPLING | {"top_k": float("nan")}}, "numbers for temperature"),
        ({"sampling": SAMPLING | {"temprature": 1}}, "numbers for temperature"),
        ({"sampling": SAMPLING | {"presence_penalty": 1.5}, "backend": "hf"}, "backend hf takes nothing beyond these"),
    ],
)
def test_what_lmms_eval_would_not_do_is_refused(arguments, message):
    arguments = {"checkpoint": "model", "suites": ["mathvista"], "out": "out"} | arguments
    with pytest.raises(ValueError, match=message):
        command(**arguments)


def test_vllm_takes_more_sampling_settings_and_arguments():
    more = {"tensor_parallel_size": 4, "max_model_len": 16384}
    line = command("m", ["mmstar"], "out", sampling=SAMPLING | {"presence_penalty": 1.5}, model_args=more)
    assert options(line)["--gen_kwargs"].endswith(",presence_penalty=1.5")
    assert options(line)["--model_args"] == "model=m,max_new_tokens=4096,tensor_parallel_size=4,max_model_len=16384"
    sizes = {"mm_processor_kwargs": '{"max_pixels":1003520}'}
    line = command("m", ["mmstar"], "out", model_args=sizes)
    assert options(line)["--model_args"].endswith(',mm_processor_kwargs={"max_pixels":1003520}')


# reading


def test_scores_are_read_with_their_provenance(models):
    assert list(models) == ["base", "npo"]
    base = models["base"]
    assert base.model == "Qwen/Qwen3-VL-8B-Instruct" and models["npo"].model == "checkpoints/npo/checkpoint-400"
    scores = {suite: score.score for suite, score in base.suites.items()}
    # 3 of 8 and 2 of 8 make one score of 16 items
    assert scores == {"mmmu_pro": 31.25, "mathvista": 62.5, "zerobench": 12.5, "mmstar": 62.5}
    assert list(base.suites["mathvista"].credit.values()) == [1, 1, 0, 1, 0, 0, 1, 1]
    assert len(base.suites["mmmu_pro"].credit) == 16
    settings = base.settings
    assert (settings["harness"], settings["version"], settings["backend"]) == ("lmms-eval", "unknown@unknown", "vllm")
    assert (settings["judge"], settings["limit"], settings["offset"]) == ("none", 8, 0)
    assert settings["model_args"] == "max_new_tokens=4096,tensor_parallel_size=2"
    assert {name: settings["sampling"][MATHVISTA][name] for name in SAMPLING} == SAMPLING
    assert settings["n_shot"][MATHVISTA] == 0
    # without its address in memory, which no two runs share
    assert settings["prompt"][MATHVISTA] == "<function mathvista_doc_to_text"


def test_an_item_is_known_by_its_place_and_text(folder, models):
    names = list(models["base"].suites["mathvista"].credit)
    assert names == list(models["npo"].suites["mathvista"].credit)
    assert [name.split("/")[:2] for name in names] == [[MATHVISTA, str(index)] for index in range(8)]
    change_line(folder, 0, input="another question")
    changed = list(read_scores(folder / "base").suites["mathvista"].credit)
    assert changed[0] != names[0] and changed[1:] == names[1:]


def test_suites_measured_in_several_runs_are_put_together(folder):
    (file,) = (folder / "base").rglob("*_results.json")
    content = json.loads(file.read_text())
    content["configs"] = {MATHVISTA: content["configs"][MATHVISTA]}
    for path in [file, samples_of(folder)]:
        other = path.with_name(path.name.replace("20261121_091502", "20261122_000000"))
        shutil.copy(path, other)
    file.with_name("20261122_000000_results.json").write_text(json.dumps(content | {"date": "20261122_000000"}))
    with pytest.raises(ValueError, match=rf"{MATHVISTA} has two results, .*091502.* and .*20261122"):
        read_scores(folder / "base")
    first = json.loads(file.read_text())
    del first["configs"][MATHVISTA]
    file.write_text(json.dumps(first))
    both = read_scores(folder / "base")
    assert both.suites == read_scores(SAMPLES / "base").suites
    assert set(both.settings["sampling"]) == {*first["configs"], MATHVISTA}
    content["config"]["limit"] = None
    file.with_name("20261122_000000_results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"differ: limit is 8.0 and None. Measure both with the same command"):
        read_scores(folder / "base")


def test_tasks_of_other_suites_are_left_out(folder):
    change(folder, ["configs", "mme"], {})
    assert read_scores(folder / "base").suites == read_scores(SAMPLES / "base").suites


def test_files_of_other_tools_are_not_taken_for_results(folder):
    (folder / "base" / "submissions").mkdir()
    (folder / "base" / "submissions" / "mathverse_testmini_results.json").write_text("[]")
    assert set(read_scores(folder / "base").suites) == {"mmmu_pro", "mathvista", "zerobench", "mmstar"}


def test_a_folder_without_results_or_base_is_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"holds no <date>_results.json of lmms-eval"):
        read_scores(tmp_path / "nowhere")
    shutil.rmtree(folder / "base")
    with pytest.raises(FileNotFoundError, match=r"no subfolder 'base', only \['npo'\]; measure the base"):
        read_models(folder)


def test_results_of_two_models_in_one_folder_are_refused(folder):
    (file,) = (folder / "npo").rglob("*_results.json")
    content = json.loads(file.read_text())
    content["configs"] = {}
    (folder / "base" / file.name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the models in .*Qwen.*checkpoint-400.*; it must be one; give each"):
        read_scores(folder / "base")


def test_results_without_samples_are_refused(folder):
    samples_of(folder).unlink()
    with pytest.raises(ValueError, match=rf"has no 20261121_091502_samples_{MATHVISTA}.jsonl .* with --log_samples"):
        read_scores(folder / "base")


def test_missing_repeated_and_torn_rows_are_refused(folder):
    file = samples_of(folder)
    whole = file.read_text()
    lines = whole.splitlines()
    for text, counts in (
        ("\n".join(lines[:7]), r"\(7, 7\)"),
        (whole + lines[0] + "\n", r"\(9, 8\)"),
        ("", r"\(0, 0\)"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"rows and ids in .* is {counts}; it must be 8 each; measure .* again"):
            read_scores(folder / "base")
    file.write_text("\n".join([*lines[:7], lines[0]]))
    with pytest.raises(ValueError, match=r"is \(8, 7\)"):
        read_scores(folder / "base")
    file.write_text(whole[:-20])  # killed while writing
    with pytest.raises(ValueError, match=r"is \(7, 7\)"):
        read_scores(folder / "base")


@pytest.mark.parametrize("value", [float("nan"), 0.5, None, "1", [1]])
def test_what_is_not_a_verdict_is_refused(folder, value):
    change_line(folder, 2, acc_score=value)
    with pytest.raises(ValueError, match=r"acc_score of doc_id 2 in .*; it must be a verdict, 0 or 1"):
        read_scores(folder / "base")


@pytest.mark.parametrize("value", [float("nan"), None, "N/A", 0.75])
def test_a_score_that_its_rows_do_not_give_is_refused(folder, value):
    change(folder, ["results", MATHVISTA, "acc_score,none"], value)
    with pytest.raises(
        ValueError, match=rf"acc_score of {MATHVISTA} in .*; it must be 62.5000 percent, as its samples"
    ):
        read_scores(folder / "base")


@pytest.mark.parametrize(
    "path",
    [
        ["lmms_eval_version"],
        ["model_name"],
        ["n-samples", MATHVISTA, "effective"],
        ["n-shot", MATHVISTA],
        ["config", "limit"],
        ["config", "resolved_cli_args", "log_samples_suffix"],
        ["configs", MATHVISTA, "generation_kwargs"],
        ["configs", MATHVISTA, "repeats"],
        ["results", MATHVISTA, "acc_score,none"],
    ],
    ids="/".join,
)
def test_another_output_version_is_refused(folder, path):
    change(folder, path, ...)
    with pytest.raises(ValueError, match=r"lacks .*; what is read is lmms-eval 0.7.3's output"):
        read_scores(folder / "base")


def test_rows_of_another_version_are_refused(folder):
    change_line(folder, 0, "zerobench", zerobench_exact_match=0.0)
    with pytest.raises(ValueError, match=r"lacks zerobench_exact_match.score"):
        read_scores(folder / "base")


def test_half_of_mmmu_pro_is_refused(folder):
    change(folder, ["configs", "mmmu_pro_vision_cot_reasoning"], ...)
    with pytest.raises(ValueError, match=r"the tasks of mmmu_pro .* which make one score"):
        read_scores(folder / "base")


def test_unknown_tasks_alone_are_refused(folder):
    change(folder, ["configs"], {"mathvista_testmini_cot": {}})
    with pytest.raises(ValueError, match=r"the tasks in .*\['mathvista_testmini_cot'\]; it must be at least one of"):
        read_scores(folder / "base")


def test_repeats_are_refused(folder):
    change(folder, ["configs", MATHVISTA, "repeats"], 4)
    with pytest.raises(ValueError, match=r"repeats of .* is 4; it must be 1"):
        read_scores(folder / "base")


def test_the_judge_is_known_or_stated(folder):
    suffix = ["config", "resolved_cli_args", "log_samples_suffix"]
    with pytest.raises(ValueError, match=r"was measured with judge 'none', not 'gpt-4o-mini'"):
        read_scores(folder / "base", judge="gpt-4o-mini")
    change(folder, suffix, "judge-gpt-4o-mini")
    assert read_scores(folder / "base").settings["judge"] == "gpt-4o-mini"
    change(folder, suffix, "model_outputs")  # lmms-eval's default
    with pytest.raises(ValueError, match=r"does not say who judged; give judge=<model>, or judge='none'"):
        read_scores(folder / "base")
    assert read_scores(folder / "base", judge="none").settings["judge"] == "none"


# We-Math


def wemath(folder, wrong=(), reported="99.52%"):
    """A whole run of We-Math, every row right but those in `wrong`: pairs of problem and key."""
    date = "20261121_091502"
    (source,) = (folder / "base").rglob("*_results.json")
    content = json.loads(source.read_text())
    rows = []
    for problem in range(525):
        kind = "2steps" if problem < 360 else "3steps"
        for part in [*range(1, int(kind[0]) + 1), "multi"]:
            key = f"{kind}_{part}"
            acc = float((problem, key) not in wrong)
            # an ID names one problem of two steps and another of three
            entry = {"ID": f"p{problem % 360}", "split": "testmini", "key": key, "answer": "B", "acc_score": acc}
            metrics = {"wemath_loose": entry, "wemath_strict": entry, "acc_score": acc, "format_score": 1.0}
            asked = {"doc_id": len(rows), "target": "B", "input": f"Question {problem} {part}"}
            rows.append(
                asked | {"filtered_resps": "<answer>B</answer>", "token_counts": [None], "doc_hash": "0"} | metrics
            )
    order = np.random.default_rng(0).permutation(len(rows))  # the parts of a problem lie apart
    target = folder / "wemath" / "model"
    target.mkdir(parents=True)
    text = "".join(json.dumps(rows[index]) + "\n" for index in order)
    (target / f"{date}_samples_{WEMATH}.jsonl").write_text(text)
    about = content["configs"][MATHVISTA] | {"task": WEMATH}
    content |= {"configs": {WEMATH: about}, "versions": {WEMATH: "Yaml"}, "n-shot": {WEMATH: 0}}
    content["results"] = {WEMATH: {"wemath_strict,none": reported, "acc_score,none": 0.9}}
    content["n-samples"] = {WEMATH: {"original": len(rows), "effective": len(rows)}}
    (target / f"{date}_results.json").write_text(json.dumps(content))
    return folder / "wemath"


def test_we_maths_score_counts_problems(tmp_path):
    shutil.copytree(SAMPLES, tmp_path, dirs_exist_ok=True)
    # generalises badly: 1/2; learned by rote: 0; lacks knowledge: 0; (525 − 0.5 − 1 − 1)/525 = 99.52 %
    wrong = {(0, "2steps_multi"), (1, "2steps_1"), (400, "3steps_3"), (400, "3steps_multi")}
    score = read_scores(wemath(tmp_path, wrong)).suites["wemath"]
    assert score.score == pytest.approx(100 * 522.5 / 525)
    credit = np.array(list(score.credit.values()))
    assert len(credit) == 525 and sorted(credit)[:4] == [0, 0, 0.5, 1]


def test_a_part_of_we_math_is_refused(tmp_path):
    shutil.copytree(SAMPLES, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"wemath_strict of .* is '54.10%'; it must be 100.0000 percent"):
        read_scores(wemath(tmp_path, reported="54.10%"))
    file = samples_of(tmp_path, WEMATH, "wemath")
    lines = file.read_text().splitlines()
    (results,) = (tmp_path / "wemath").rglob("*_results.json")
    content = json.loads(results.read_text())
    content["n-samples"][WEMATH]["effective"] = 8
    results.write_text(json.dumps(content))
    file.write_text("\n".join(lines[:8]) + "\n")
    with pytest.raises(ValueError, match=r"the rows of problem .*; it must be"):
        read_scores(tmp_path / "wemath")
    whole = [line for line in lines if json.loads(line)["input"].split()[1] in ("7", "400")]
    content["n-samples"][WEMATH]["effective"] = len(whole)
    results.write_text(json.dumps(content))
    file.write_text("\n".join(whole) + "\n")
    with pytest.raises(ValueError, match=r"the problems in .* is 2; it must be all 525 of them"):
        read_scores(tmp_path / "wemath")


# the comparison


def table(models, **arguments):
    rest = {label: scores for label, scores in models.items() if label != "base"}
    return compare(models["base"], rest, np.random.default_rng(0), **arguments).set_index(["label", "suite"])


def test_gains_tests_and_average_by_hand(models):
    found = table(models)
    assert [*found.index.names, *found.columns] == [*COLUMNS, "limit"]
    gains = found.loc["npo", "gain"]
    assert gains.to_dict() == {"average": 9.375, "mmmu_pro": 37.5, "mathvista": 12.5, "zerobench": -12.5, "mmstar": 0}
    # the mean over suites, not over items
    assert found.loc[("base", "average"), "score"] == pytest.approx((31.25 + 62.5 + 12.5 + 62.5) / 4)
    assert found.loc[("npo", "average"), "score"] == pytest.approx((68.75 + 75 + 0 + 62.5) / 4)
    counts = found.loc["npo", ["better", "worse"]].drop("average")
    assert counts.to_numpy().tolist() == [[6, 0], [2, 1], [0, 1], [0, 0]]
    # 6 of 6 one way: 2 · 2⁻⁶; the others: 1 of 1 and 2 of 3 two-sided, and nothing
    assert found.loc["npo", "p"].drop("average").tolist() == [2 * 0.5**6, 1, 1, 1]
    assert found.loc["npo", "p_holm"].drop("average").tolist() == [4 * 2 * 0.5**6, 1, 1, 1]
    assert found["items"].tolist() == [40, 16, 8, 8, 8] * 2 and set(found["limit"]) == {8}
    assert found.loc["base", ["gain", "p", "p_holm", "detectable"]].isna().all(axis=None)


def test_intervals_hold_the_score_and_the_averages_add_in_quadrature(models):
    found = table(models)
    for level, low, high in (("score", "low", "high"), ("gain", "gain_low", "gain_high")):
        rows = found[found[level].notna()]
        assert ((rows[low] <= rows[level]) & (rows[level] <= rows[high])).all()
        suites = rows.loc["npo"].drop("average")
        average = rows.loc[("npo", "average")]
        below = np.sqrt(((suites[level] - suites[low]) ** 2).sum()) / 4
        assert average[level] - average[low] == pytest.approx(below)
    # nobody changed: no width, and no size that could be found
    still = found.loc[("npo", "mmstar")]
    assert (still["gain_low"], still["gain_high"]) == (0, 0) and np.isnan(still["detectable"])


def made_up(base, shares, n=400):
    """Scores with a share of right items per suite, the first ones."""
    credit = {suite: {str(i): float(i < round(share * n)) for i in range(n)} for suite, share in shares.items()}
    suites = {suite: SuiteScore(100 * shares[suite], items) for suite, items in credit.items()}
    return BenchmarkScores("made up", suites, base.settings)


def test_a_paired_interval_is_narrower_and_shrinks_with_the_items(models):
    def of(n):
        base, better = (made_up(models["base"], {"mathvista": share}, n) for share in (0.5, 0.55))
        return table({"base": base, "npo": better}).loc[("npo", "mathvista")]

    few, many = of(100), of(1600)
    assert few["gain"] == many["gain"] == pytest.approx(5)
    assert few["gain_high"] - few["gain_low"] < few["high"] - few["low"]
    widths = [row["gain_high"] - row["gain_low"] for row in (few, many)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)
    # (1.96 + 0.84)·sd/√n for large n, sd² = p(1 − p) of the share that changed
    assert many["detectable"] == pytest.approx(100 * 2.802 * np.sqrt(0.05 * 0.95 / 1600), rel=0.01)


def test_the_same_generator_gives_the_same_table(models):
    pd.testing.assert_frame_equal(table(models), table(models))


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (["config", "limit"], None, "limit"),
        (["config", "model"], "qwen3_vl", "backend"),
        (["config", "model_args"], "model=x,max_new_tokens=4096,max_pixels=99", "model_args"),
        (["config", "resolved_cli_args", "log_samples_suffix"], "judge-gpt-4o-mini", "judge"),
        (["config", "resolved_cli_args", "reasoning_tags"], "none", "reasoning_tags"),
        (["configs", MATHVISTA, "generation_kwargs", "temperature"], 0.0, "sampling"),
        (["configs", MATHVISTA, "doc_to_text"], "<function another at 0x7f31c1a3e700>", "prompt"),
        (["n-shot", MATHVISTA], 5, "n_shot"),
        (["versions", MATHVISTA], 1.0, "task_version"),
        (["lmms_eval_version"], "main@v0.6", "version"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_measured_with_different_settings_are_refused(folder, path, value, name):
    change(folder, path, value, model="npo")
    models = read_models(folder)
    with pytest.raises(ValueError, match=rf"the base and npo differ: {name} is .* Measure both with the same command"):
        table(models)


def test_the_base_and_all_of_its_suites_and_items_are_needed(models, folder):
    base, npo = models["base"], models["npo"]
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"trained is \[\]; it must be one or more models, none called 'base'"):
        compare(base, {}, rng)
    with pytest.raises(ValueError, match=r"trained is \['base'\]"):
        compare(npo, {"base": base}, rng)
    fewer = replace(npo, suites={name: score for name, score in npo.suites.items() if name != "mmstar"})
    with pytest.raises(ValueError, match=r"suites of npo is .*; it must be .*'mmstar'"):
        compare(base, {"npo": fewer}, rng)
    change_line(folder, 3, model="npo", target="99")
    with pytest.raises(ValueError, match=rf"items of mathvista in npo or the base only is \['{MATHVISTA}/3"):
        table(read_models(folder))


# the figure


def texts(axes):
    return {text.get_text() for text in axes.texts}


def test_the_figure_shows_our_gains_above_the_papers(models):
    found = table(models).reset_index()
    figure = benchmark_table(found)
    ours, theirs = figure.axes[:2]
    assert {"31.2\n±21.9", "62.5\n±31.2", "+37.5\n±21.9", "−12.5\n±18.8"} <= texts(ours)
    assert [label.get_text() for label in ours.get_yticklabels()] == ["base\n(percent)", "npo"]
    assert "first 8 rows of a task only" in ours.get_title(loc="left")
    assert "mean of 4 suites" in theirs.get_title(loc="left")
    paper = paper_table()
    gain = paper.loc["AutoNPO", "MathVista"] - paper.loc["Base", "MathVista"]
    assert f"+{gain:.2f}" in texts(theirs) and "73.80" in texts(theirs)
    four = paper[["MMMU-Pro", "MathVista", "ZeroBench", "MM-Star"]].mean(axis=1)
    assert f"{four['Base']:.2f}" in texts(theirs)
    (legend,) = figure.legends
    assert any("334 sub-questions" in text.get_text() for text in legend.get_texts())
    assert_legible({"benchmarks": figure})


def test_a_whole_comparison_is_legible_and_takes_the_papers_average(models):
    base = replace(models["base"], settings={**models["base"].settings, "limit": None})
    shares = dict(zip(SUITES, np.linspace(0.3, 0.9, 8), strict=True))
    scores = {
        label: made_up(base, {suite: share + gain for suite, share in shares.items()})
        for label, gain in (("base", 0.0), ("GRPO", 0.02), ("NPO", 0.05), ("AutoNPO", 0.0525))
    }
    figure = benchmark_table(table(scores, resamples=50).reset_index())
    ours, theirs = figure.axes[:2]
    assert "rows of a task" not in ours.get_title(loc="left") and "57.88" in texts(theirs)
    assert [label.get_text() for label in ours.get_yticklabels()][1:] == ["GRPO", "NPO", "AutoNPO"]
    assert_legible({"benchmarks": figure})


def test_a_comparison_without_the_base_is_not_drawn(models):
    found = table(models).reset_index()
    with pytest.raises(ValueError, match=r"holds \['npo'\]; it must hold 'base' first"):
        benchmark_table(found[found["label"] == "npo"])


# the notebook


@pytest.fixture
def section():
    """Code of the notebook's section on real benchmarks, to be run without the rest."""
    path = Path(__file__).parents[2] / "notebooks" / "06_benchmarks.ipynb"
    (cell,) = (cell for cell in nbformat.read(path, as_version=4).cells if "if benchmarks:" in cell.source)
    names = {"command": command, "compare": compare, "figures": figures, "np": np, "read_models": read_models}
    names |= {"shlex": shlex, "SUITES": SUITES}

    def run(folder):
        shown = []
        exec(cell.source, names | {"benchmarks": folder, "seed": 0, "display": lambda *values: shown.extend(values)})
        return shown

    return run


def test_the_notebook_prints_the_commands_or_draws_the_figure(section, capsys):
    assert section("") == []
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == command("Qwen/Qwen3-VL-8B-Instruct", SUITES, "benchmarks/base")
    assert options(lines[1])["--tasks"] == options(lines[0])["--tasks"]
    found, figure = section(str(SAMPLES))
    assert found.loc[("npo", "mmmu_pro"), "gain"] == 37.5 and len(figure.axes) == 4
    assert "'judge': 'none'" in capsys.readouterr().out
