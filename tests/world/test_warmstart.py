"""The base policy: what decides it, the imperfect corpus, and that it is made once."""

import json
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from otherwise import pair

from npo_core.guidance.fingerprints import tokenizer_digest
from npo_core.runs.config import RunConfig, resolve_config
from npo_core.runs.folder import project_folder
from npo_core.world import warmstart
from npo_core.world.policies import TinyQwen3VLProcessor, load_policy, load_processor
from npo_core.world.tasks import FAMILIES, Problem, sample_problems, vocabulary
from npo_core.world.warmstart import (
    WORLD_FIELDS,
    base_digest,
    base_policy_folder,
    fact_errors,
    fact_kinds,
    imperfect_states,
    teacher_config,
    teacher_folder,
    warm_start,
)

CONFIG = resolve_config("grpo", "smoke", overrides={"warmstart_steps": 3, "warmstart_batch": 4})

FACTS = [fact for family in FAMILIES for fact in family.facts]
"""Every elementary fact, in a fixed order."""


@pytest.mark.parametrize("setting", fields(RunConfig), ids=lambda setting: setting.name)
def test_the_digest_depends_on_the_settings_of_the_world_and_on_no_other(setting):
    config, other = pair(setting, "grpo")
    assert (base_digest(other) != base_digest(config)) == (setting.name in WORLD_FIELDS)


def test_the_digest_depends_on_the_words_and_on_the_format(monkeypatch):
    digest = base_digest(CONFIG)
    assert set(WORLD_FIELDS) <= {setting.name for setting in fields(RunConfig)}
    with monkeypatch.context() as patch:
        patch.setattr(warmstart, "vocabulary", lambda: [*vocabulary(), "more"])
        assert base_digest(CONFIG) != digest
    with monkeypatch.context() as patch:
        patch.setattr(warmstart, "FORMAT", warmstart.FORMAT + 1)
        assert base_digest(CONFIG) != digest
    assert base_digest(CONFIG) == digest


@pytest.mark.parametrize(("easy", "middling"), [(0.4, 0.3), (1.0, 0.0), (0.0, 0.0), (0.25, 0.75)])
def test_facts_are_easy_middling_and_hard_in_the_given_shares(easy, middling):
    config = RunConfig(easy_share=easy, middling_share=middling, easy_error=0.1, middling_error=0.5, hard_error=0.9)
    errors = fact_errors(config)
    assert list(errors) == FACTS
    assert set(errors.values()) <= {0.1, 0.5, 0.9}
    for family in FAMILIES:  # and so in every family: none is all easy or all hard
        counts = Counter(errors[fact] for fact in family.facts)
        assert counts[0.1] == pytest.approx(easy * len(family.facts), abs=0.5)
        assert counts[0.5] == pytest.approx(middling * len(family.facts), abs=0.5)


def test_the_world_seed_decides_which_facts_are_hard():
    config = RunConfig()
    assert fact_errors(config) == fact_errors(config.with_changes(policy_seed=1, data_seed=1, seed=1))
    other = fact_errors(config.with_changes(world_seed=1))
    assert other != fact_errors(config)
    assert Counter(other.values()) == Counter(fact_errors(config).values())


def test_no_fact_of_the_presets_is_out_of_reach():
    """What the corpus never writes, no exploration finds."""
    for preset in ("cpu", "smoke"):
        errors = fact_errors(resolve_config("grpo", preset))
        assert max(errors.values()) <= 0.98, preset


def test_a_corpus_without_errors_is_the_exact_solution():
    errors = dict.fromkeys(FACTS, 0.0)
    for problem in sample_problems("train", 40, 0):
        assert imperfect_states(problem, errors, np.random.default_rng(0)) == problem.states()


def test_the_chain_goes_on_from_the_wrong_state():
    # the first fact is always wrong and all others are right: what follows is exact from what was written
    for problem in sample_problems("train", 80, 0):
        first = (problem.suite, problem.start, problem.glyphs[0])
        errors = dict.fromkeys(FACTS, 0.0) | {first: 1.0}
        states = imperfect_states(problem, errors, np.random.default_rng(0))
        before = [problem.start, *states[:-1]]
        for state, glyph, following in zip(before, problem.glyphs, states, strict=True):
            right = problem.family.rule(state, glyph)
            assert (following == right) == ((problem.suite, state, glyph) != first)
            assert following in range(problem.family.states)


@pytest.mark.parametrize("family", FAMILIES[:3], ids=lambda family: family.suite)
def test_each_fact_is_wrong_as_often_as_it_should_be_and_evenly_over_the_wrong_states(family):
    rng = np.random.default_rng(0)
    errors = {fact: float(rng.uniform(0.05, 0.95)) for fact in family.facts}
    written: dict[tuple[int, int], Counter] = {}
    for _ in range(12_000):
        glyphs = tuple(rng.integers(0, len(family.glyphs), size=4).tolist())
        problem = Problem(family.suite, int(rng.integers(family.states)), glyphs)
        states = imperfect_states(problem, errors, rng)
        for state, glyph, following in zip([problem.start, *states[:-1]], glyphs, states, strict=True):
            written.setdefault((state, glyph), Counter())[following] += 1
    assert len(written) == len(family.facts)
    for (state, glyph), counts in written.items():
        total, error = counts.total(), errors[family.suite, state, glyph]
        right = family.rule(state, glyph)
        assert 1 - counts[right] / total == pytest.approx(error, abs=5 * np.sqrt(error * (1 - error) / total))
        each = error / (family.states - 1)
        for wrong in set(range(family.states)) - {right}:
            assert counts[wrong] / total == pytest.approx(each, abs=5 * np.sqrt(each * (1 - each) / total))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The base policy of CONFIG, made by a first call under an own runs folder."""
    with pytest.MonkeyPatch.context() as patch:
        runs = tmp_path_factory.mktemp("runs")
        patch.setenv("NPO_RUNS", str(runs))
        folder = base_policy_folder(CONFIG, quiet=True)
        assert folder.parent == runs / "base"
        yield folder


def test_a_warm_start_writes_a_folder_that_loads(made):
    assert made.name == f"tiny-{base_digest(CONFIG)}"
    processor = load_processor(made)
    assert type(processor) is TinyQwen3VLProcessor
    policy = load_policy(made)
    assert policy.config.text_config.hidden_size == CONFIG.hidden
    assert policy.config.text_config.vocab_size == len(processor.tokenizer)
    assert [path.name for path in made.parent.iterdir()] == [made.name]  # nothing unfinished beside it


def test_a_second_call_takes_what_is_there(made, monkeypatch):
    written = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    monkeypatch.setattr(warmstart, "warm_start", lambda *_, **__: pytest.fail("trained again"))
    assert base_policy_folder(CONFIG, quiet=True) == made
    assert base_policy_folder(CONFIG.with_changes(seed=5, learning_rate=1.0e-3), quiet=True) == made
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == written


class Read:
    """A configuration that notes which of its settings are read."""

    def __init__(self, config):
        self.config, self.names = config, set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.config, name)


def test_a_warm_start_is_repeatable_trains_and_reads_the_settings_of_the_world_only(made, tmp_path):
    config = Read(CONFIG)
    again = warm_start(config, tmp_path / "again", quiet=True)
    assert config.names == set(WORLD_FIELDS)
    one, two = (load_policy(folder).state_dict() for folder in (made, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    processor = load_processor(made)
    untrained = warmstart.build_tiny_policy(
        processor,
        warmstart.TinyPolicySpec(CONFIG.hidden, CONFIG.layers, CONFIG.heads, CONFIG.vision_hidden, CONFIG.vision_depth),
        CONFIG.policy_seed,
    ).state_dict()
    moved = [name for name in one if not torch.equal(one[name], untrained[name])]
    assert any("language_model" in name for name in moved)
    assert any("visual" in name for name in moved)


def test_the_learning_rate_warms_up_and_comes_down():
    rates = [warmstart._schedule(step, 100) for step in range(100)]
    assert rates[0] < rates[4] < rates[9]
    assert max(rates) <= 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


def test_a_policy_folder_is_taken_as_it_is_and_a_wrong_one_refused(made, tmp_path):
    assert base_policy_folder(CONFIG.with_changes(policy=str(made))) == made
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        base_policy_folder(CONFIG.with_changes(policy=str(tmp_path)))


def test_the_teacher_is_of_another_seed_and_its_corpus_clean_and_in_another_form():
    config = resolve_config("grpo", "cpu", overrides={"teacher_seed": 5, "teacher_form_share": 0.75})
    teacher = teacher_config(config)
    changed = {
        setting.name for setting in fields(RunConfig) if getattr(teacher, setting.name) != getattr(config, setting.name)
    }
    assert changed == {"policy_seed", "second_form_share", "easy_error", "middling_error", "hard_error"}
    assert teacher.policy_seed == 5
    assert teacher.second_form_share == 0.75
    assert set(fact_errors(teacher).values()) == {0.0}
    assert base_digest(teacher) != base_digest(config)
    # the same facts are hard, and the model is as large: only what it was taught differs
    assert fact_kinds(teacher) == fact_kinds(config)


def test_a_teacher_that_is_the_base_policy_or_of_a_foreign_one_is_refused():
    config = resolve_config("grpo", "cpu")
    with pytest.raises(ValueError, match=r"both 1; a teacher is another policy"):
        teacher_config(config.with_changes(policy_seed=1, teacher_seed=1))
    with pytest.raises(ValueError, match=r"'/elsewhere'; only the tiny policy has a teacher of its own"):
        teacher_config(config.with_changes(policy="/elsewhere"))


@pytest.mark.parametrize("method", ["grpo", "autonpo"])
def test_the_teacher_of_the_cpu_preset_is_shipped_and_comparable_with_the_base_policy(method, monkeypatch):
    monkeypatch.setattr(warmstart, "warm_start", lambda *_, **__: pytest.fail("trained"))
    config = resolve_config(method, "cpu")
    base, teacher = base_policy_folder(config), teacher_folder(config)
    assert teacher == project_folder() / "data" / "base" / f"tiny-{base_digest(teacher_config(config))}"
    assert teacher != base
    assert tokenizer_digest(load_processor(teacher)) == tokenizer_digest(load_processor(base))
    described = [json.loads((folder / "config.json").read_text()) for folder in (base, teacher)]
    assert described[0] == described[1]
    one, other = (load_policy(folder).state_dict() for folder in (base, teacher))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("q_proj.weight"))


def test_a_teacher_is_made_once_beside_the_base_policy(made, monkeypatch):
    trained = []
    monkeypatch.setattr(
        warmstart, "warm_start", lambda config, folder, quiet: trained.append((config, folder)) or folder
    )
    folder = teacher_folder(CONFIG, quiet=True)
    assert trained == [(teacher_config(CONFIG), folder)]
    assert folder == made.with_name(f"tiny-{base_digest(teacher_config(CONFIG))}")
