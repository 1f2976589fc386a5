"""Scores on the eight real benchmarks: the command line of lmms-eval, and what is read from the files it leaves.

lmms-eval is never imported. Its formats are those of version 0.7.3, read in its wheel and in runs that its repository
holds (`jetson/results/`); how suites are measured and compared is ours.

- Tasks are its `*_reasoning` family: the model may think, and every row has a verdict. The plain tasks are not read:
  MMBench's verdicts are in no file, MMMU-Pro's vision task compares the whole response with one letter, and
  MathVista's and MathVerse's ask a judge.
- ZeroBench has no such task: `zerobench` asks the 100 main questions and compares the bare answer exactly. The paper's
  figures are multiples of 1/668, so of the 334 sub-questions, which lmms-eval does not ask: no comparison.
- We-Math counts 525 problems, not rows: 1 if problem and steps are right, 1/2 if only the steps (`wemath_strict`).
- MMBench is the share of right rows, circular copies included; MathVerse holds versions of one problem: rows that are
  not independent, so these two intervals are too narrow. `prompt` in the settings says the file of MMBench's task.
- `doc_hash` is that of "null" for every row, so an item is known by task, `doc_id`, question and answer.
- The judge is not written down; `command` puts it into an argument that is, and that these tasks do not use.
- VLMEvalKit is not read: it keeps rows in spreadsheets, other columns for each dataset, and no verdicts on ZeroBench.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..declaration import require
from ..files import read_json, read_lines
from ..method.stats import Estimate, bootstrap_interval, detectable_difference, holm, mcnemar_exact, paired_difference
from ..runs.validation import SUITES, check_suites


@dataclass(frozen=True)
class Task:
    """A task of lmms-eval that measures a suite, or a part of it.

    Attributes:
        name: Name in lmms-eval.
        suite: Suite; MMMU-Pro has two tasks, of as many rows.
        metric: Metric of the headline score, a fraction; We-Math's is text, "54.10%".
        form: Where a row keeps its verdict, 0 or 1: "number", the metric itself; "score", that entry of the metric;
            "problem", its entry `acc_score`, with `ID` and `key` to put problems together.
    """

    name: str
    suite: str
    metric: str = "acc_score"
    form: str = "number"


_TASKS = (
    Task("mmmu_pro_standard_cot_reasoning", "mmmu_pro"),
    Task("mmmu_pro_vision_cot_reasoning", "mmmu_pro"),
    Task("mathvista_testmini_cot_reasoning", "mathvista"),
    Task("mathvision_reason_test_reasoning", "mathvision"),
    Task("zerobench", "zerobench", "zerobench_exact_match", "score"),
    Task("wemath_testmini_reasoning", "wemath", "wemath_strict", "problem"),
    Task("mmbench_en_dev_reasoning", "mmbench"),
    Task("mmstar_reasoning", "mmstar"),
    Task("mathverse_testmini_reasoning", "mathverse"),
)
TASKS = {task.name: task for task in _TASKS}
"""Tasks by name, in the order of the suites."""

HARNESS, VERSION = "lmms-eval", "0.7.3"
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 4096}
"""The paper's validation sampling, and its response length in tokens."""
VLLM_ONLY = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
"""Sampling settings that transformers' backend would drop without a word."""
BACKENDS = {"vllm": ("vllm", "model", 64), "hf": ("qwen3_vl", "pretrained", 1)}
"""Backend to lmms-eval's model, the argument that names the checkpoint, and the batch size."""
WEMATH_PROBLEMS = 525
ROUNDING = 0.006
"""Points by which a score may differ from its items: We-Math's has two digits."""
BASE, AVERAGE = "base", "average"
LEVEL, GAIN = ("score", "low", "high"), ("gain", "gain_low", "gain_high")
COLUMNS = ["label", "suite", *LEVEL, *GAIN, "better", "worse", "p", "p_holm", "detectable", "items"]
RESULTS = re.compile(r"\d{8}_\d{6}_results\.json")
JUDGE, CLI = "judge-", "config.resolved_cli_args."
SHARED = {
    "version": "lmms_eval_version",
    **{name: f"config.{name}" for name in ("model_args", "limit", "offset", "random_seed", "numpy_seed", "torch_seed")},
    "backend": "config.model",
    "judge": f"{CLI}log_samples_suffix",
    **{name: f"{CLI}{name}" for name in ("reasoning_tags", "system_instruction", "apply_chat_template")},
}
"""Setting to its place in a results file."""
BY_TASK = {"sampling": "configs.{}.generation_kwargs", "prompt": "configs.{}.doc_to_text", "n_shot": "n-shot.{}"}
BY_TASK |= {"task_version": "versions.{}"}


@dataclass(frozen=True)
class SuiteScore:
    """A model's score on one suite.

    Attributes:
        score: Mean credit in percent: the share of right items, for We-Math its strict score.
        credit: Credit by item, 0 or 1, for We-Math also 1/2; by name: task, place, digest of question and answer.
    """

    score: float
    credit: Mapping[str, float]


@dataclass(frozen=True)
class BenchmarkScores:
    """What lmms-eval measured of one model.

    Attributes:
        model: Checkpoint as it was given to lmms-eval.
        suites: Score by suite.
        settings: What compared models share: harness, version, backend and its arguments, judge ("none" for rules
            alone), limit (None for all rows), offset, seeds; by task: sampling, prompt's function, `n_shot`, version.
    """

    model: str
    suites: Mapping[str, SuiteScore]
    settings: Mapping[str, Any]


def command(
    checkpoint: str | Path,
    suites: Iterable[str],
    out: str | Path,
    *,
    backend: str = "vllm",
    judge: str | None = None,
    limit: int | None = None,
    sampling: Mapping[str, float] = SAMPLING,
    model_args: Mapping[str, Any] | None = None,
) -> list[str]:
    """The command line that measures a checkpoint; it runs in lmms-eval's own environment.

    Args:
        checkpoint: Folder or hub name of the model.
        suites: Suites to measure.
        out: Folder for the output of this one model.
        backend: "vllm", or "hf" for transformers; their prompts differ by a system message.
        judge: LLM to ask about answers that rules call wrong, rules alone if None. Its address and key are taken from
            JUDGE_BASE_URL and JUDGE_API_KEY.
        limit: Number of first rows of each task, for a trial; all if None.
        sampling: Sampling settings, those of `SAMPLING` and, for vLLM, of `VLLM_ONLY`.
        model_args: Further arguments of the backend, the same for all models, e.g. `{"tensor_parallel_size": 2}`.

    Raises:
        ValueError: An argument is not allowed, or lmms-eval would do something else.
    """
    suites = tuple(suites)
    check_suites(suites)
    require(backend in BACKENDS, "backend", backend, f"one of {', '.join(BACKENDS)}")
    model, argument, batch = BACKENDS[backend]
    # of a fraction, lmms-eval would apply the first task's number of rows to all tasks
    rows = limit is None or (type(limit) is int and limit >= 1 and "wemath" not in suites)
    require(rows, "limit", limit, "a number of rows, for suites without wemath, whose score needs all; or None")
    require(judge not in ("", "none"), "judge", judge, "the name of a model, or None for rules alone")
    for name, text in (("checkpoint", str(checkpoint)), ("out", str(out))):
        require(bool(text) and "," not in text, name, text, "a path without commas: lmms-eval splits there")
    more = VLLM_ONLY if backend == "vllm" else ()
    # a setting left out would be each task's own
    known = set(SAMPLING) <= set(sampling) <= {*SAMPLING, *more} and all(map(math.isfinite, sampling.values()))
    allowed = f"numbers for {', '.join(SAMPLING)}; backend {backend} takes {', '.join(more) or 'nothing'} beyond these"
    require(known, "sampling", dict(sampling), allowed)
    judged = ["USE_LLM_JUDGE=False"] if judge is None else ["USE_LLM_JUDGE=True", f"JUDGE_MODEL_NAME={judge}"]
    # vLLM's backend takes the larger of its own length and the one asked for
    length = {"max_new_tokens": sampling["max_new_tokens"]} if backend == "vllm" else {}
    given = {argument: checkpoint, **length, **(model_args or {})}
    return [
        *("env", *judged, "python", "-m", "lmms_eval"),
        *("--model", model, "--model_args", ",".join(f"{name}={value}" for name, value in given.items())),
        *("--tasks", ",".join(task.name for task in TASKS.values() if task.suite in suites)),
        *("--batch_size", str(batch), "--gen_kwargs", ",".join(f"{name}={v}" for name, v in sampling.items())),
        *(() if limit is None else ("--limit", str(limit))),
        *("--output_path", str(out), "--log_samples", "--log_samples_suffix", f"{JUDGE}{judge or 'none'}"),
    ]


def read_scores(folder: str | Path, *, judge: str | None = None) -> BenchmarkScores:
    """Scores and verdicts of one model from lmms-eval's output, which may be of several runs with other tasks each.

    Args:
        folder: The `--output_path`, or the model's folder in it: `<date>_results.json` and, beside each,
            `<date>_samples_<task>.jsonl`.
        judge: Judge of runs that `command` did not write, "none" for rules alone: their files do not say it.

    Raises:
        FileNotFoundError: There are no results.
        ValueError: Results and samples do not belong together, are incomplete, or of another version or several models.
    """
    folder = Path(folder)
    files = [path for path in sorted(folder.rglob("*_results.json")) if RESULTS.fullmatch(path.name)]
    if not files:
        raise FileNotFoundError(f"{folder} holds no <date>_results.json of {HARNESS}; `lmms_eval.command` makes it.")
    contents = {path: read_json(path) for path in files}
    places: dict[str, Path] = {}
    settings: dict[str, Any] = {}
    for path, content in contents.items():
        for task in _entry(content, "configs", path):
            if task in places:
                raise ValueError(f"{task} has two results, {places[task]} and {path}. Move away the one not meant.")
            places[task] = path
        found = _settings(path, content, judge)
        _same(settings, found, f"{files[0].name}", path.name)
        settings = {name: settings.get(name, {}) | v if isinstance(v, dict) else v for name, v in found.items()}
    models = sorted({_entry(content, "model_name", path) for path, content in contents.items()})
    require(len(models) == 1, f"the models in {folder}", models, "one; give each model a folder of its own")
    read = [task for task in TASKS if task in places]
    require(bool(read), f"the tasks in {folder}", sorted(places), f"at least one of {', '.join(TASKS)}")
    suites = {}
    for suite in SUITES:
        parts = [name for name, task in TASKS.items() if task.suite == suite]
        if found := [name for name in parts if name in read]:
            require(found == parts, f"the tasks of {suite} in {folder}", found, f"{parts}, which make one score")
            credit = {item: v for n in parts for item, v in _credit(places[n], contents[places[n]], TASKS[n]).items()}
            suites[suite] = SuiteScore(100 * float(np.mean([*credit.values()])), credit)
    return BenchmarkScores(models[0], suites, settings)


def read_models(folder: str | Path, *, judge: str | None = None) -> dict[str, BenchmarkScores]:
    """Scores of several models, a subfolder each, the base first.

    Args:
        folder: Folder with a subfolder per model; one is called "base".
        judge: As in `read_scores`.

    Raises:
        FileNotFoundError: There is no subfolder "base", or one has no results; ValueError as in `read_scores`.
    """
    names = sorted(path.name for path in Path(folder).glob("*/"))
    if BASE not in names:
        raise FileNotFoundError(f"{folder} has no subfolder {BASE!r}, only {names}; measure the base model as well.")
    return {name: read_scores(Path(folder) / name, judge=judge) for name in dict.fromkeys((BASE, *names))}


def compare(
    base: BenchmarkScores, trained: Mapping[str, BenchmarkScores], rng: np.random.Generator, *, resamples: int = 1000
) -> pd.DataFrame:
    """Trained models against the base on the same items, and the average as the paper forms it: the mean over suites.

    Intervals are over items and speak of these runs only: another training seed, or other responses of the same model,
    are not in them. The average's half-widths are those of the suites in quadrature: their items are different ones.

    Args:
        base: Scores of the base model.
        trained: Scores by label.
        rng: Source of the bootstrap.
        resamples: Resamples of each interval.

    Returns:
        A row per model and suite, and one per model for the average: `label`, `suite`; `score`, `low`, `high`: percent,
        with the 95 % bootstrap interval; `gain`, `gain_low`, `gain_high`: points over the base, paired by item;
        `better`, `worse`: items whose credit rose or fell; `p`: exact McNemar test of these; `p_holm`: adjusted over a
        model's suites; `detectable`: the gain that so many items find with probability 0.8; `items`; `limit`: rows
        of each task that were measured. NaN where there is none.

    Raises:
        ValueError: No trained model, one called "base", or one measured with other settings, suites or items.
    """
    require(bool(trained) and BASE not in trained, "trained", [*trained], f"one or more models, none called {BASE!r}")
    for label, scores in trained.items():
        _same(base.settings, scores.settings, "the base", label)
        require(set(scores.suites) == set(base.suites), f"suites of {label}", [*scores.suites], f"{[*base.suites]}")
        for suite, score in scores.suites.items():
            odd = sorted(score.credit.keys() ^ base.suites[suite].credit.keys())
            require(not odd, f"items of {suite} in {label} or the base only", odd[:2], "none; use the same data")
    rows: list[dict[str, Any]] = []
    for label, scores in {BASE: base, **trained}.items():
        levels, gains, of_model = [], [], []
        for suite, score in scores.suites.items():
            before = base.suites[suite].credit
            own, other = (np.array([credit[item] for item in before]) for credit in (score.credit, before))
            levels.append(bootstrap_interval(own, np.mean, rng, resamples=resamples))
            row = {"suite": suite, **_percent(levels[-1], *LEVEL), "items": own.size}
            if label != BASE:
                gains.append(paired_difference(own, other, rng, resamples=resamples))
                better, worse = int((own > other).sum()), int((own < other).sum())
                row |= {**_percent(gains[-1], *GAIN), "better": better, "worse": worse}
                row["p"] = mcnemar_exact(better, worse)
                row["detectable"] = 100 * detectable_difference(own - other) if better + worse else np.nan
            of_model.append(row)
        for row, adjusted in zip(of_model, holm(np.array([r["p"] for r in of_model])) if gains else (), strict=False):
            row["p_holm"] = adjusted
        mean = {"suite": AVERAGE, **_percent(_mean(levels), *LEVEL), "items": _mean(levels).n}
        mean |= _percent(_mean(gains), *GAIN) if gains else {}
        rows += [{"label": label, **row} for row in (mean, *of_model)]
    return pd.DataFrame(rows, columns=COLUMNS).assign(limit=base.settings["limit"] or np.nan)


def _entry(content: Mapping[str, Any], place: str, path: Path) -> Any:
    found: Any = content
    for name in place.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise ValueError(f"{path} lacks {place}; what is read is {HARNESS} {VERSION}'s output. Measure with it.")
        found = found[name]
    return found


def _settings(path: Path, content: Mapping[str, Any], judge: str | None) -> dict[str, Any]:
    found = {"harness": HARNESS, **{name: _entry(content, place, path) for name, place in SHARED.items()}}
    found["model_args"] = re.sub(r"(^|,)(model|pretrained)=[^,]*", "", found["model_args"]).strip(",")
    found["limit"] = None if found["limit"] == -1 else found["limit"]
    recorded = found["judge"].removeprefix(JUDGE) if found["judge"].startswith(JUDGE) else judge
    if recorded is None or judge not in (None, recorded):
        says = f"was measured with judge {recorded!r}, not {judge!r}" if recorded else "does not say who judged"
        raise ValueError(f"{path} {says}; give judge=<model>, or judge='none' where rules alone were used.")
    found["judge"] = recorded
    tasks = [task for task in content["configs"] if task in TASKS]
    found |= {name: {t: _entry(content, place.format(t), path) for t in tasks} for name, place in BY_TASK.items()}
    return found | {"prompt": {task: re.sub(" at 0x.*", "", text) for task, text in found["prompt"].items()}}


def _same(one: Mapping[str, Any], other: Mapping[str, Any], of_one: str, of_other: str) -> None:
    """Refuse different settings; of those by task, the tasks that both sides have."""
    odd = []
    for name in one.keys() & other.keys():
        both = one[name], other[name]
        if isinstance(both[0], dict):
            both = tuple({task: value[task] for task in both[0].keys() & both[1].keys()} for value in both)
        odd += [f"{name} is {both[0]!r} and {both[1]!r}"] if both[0] != both[1] else []
    if odd:
        raise ValueError(
            f"{of_one} and {of_other} differ: {'; '.join(sorted(odd))}. Measure both with the same command."
        )


def _credit(path: Path, content: Mapping[str, Any], task: Task) -> dict[str, float]:
    """Credit by item of one task, checked against the number of rows and the score in the results file."""
    samples = path.with_name(path.name.replace("results.json", f"samples_{task.name}.jsonl"))
    if not samples.is_file():
        raise ValueError(f"{path} has no {samples.name} beside it; measure {task.name} with --log_samples.")
    repeats = _entry(content, f"configs.{task.name}.repeats", path)
    require(repeats == 1, f"repeats of {task.name} in {path}", repeats, "1: not every task scores all responses")
    lines, expected = list(read_lines(samples)), _entry(content, f"n-samples.{task.name}.effective", path)
    ids = {_entry(line, "doc_id", samples) for line in lines}
    whole = len(lines) == len(ids) == expected > 0
    require(whole, f"rows and ids in {samples}", (len(lines), len(ids)), f"{expected} each; measure {task.name} again")
    if task.form == "problem":
        credit = _problems(samples, lines, task)
    else:
        place = task.metric if task.form == "number" else f"{task.metric}.score"
        credit = {f"{task.name}/{r['doc_id']}/{_digest(samples, [r])}": _verdict(samples, r, place) for r in lines}
    reported = _entry(content, f"results.{task.name}.{task.metric},none", path)
    number = re.fullmatch(r"([\d.e+-]+)(%?)", str(reported))
    score = float(number[1]) * (1 if number[2] else 100) if number else math.nan
    mean = 100 * float(np.mean([*credit.values()]))
    agree = abs(score - mean) <= ROUNDING
    require(agree, f"{task.metric} of {task.name} in {path}", reported, f"{mean:.4f} percent, as its samples are")
    return credit


def _problems(samples: Path, lines: list[dict[str, Any]], task: Task) -> dict[str, float]:
    """We-Math's credit by problem, from the rows of its steps ("2steps_1") and of the whole ("2steps_multi")."""
    problems: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        name, key = (_entry(line, f"{task.metric}.{entry}", samples) for entry in ("ID", "key"))
        problems.setdefault(f"{key.split('_')[0]}-{name}", {})[key] = line
    credit = {}
    for name, rows in problems.items():
        kind = f"{len(rows) - 1}steps"
        keys = [f"{kind}_{step}" for step in range(1, len(rows))] + [f"{kind}_multi"]
        require(set(rows) == set(keys), f"the rows of problem {name} in {samples}", sorted(rows), f"{keys}")
        *steps, whole = (_verdict(samples, rows[key], f"{task.metric}.acc_score") for key in keys)
        credit[f"{task.name}/{name}/{_digest(samples, [rows[key] for key in keys])}"] = all(steps) * (1 + whole) / 2
    require(len(credit) == WEMATH_PROBLEMS, f"the problems in {samples}", len(credit), f"all {WEMATH_PROBLEMS} of them")
    return credit


def _verdict(samples: Path, line: Mapping[str, Any], place: str) -> float:
    value = _entry(line, place, samples)
    require(value in (0, 1), f"{place} of doc_id {line['doc_id']} in {samples}", value, "a verdict, 0 or 1")
    return float(value)


def _digest(samples: Path, lines: Iterable[Mapping[str, Any]]) -> str:
    text = [[_entry(line, name, samples) for name in ("target", "input")] for line in lines]
    return sha256(json.dumps(text).encode()).hexdigest()[:12]


def _percent(estimate: Estimate, *names: str) -> dict[str, float]:
    return dict(zip(names, (100 * estimate.value, 100 * estimate.low, 100 * estimate.high), strict=True))


def _mean(estimates: list[Estimate]) -> Estimate:
    """Mean of independent estimates; distances to their ends add in quadrature."""
    values, lows, highs = (np.array([getattr(e, name) for e in estimates]) for name in ("value", "low", "high"))
    below, above = (float(np.linalg.norm(gap)) / len(estimates) for gap in (values - lows, highs - values))
    return Estimate(mean := float(values.mean()), mean - below, mean + above, n=sum(e.n for e in estimates))
