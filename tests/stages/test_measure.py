"""A measurement on real tiny policies: its numbers against learning_signal, what it costs, and that it goes on."""

import copy
import gc
import json
import shutil
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import signal_quality, variance_cost
from PIL import Image
from transformers import Qwen3Config
from worlds import world

from npo_core.files import read_table
from npo_core.guidance.verdicts import Verdict
from npo_core.method.quantities import MEASURED_COSTS, PROXY_COSTS
from npo_core.method.signal import squared_deviations
from npo_core.runs.config import resolve_config
from npo_core.runs.measurement import plan_pairs
from npo_core.runs.settings import GRADIENTS, WHERE_THEY_FIT, SignalSettings
from npo_core.stages import measure, signal_run
from npo_core.stages import run as stages
from npo_core.stages.comparable import check_policies, content_digest, find_checkpoints
from npo_core.stages.measure import Measurement, with_gradients
from npo_core.trainer import gradients
from npo_core.trainer.gradients import both_sided, own_gram, source_gradients
from npo_core.trainer.sampling import completion_logps
from npo_core.world.policies import CHAT_TEMPLATE, build_tokenizer, load_policy, save_policy
from npo_core.world.tasks import vocabulary

SETTINGS = SignalSettings(prompts=8, rollouts=3, scored=2, gradients=4, max_new_tokens=6, c=5.0, resamples=100)
STEPS = (0, 10, 20)
PAIRS = plan_pairs(STEPS, [0, 10], others=["teacher"])


def verifier(text, row):
    """Right in about one rollout of six, and more often in a policy that likes the first words of the vocabulary."""
    return Verdict.CORRECT if text[:1] in "bcdmr" else Verdict.WRONG


def moved(build, amount, seed):
    """A policy whose weights are some noise away."""
    model, generator = build(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std() if parameter.dim() > 1 else 0.0
            parameter.add_(amount * spread * torch.randn(parameter.shape, generator=generator))
    return model


def saved(name, folder):
    """A run that moves on in one direction, and a teacher somewhere else."""
    tiny = world(name)
    found = {f"{step:06d}": folder / f"checkpoint-{step}" for step in STEPS} | {"teacher": folder / "teacher"}
    for step in STEPS:
        save_policy(moved(tiny.build, 0.02 * step, 1), tiny.processor, found[f"{step:06d}"])
    save_policy(moved(tiny.build, 0.5, 2), tiny.processor, found["teacher"])
    return tiny, found


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    return saved("text", tmp_path_factory.mktemp("policies"))


class Counted:
    """Calls of a function, which may fail at one of them."""

    def __init__(self, function, fail_at=None):
        self.function, self.fail_at, self.calls = function, fail_at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


def measurement(policies, folder, pairs=PAIRS, settings=SETTINGS, verifier=verifier, **options):
    tiny, folders = policies
    return Measurement(
        folder, folders, pairs, tiny.processor, tiny.dataset, verifier, settings, quiet=True, **options
    )  # fmt: skip


COUNTED = ("sample_rollouts", "completion_logps", "own_gram")


@pytest.fixture(scope="module")
def measured(policies, tmp_path_factory):
    """A finished measurement: its folder, its summary, its table by pair, and how often what was called."""
    folder, load = tmp_path_factory.mktemp("signal"), Counted(load_policy)
    with pytest.MonkeyPatch.context() as patch:
        counted = {name: Counted(getattr(measure, name)) for name in COUNTED}
        for name, function in counted.items():
            patch.setattr(measure, name, function)
        summary = measurement(policies, folder, load=load).run()
    table = dict(zip(PAIRS, pd.read_parquet(folder / "table.parquet").to_dict("records"), strict=True))
    calls = {name: function.calls for name, function in counted.items()} | {"load": load.calls}
    return folder, summary, table, calls


def samples(folder, name, key):
    """A column of a policy's rollouts, by prompt."""
    flat = [row[key] for row in read_table(folder / "samples" / f"{name}.parquet")]
    return [flat[start : start + SETTINGS.rollouts] for start in range(0, len(flat), SETTINGS.rollouts)]


def source_of(pair):
    return f"{pair.origin:06d}-resample" if pair.kind == "resample" else pair.source


@pytest.fixture(scope="module")
def models(policies):
    return {name: load_policy(folder).eval() for name, folder in policies[1].items()}


def scores(policies, models, folder, sampler, scorer):
    """Log-probs of `sampler`'s scored tokens, as stored and under `scorer` one at a time, and their mask."""
    tiny, rows = policies[0], list(policies[0].dataset)
    stored, other = [], []
    tokens, logps = samples(folder, sampler, "token_ids"), samples(folder, sampler, "logps")
    for row, of_tokens, of_logps in zip(rows[: SETTINGS.prompts], tokens, logps, strict=True):
        for place in range(SETTINGS.scored):
            width = (0, SETTINGS.max_new_tokens - len(of_tokens[place]))
            scored = completion_logps(models[scorer], tiny.processor, [row], [of_tokens[place]])[0]
            stored.append(np.pad(of_logps[place], width, constant_values=np.nan))
            other.append(np.pad(scored, width, constant_values=np.nan))
    stored, other = torch.tensor(np.array(stored)), torch.tensor(np.array(other))
    return stored, other, ~stored.isnan()


# Numbers


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.file)
def test_proxies_are_those_of_learning_signal_on_the_stored_rollouts(policies, models, measured, pair):
    folder, _, table, _ = measured
    origin = f"{pair.origin:06d}"
    model_of_source = origin if pair.kind == "resample" else pair.source
    q, π, mask = scores(policies, models, folder, source_of(pair), origin)
    own_π, own_q, own_mask = scores(policies, models, folder, origin, model_of_source)
    for proxy in ("kl", "second_moment", "sequence"):
        cost = variance_cost(π, q, mask, proxy, c=SETTINGS.c)
        assert table[pair][proxy] == pytest.approx(cost, rel=1e-4), proxy
        own_cost = variance_cost(own_π, own_q, own_mask, proxy, c=SETTINGS.c, direction="policy")
        assert table[pair][f"{proxy}_policy"] == pytest.approx(own_cost, rel=1e-4), proxy
    assert table[pair]["token_kl"] == pytest.approx(float((q - π)[mask].mean()), abs=1e-5)
    assert table[pair]["token_kl_policy"] == pytest.approx(float((own_π - own_q)[own_mask].mean()), abs=1e-5)
    if pair.kind != "resample":
        assert min(table[pair][name] for name in PROXY_COSTS if name != "sequence") > 1.001


def test_the_weights_of_whole_sequences_are_seen_above_their_floor(policies, models, measured):
    """Weights of sequences have so heavy a tail that 16 of the source's may well average to less than E[W²] ≥ 1 and
    are then returned as 1: that is so where the sample says so, and only there."""
    folder, _, table, _ = measured
    above = 0
    for pair in PAIRS:
        q, π, mask = scores(policies, models, folder, source_of(pair), f"{pair.origin:06d}")
        mean = float(torch.where(mask, π - q, 0.0).sum(dim=1).mul(2).exp().mean())
        assert table[pair]["sequence"] == pytest.approx(max(mean, 1.0), rel=1e-4)
        above += mean > 1.1
    assert above >= 2


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.file)
def test_quality_is_counted_on_the_stored_rollouts(measured, pair):
    folder, _, table, _ = measured
    source, policy = (
        torch.tensor(samples(folder, name, "correct")) for name in (source_of(pair), f"{pair.origin:06d}")
    )  # fmt: skip
    expected, failing = signal_quality(source, policy)
    assert table[pair]["quality"] == pytest.approx(expected)
    assert table[pair]["failing"] == failing
    failed = ~policy.any(dim=1)
    assert table[pair]["quality_1"] == pytest.approx(float(source[failed].float().mean()))
    assert 0 < failing < SETTINGS.prompts


def test_the_verdicts_are_mixed_enough_to_tell(measured):
    qualities = [row["quality"] for row in measured[2].values()]
    assert len(set(qualities)) > 2


@pytest.mark.parametrize("pair", [p for p in PAIRS if p.kind == "resample"], ids=lambda pair: pair.file)
def test_at_distance_zero_there_is_no_divergence_and_no_cost(measured, pair):
    folder, _, table, _ = measured
    row, sums = table[pair], pd.read_parquet(folder / "pairs" / pair.file)
    # the policy scores its own tokens again, in another batch: the last digits of single precision
    assert [row["token_kl"], row["token_kl_policy"]] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert [row[name] for name in PROXY_COSTS] == pytest.approx([1.0] * 6, abs=2e-5)
    assert [row[name] for name in MEASURED_COSTS] == pytest.approx([1.0] * 3, abs=0.6)
    assert row["gradient_exact"] == pytest.approx(row["gradient_sequence"], rel=1e-4)
    # and it is a second, independent sample
    first, second = (samples(folder, name, "token_ids") for name in (f"{pair.origin:06d}", source_of(pair)))
    assert first != second
    assert sums["uid"].tolist() == [group[0] for group in samples(folder, f"{pair.origin:06d}", "uid")]


@pytest.mark.parametrize("pair", [PAIRS[1], PAIRS[-1]], ids=lambda pair: pair.file)
def test_gradients_are_those_of_the_first_rollouts_of_the_first_prompts(policies, models, measured, pair):
    tiny, folder = policies[0], measured[0]
    origin, count = f"{pair.origin:06d}", SETTINGS.gradients
    rows = list(tiny.dataset)[:count]
    first = {(name, key): [group[0] for group in samples(folder, name, key)][:count]
             for name in (origin, pair.source) for key in ("token_ids", "logps")}  # fmt: skip
    found = source_gradients(
        models[origin], tiny.processor, rows, first[pair.source, "token_ids"], first[pair.source, "logps"]
    )
    own = own_gram(models[origin], tiny.processor, rows, first[origin, "token_ids"])
    under_source = completion_logps(models[pair.source], tiny.processor, rows, first[origin, "token_ids"])
    ln_w = [np.subtract(π, q) for π, q in zip(first[origin, "logps"], under_source, strict=True)]
    terms = both_sided(found, own, ln_w)
    sums = pd.read_parquet(folder / "pairs" / pair.file)
    expected = {"gradient_own": terms["own"], "gradient_current": squared_deviations(found.plain),
                "gradient_exact": terms["exact"], "gradient_sequence": terms["sequence"]}  # fmt: skip
    for name, values in expected.items():
        assert sums[name][:count].to_numpy() == pytest.approx(values, rel=1e-3), name
        assert (sums[name][count:] == 0).all()
    assert sums["gradients"].tolist() == [1.0] * count + [0.0] * (SETTINGS.prompts - count)


def test_distance_costs_in_the_summary_too(measured):
    folder, summary, table, _ = measured
    assert summary == json.loads((folder / "signal.json").read_text())
    costs = {pair.distance: row["second_moment_policy"] for pair, row in table.items() if pair.origin == 0}
    assert costs[0] < costs[10] < costs[20]
    assert set(summary["origins"]) == {"0", "10"}
    assert [pair.kind for pair in PAIRS if pair.origin == 10] == ["resample", "future", "past", "teacher"]


# What it costs


def test_a_policy_generates_once_and_a_pair_is_scored_twice(measured):
    calls = measured[3]
    assert calls["sample_rollouts"] == len(STEPS) + 1 + 2  # and each origin a second time
    assert (
        calls["completion_logps"] == 2 * len(PAIRS) + calls["sample_rollouts"]
    )  # and each sample under its own policy
    assert calls["own_gram"] == 2  # once for each origin
    # to sample: one each; to compare: each origin once, and the source of each pair but a resample
    assert calls["load"] == 6 + 2 + len([pair for pair in PAIRS if pair.kind != "resample"])


def test_one_policy_is_in_memory_while_sampling_and_two_in_a_comparison(tmp_path):
    # the policy with pictures, whose shared vision tower is a reference cycle
    weights, alive = [], []

    def load(folder):
        model = load_policy(folder)
        weights.append(weakref.ref(model.get_input_embeddings()))  # the model may go and leave its weights behind
        alive.append(sum(reference() is not None for reference in weights))
        return model

    settings = replace(SETTINGS, prompts=2, rollouts=1, scored=1, gradients=2, max_new_tokens=2, resamples=2)
    pairs = plan_pairs(STEPS, [0, 10], past=0)
    gc.collect()
    gc.disable()  # or Python may clean up behind a measurement that does not
    try:
        measurement(
            saved("pictures", tmp_path), tmp_path / "signal", pairs, settings, lambda *_: Verdict.WRONG, load=load
        ).run()
    finally:
        gc.enable()
    assert alive[:5] == [1] * 5  # three policies, two of them twice
    assert alive[5:] == [1, 2, 2, 1, 2]  # each origin, and its sources one after the other


# Stopped, and going on


def test_a_measurement_that_is_killed_thrice_ends_with_the_same_table(policies, measured, tmp_path, monkeypatch):
    # in the third sample; in the third pair, which was scored once; at the gradients of the second origin
    calls = dict.fromkeys(COUNTED, 0)
    for name, fail_at, left_over in (
        ("sample_rollouts", 3, 0),
        ("completion_logps", 6, 1),
        ("own_gram", 1, 0),
        ("", 0, 0),
    ):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.parquet")}
        counted = {each: Counted(getattr(measure, each), fail_at if each == name else None) for each in COUNTED}
        with monkeypatch.context() as patch:
            for each, function in counted.items():
                patch.setattr(measure, each, function)
            if name:
                with pytest.raises(KeyboardInterrupt):
                    measurement(policies, tmp_path).run()
                assert not (tmp_path / "signal.json").exists()
            else:
                summary = measurement(policies, tmp_path).run()
        for each, function in counted.items():
            calls[each] += function.calls - (each == name)
        calls[name or "own_gram"] -= left_over
        assert {path: path.stat().st_mtime_ns for path in before} == before
    assert calls == {name: measured[3][name] for name in COUNTED}  # nothing was done twice
    assert summary == measured[1]
    pd.testing.assert_frame_equal(*(pd.read_parquet(folder / "table.parquet") for folder in (tmp_path, measured[0])))
    assert not list(tmp_path.rglob(".*"))


def test_a_finished_measurement_loads_nothing_and_takes_another_c(policies, measured, monkeypatch):
    folder, summary, *_ = measured
    monkeypatch.setattr(measure, "sample_rollouts", None)
    other = replace(SETTINGS, c=1.0, resamples=20)
    try:
        found = measurement(policies, folder, settings=other, load=None).run()
        table = pd.read_parquet(folder / "table.parquet")
        assert table["kl"].to_numpy() == pytest.approx(np.exp(np.maximum(table["token_kl"], 0.0)))
        assert found["c"]["token_kl"]["gradient_exact"]["value"] == summary["c"]["token_kl"]["gradient_exact"]["value"]
    finally:
        assert measurement(policies, folder, load=None).run() == summary


def test_what_a_policy_samples_does_not_hang_on_the_pairs_beside_it(policies, measured, tmp_path):
    # so pairs can be added later
    few = plan_pairs([10, 20], [10])
    measurement(policies, tmp_path, pairs=few).run()
    found = {path.name: read_table(path) for path in tmp_path.glob("samples/*")}
    assert set(found) == {"000010.parquet", "000010-resample.parquet", "000020.parquet"}
    assert all(read_table(measured[0] / "samples" / name) == rows for name, rows in found.items())
    for pair in few:
        assert read_table(tmp_path / "pairs" / pair.file) == read_table(measured[0] / "pairs" / pair.file)


# What is refused


def test_other_settings_or_prompts_in_the_folder_are_refused(policies, measured):
    folder = measured[0]
    for change in ({"rollouts": 4}, {"seed": 1}, {"prompts": 7}, {"max_new_tokens": 5}):
        with pytest.raises(ValueError, match="holds other settings or prompts"):
            measurement(policies, folder, settings=replace(SETTINGS, **change))
    tiny, folders = policies
    with pytest.raises(ValueError, match="holds other settings or prompts"):
        Measurement(folder, folders, PAIRS, tiny.processor, list(tiny.dataset)[1:], verifier, SETTINGS)
    for name in ("answer", "prompt"):
        rows = [dict(row) for row in tiny.dataset]
        rows[1][name] = rows[0][name] if rows[0][name] != rows[1][name] else "something else"
        with pytest.raises(ValueError, match="other prompts, answers or pictures under the same uids"):
            Measurement(folder, folders, PAIRS, tiny.processor, rows, verifier, SETTINGS)


def test_what_is_asked_is_told_apart_by_pictures_too():
    rows = [{"uid": "a", "prompt": [{"role": "user", "content": "?"}], "answer": "1", "image": Image.new("L", (4, 4))}]
    inline = [{"uid": "a", "prompt": [{"role": "user", "content": [{"type": "image", "image": rows[0]["image"]}]}]}]
    assert content_digest(rows) == content_digest([{**rows[0], "uid": "b", "image": Image.new("L", (4, 4))}])
    assert content_digest(rows) != content_digest([{**rows[0], "image": Image.new("L", (4, 4), 9)}])
    assert content_digest(inline) == content_digest(copy.deepcopy(inline)) != content_digest(rows)


def test_what_was_sampled_is_kept_whatever_is_measured_from_it(policies, measured, tmp_path, monkeypatch, caplog):
    """With more rollouts scored, other parameters and fewer gradients: as if it had been measured so from the start."""
    few = PAIRS[:2]
    other = replace(SETTINGS, scored=SETTINGS.rollouts, gradients=2, parameters="norm")
    expected = measurement(policies, tmp_path / "anew", few, other).run()
    measurement(policies, tmp_path / "again", few).run()
    with monkeypatch.context() as patch:
        patch.setattr(measure, "sample_rollouts", None)
        found = measurement(policies, tmp_path / "again", few, other).run()
    assert found == expected
    assert "other scored, gradients, parameters than before. What was sampled is kept" in caplog.text


def test_gradients_that_will_not_fit_are_refused_before_anything_is_sampled(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "sample_rollouts", None)
    monkeypatch.setattr(gradients, "device_memory", lambda device: 4 * 3 * 400)
    with pytest.raises(ValueError, match=r"gradients\) over [\d,]+ parameters take .* Select fewer parameters, \d+ at"):
        measurement(policies, tmp_path).run()


def test_gradients_that_nobody_asked_for_are_left_out_where_they_do_not_fit(policies, tmp_path, monkeypatch, caplog):
    """The measurement goes on to its end without them; a number of them would be refused."""
    few, free = PAIRS[:2], replace(SETTINGS, gradients=WHERE_THEY_FIT)
    assert measurement(policies, tmp_path / "roomy", few, free).settings.gradients == SETTINGS.prompts < GRADIENTS
    monkeypatch.setattr(gradients, "device_memory", lambda device: 4 * 3 * 400)
    found = measurement(policies, tmp_path / "narrow", few, free).run()
    assert found == measurement(policies, tmp_path / "none", few, replace(SETTINGS, gradients=0)).run()
    assert found["settings"]["gradients"] == 0 and "V is taken from its proxies alone: 8 gradients over" in caplog.text
    named = replace(free, parameters="no such")
    with pytest.raises(ValueError, match="No trainable parameter matches 'no such'"):
        measurement(policies, tmp_path / "named", few, named)


def test_what_fits_is_known_from_the_shapes_of_a_policy(tmp_path, monkeypatch, caplog):
    """Qwen3-0.6B as it is published: of all weights nothing fits a GPU of 80 GiB, of one projection everything."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    more = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
    Qwen3Config(**shape, **more).save_pretrained(tmp_path)
    monkeypatch.setattr(gradients, "device_memory", lambda device: 80 * 2**30)
    assert with_gradients(SignalSettings(), tmp_path).gradients == 0
    assert "64 gradients over 596,049,920 parameters take 142.1 GiB, more than 20.0" in caplog.text
    assert with_gradients(SignalSettings(prompts=8), tmp_path).gradients == 0
    assert "the gradients of a response of 512 tokens over 596,049,920 parameters take 1,136.9 GiB" in caplog.text
    assert with_gradients(SignalSettings(parameters="layers.27.self_attn.o_proj"), tmp_path).gradients == 64
    assert with_gradients(SignalSettings(gradients=3), tmp_path / "is not asked").gradients == 3


def test_prompts_that_leave_no_room_are_refused_before_anything_is_sampled(policies, tmp_path, monkeypatch):
    tiny, folders = policies
    rows = [dict(row) for row in tiny.dataset]
    rows[2]["prompt"] = [{"role": "user", "content": rows[2]["prompt"][0]["content"] + " 0" * 600}]
    monkeypatch.setattr(measure, "sample_rollouts", None)
    with pytest.raises(ValueError, match=rf"Uid {rows[2]['uid']!r} has a prompt .* up to 6 \(max_new_tokens\)"):
        Measurement(tmp_path, folders, PAIRS, tiny.processor, rows, verifier, SETTINGS, quiet=True).run()
    with pytest.raises(ValueError, match="score_batch is 0; it must be at least 1"):
        Measurement(tmp_path, folders, PAIRS, tiny.processor, rows, verifier, SETTINGS, score_batch=0)


def test_another_runs_weights_under_the_same_names_are_refused(policies, measured):
    tiny, folders = policies
    first, second = sorted(folders)[:2]
    swapped = {**folders, first: folders[second]}
    with pytest.raises(ValueError, match=rf"other weights under the names \['{first}'\]"):
        Measurement(measured[0], swapped, PAIRS, tiny.processor, list(tiny.dataset), verifier, SETTINGS)


def test_too_few_rows_are_refused(policies, tmp_path):
    with pytest.raises(ValueError, match="prompts is 13, but the data set has 12 rows"):
        measurement(policies, tmp_path / "new", settings=replace(SETTINGS, prompts=13))
    assert not (tmp_path / "new").exists()


def test_a_policy_that_never_fails_is_refused_after_its_first_sample(policies, tmp_path, monkeypatch):
    counted = Counted(measure.sample_rollouts)
    monkeypatch.setattr(measure, "sample_rollouts", counted)
    with pytest.raises(ValueError, match=r"policy 000000 fails none of the 8 prompts in 3 rollouts.*harder prompts"):
        measurement(policies, tmp_path, verifier=lambda text, row: Verdict.CORRECT).run()
    assert counted.calls == 1


def test_another_architecture_is_refused(policies, tmp_path):
    tiny, folders = policies
    model = tiny.build()
    model.config.get_text_config().rms_norm_eps = 0.5
    save_policy(model, tiny.processor, tmp_path / "other")
    with pytest.raises(ValueError, match=r"000000 and 000020 .* differ in architecture: \[.*rms_norm_eps"):
        measurement((tiny, {**folders, "000020": tmp_path / "other"}), tmp_path / "signal")
    assert not (tmp_path / "signal").exists()
    # what only describes how it was saved does not count
    config = json.loads((folders["000010"] / "config.json").read_text())
    config |= {"transformers_version": "1.0", "use_cache": False, "torch_dtype": "bfloat16"}
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "config.json").write_text(json.dumps(config))
    check_policies({"000000": folders["000000"], "000010": tmp_path / "same"}, tiny.processor)


def test_ids_that_trl_writes_into_a_checkpoint_are_no_other_architecture(policies, tmp_path):
    """Qwen's base names a BOS that its tokenizer lacks, Llama's no pad; TRL's Trainer writes the tokenizer's own."""
    tiny, folders = policies
    base, trained = tmp_path / "base", folders["000010"]
    shutil.copytree(folders["000000"], base)
    config = json.loads((base / "config.json").read_text())
    for change in ({"bos_token_id": 0, "pad_token_id": None}, {"bos_token_id": None, "eos_token_id": [2, 0]}):
        (base / "config.json").write_text(json.dumps({**config, **change}))
        check_policies({"base": base, "trained": trained}, tiny.processor)
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="differ in architecture"):
        check_policies({"base": base, "trained": trained}, tiny.processor)


def test_a_policy_that_bends_its_own_sampling_is_refused_before_anything_is_sampled(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "sample_rollouts", None)

    def load(folder):
        model = load_policy(folder)
        model.generation_config.min_p = 0.05
        return model

    with pytest.raises(ValueError, match=r"generation_config.json sets \{'min_p': 0.05\}: responses would come from"):
        measurement(policies, tmp_path, load=load).run()


def test_checkpoints_of_adapters_get_a_word_on_merging(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "adapter_config.json").write_text("{}")
    wanted = r"adapters \(LoRA\) only, such as checkpoint-5; .* python -m npo_core merge --checkpoint .*checkpoint-5"
    for base in (None, tmp_path / "base"):
        with pytest.raises(FileNotFoundError, match=wanted):
            find_checkpoints(tmp_path, base)


def test_another_tokenizer_is_refused(policies, tmp_path):
    tiny, folders = policies
    first, second, *others = vocabulary()
    tokenizer = build_tokenizer([second, first, *others])
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ValueError, match=r"The policy 000000 .* has another tokenizer"):
        check_policies({"000000": folders["000000"]}, tokenizer)
    check_policies({"000000": folders["000000"]}, tiny.processor)
    # a checkpoint without a tokenizer of its own, as slimmed ones are
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folders["000010"] / "config.json").read_text())
    check_policies({"000010": tmp_path / "bare"}, tokenizer)


def checkpoint(folder, config=True, weights="model.safetensors"):
    folder.mkdir(parents=True)
    if config:
        (folder / "config.json").touch()
    if weights:
        (folder / weights).touch()
    return folder


def test_checkpoints_are_found_by_step(tmp_path):
    for step in (10, 2, 100):
        checkpoint(tmp_path / f"checkpoint-{step}")
    sharded = checkpoint(tmp_path / "checkpoint-30", weights="model-00001-of-00002.safetensors")
    checkpoint(tmp_path / "checkpoint-40", config=False)
    checkpoint(tmp_path / "checkpoint-50", weights="optimizer.pt")
    for name in ("checkpoint-last", "checkpoint-2-copy", "checkpoint-7 (copy)", "checkpoint-007", "checkpoint-٣"):
        checkpoint(tmp_path / name)
    (tmp_path / "checkpoint-8").write_text("a file of this name")
    checkpoint(tmp_path / "other-60")
    found = find_checkpoints(tmp_path)
    assert list(found) == [2, 10, 30, 100]
    assert found[30] == sharded
    base = checkpoint(tmp_path / "base")
    assert find_checkpoints(str(tmp_path), str(base)) == {0: base, **found}


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_checkpoints(tmp_path / "none")
    base = checkpoint(tmp_path / "run" / "base")
    checkpoint(tmp_path / "run" / "checkpoint-5", weights=None)
    for start in (None, base):
        with pytest.raises(FileNotFoundError, match=r"holds no checkpoint: .*checkpoint-<step>"):
            find_checkpoints(tmp_path / "run", start)


# A run of ours


@pytest.fixture(scope="module")
def visual(tmp_path_factory):
    return saved("words", tmp_path_factory.mktemp("visual"))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_a_run_of_ours_is_measured_in_the_precision_and_over_the_vocabulary_of_its_training(
    visual, tmp_path, monkeypatch, half, masked
):
    """Gradients too: weights that were made 16 bits without one, for a score, would be remembered so."""
    (tiny, folders), seen = visual, set()

    def load(folder, *_):
        model = load_policy(folder)
        layer = next(part for part in model.model.language_model.modules() if isinstance(part, torch.nn.Linear))
        layer.register_forward_hook(lambda _, __, out: seen.add((torch.is_grad_enabled(), out.dtype)))
        return model

    prepared = SimpleNamespace(
        base=folders["000000"], processor=tiny.processor, train=tiny.dataset, verifier=verifier
    )  # fmt: skip
    monkeypatch.setattr(stages, "run", lambda *_: SimpleNamespace(path=tmp_path, branch=lambda _: tmp_path))
    monkeypatch.setattr(stages, "prepare", lambda *_: prepared)
    monkeypatch.setattr(signal_run, "complete_checkpoints", lambda *_, **__: {10: folders["000010"]})
    monkeypatch.setattr(signal_run, "teacher_folder", lambda *_: folders["teacher"])
    monkeypatch.setattr("npo_core.world.policies.load_policy", load)
    changes = {"mixed_precision": "bf16" if half else "no", "mask_unsampled": masked}
    settings = replace(SETTINGS, rollouts=2, scored=1, gradients=2)
    made = signal_run.measure_run(resolve_config("grpo", "smoke", 0, changes), [0], settings, quiet=True)
    products = torch.bfloat16 if half else torch.float32
    assert seen == {(False, products), (True, products)}
    assert made.summary["computing"] == {"dtype": "float32", "mixed_precision": "bf16" if half else "no"}

    policy, rows = load_policy(folders["000000"]).eval(), list(tiny.dataset.select(range(settings.prompts)))
    left, whole = [tiny.processor.image_token_id], ()
    firsts = {
        name: read_table(made.folder / "samples" / f"{name}.parquet")[:: settings.rollouts]
        for name in ("000000", "000010")
    }
    tokens = {name: [tuple(row["token_ids"]) for row in first] for name, first in firsts.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        scored = {
            unsampled: np.concatenate(
                completion_logps(policy, tiny.processor, rows, tokens["000000"], unsampled=unsampled)
            )
            for unsampled in (tuple(left), whole)
        }
    kept = np.concatenate([row["logps"] for row in firsts["000000"]])
    expected, other = (scored[tuple(left)], scored[whole]) if masked else (scored[whole], scored[tuple(left)])
    assert kept == pytest.approx(expected, abs=1e-5) and np.abs(kept - other).min() > 1e-3
    asked = policy, tiny.processor, rows[:2]
    behaviour = [row["logps"] for row in firsts["000010"]][:2]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        grams = own_gram(*asked, tokens["000000"][:2], unsampled=left if masked else whole)
        found = source_gradients(*asked, tokens["000010"][:2], behaviour, unsampled=left if masked else whole)
    for row, gram in zip(read_table(made.folder / "own" / "000000.parquet"), grams, strict=True):
        assert row["gram"] == pytest.approx(gram.flatten().tolist(), rel=1e-3, abs=1e-6)
    pair = next(pair for pair in made.pairs if pair.source == "000010")
    table = pd.read_parquet(made.folder / "pairs" / pair.file)
    assert table["gradient_current"][:2].tolist() == pytest.approx(squared_deviations(found.plain).tolist(), rel=1e-3)
