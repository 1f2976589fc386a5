"""The guidance cache: what may not guide, which guide is kept, and that the file gives back what was put in."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_core.files import write_table
from npo_core.guidance.sources import GuidanceSource, GuidanceWindow
from npo_core.guidance.trajectories import RULES, Filled, GuidanceCache, GuidanceRefused, Trajectory, as_row

EOS = 2
GOOD = Trajectory("a", (5, 6, EOS), (-0.5, -1.0, -0.25), 40, True, "5 6", (-1.0, -1.0, -1.0))


def cache(**changes) -> GuidanceCache:
    return GuidanceCache(**{"eos_token_ids": [EOS], "max_completion_length": 4, "tokenizer_digest": "t"} | changes)


def of(uid: str, tokens: int, policy: float, correct: bool = True) -> Trajectory:
    """A trajectory of so many tokens with so high a mean log-prob under the policy to be guided."""
    ids = (*range(10, 10 + tokens - 1), EOS)
    return Trajectory(uid, ids, (-1.0,) * tokens, 1, correct, f"{tokens} tokens", (policy,) * tokens)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (replace(GOOD, correct=False), "not verified correct"),
        (replace(GOOD, token_ids=(5, 6, 7, 8, EOS), logps=(-1.0,) * 5), "5 tokens; at most 4"),
        (replace(GOOD, token_ids=(5, 6, 7)), "end-of-sequence"),
        (replace(GOOD, token_ids=(EOS, 5, 6)), "end-of-sequence"),
        (replace(GOOD, token_ids=(5, EOS, EOS)), "goes on behind an end-of-sequence"),
        (replace(GOOD, token_ids=(), logps=()), "end-of-sequence"),
        (replace(GOOD, uid="stranger"), "unknown prompt 'stranger'"),
        (replace(GOOD, logps=(-0.5, -1.0)), "3 tokens but 2 log-probs"),
    ],
)
def test_what_may_not_guide_is_refused_and_changes_nothing(bad, complaint):
    guides = cache(known_uids=["a", "b"])
    with pytest.raises(GuidanceRefused, match=complaint):
        guides.add(bad)
    assert len(guides) == 0
    if bad.correct:
        assert guides.fill([bad]) == 1
        assert len(guides) == 0


def test_a_good_trajectory_guides_its_prompt_at_every_step():
    guides = cache(known_uids=["a"])
    guides.add(GOOD)
    assert "a" in guides
    assert list(guides) == [GOOD]
    assert guides.guide("a", 0) is guides.guide("a", 10**6) is GOOD
    assert guides.guide("b", 0) is None
    assert isinstance(guides, GuidanceSource)


def test_a_response_may_fill_the_whole_length_and_any_eos_ends_it():
    guides = cache(eos_token_ids=[EOS, 9])
    guides.add(replace(GOOD, token_ids=(5, 6, 7, 9), logps=(-1.0,) * 4))
    assert len(guides) == 1


def test_a_window_guides_from_its_start_to_before_its_stop():
    guides = cache()
    guides.add(GOOD)
    window = GuidanceWindow(guides, 3, 5)
    assert [window.guide("a", step) is GOOD for step in range(7)] == [False, False, False, True, True, False, False]
    assert window.guide("b", 3) is None


@pytest.mark.parametrize(("rule", "kept"), [("first", 1), ("shortest", 2), ("closest", 3)])
def test_the_rule_chooses_among_the_correct_ones(rule, kept):
    candidates = [
        of("a", 2, 0.0, correct=False),  # would win by every rule, were it correct
        of("a", 4, -3.0),
        of("a", 2, -2.0),
        of("a", 3, -1.0),
        of("b", 3, -1.0, correct=False),
    ]
    guides = cache()
    assert guides.fill(candidates, rule) == 0
    assert guides.guide("a", 0) is candidates[kept]
    assert "b" not in guides


def test_the_closest_is_closest_per_token_not_in_sum():
    long, short = of("a", 4, -1.0), of("a", 2, -1.5)
    assert sum(long.policy_logps) < sum(short.policy_logps)
    guides = cache()
    guides.fill([short, long], "closest")
    assert guides.guide("a", 0) is long


def test_the_first_of_equals_is_kept():
    twins = [of("a", 3, -1.0), replace(of("a", 3, -1.0), source_step=9)]
    for rule in RULES:
        guides = cache()
        guides.fill(twins, rule)
        assert guides.guide("a", 0) is twins[0]


def test_an_unusable_trajectory_is_counted_and_passed_over():
    guides = cache()
    assert guides.fill([of("a", 5, -1.0), of("a", 4, -1.0), of("b", 6, -1.0), of("c", 9, -1.0, False)]) == 2
    assert [guide.uid for guide in guides] == ["a"]
    assert len(guides.guide("a", 0).token_ids) == 4


def test_why_prompts_are_without_a_guide_is_said(tmp_path):
    filled = cache()
    wrong, unended = of("a", 2, -1.0, correct=False), replace(of("b", 2, -1.0), token_ids=(5, 6))
    assert filled.fill([wrong, unended, wrong, of("c", 2, -1.0)]) == 1
    text = str(filled.filled)
    assert text.startswith(
        "of 4 responses 2 were wrong, 1 right but no guides (the first: Guide for 'b' does not end with"
    )
    assert filled.fill([of("c", 2, -1.0)]) == 0
    assert str(filled.filled) == "of 1 responses 0 were wrong, 0 right but no guides", "of the last filling alone"
    long = replace(of("a", 2, -1.0, correct=False), token_ids=(5, 6))
    filled.fill([long, long, replace(long, token_ids=()), wrong])
    assert str(filled.filled).startswith("of 4 responses 4 were wrong (3 of these were cut off), 0 right")
    filled.fill([of("c", 2, -1.0)])
    filled.save(tmp_path / "not" / "there" / "guides.parquet")
    assert len(GuidanceCache.load(tmp_path / "not" / "there" / "guides.parquet")) == 1


def test_what_became_of_candidates_adds_up_over_turns():
    first, second = Filled(4, 3, 1, "one", 2), Filled(8, 2, 5, "two", 1)
    assert first + second == Filled(12, 5, 6, "one", 3) and Filled() + second == second


def test_the_closest_needs_log_probs_of_the_policy_to_be_guided():
    with pytest.raises(ValueError, match="policy_logps"):
        cache().fill([of("a", 3, -1.0), replace(of("a", 3, -1.0), policy_logps=None)], "closest")


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"'longest'\. Allowed: first, shortest, closest"):
        cache().fill([], "longest")


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable()),
        st.tuples(
            st.lists(st.tuples(st.integers(3, 2**31 - 1), st.floats(-50, 0, width=32)), max_size=3),
            st.integers(0, 10**6),
            st.text(max_size=10).filter(lambda text: text.isprintable()),
        ),
        max_size=4,
    )
)
def test_the_file_gives_back_what_was_put_in(tmp_path_factory, contents):
    path = tmp_path_factory.mktemp("cache") / "guides.parquet"
    guides = cache(known_uids=contents)
    for uid, (tokens, step, text) in contents.items():
        ids, logps = [token for token, _ in tokens], [logp for _, logp in tokens]
        guides.add(Trajectory(uid, (*ids, EOS), (*logps, -0.5), step, True, text))
    guides.save(path)
    again = GuidanceCache.load(path, "t", contents)
    assert list(again) == list(guides)
    assert (again.eos_token_ids, again.max_completion_length, again.tokenizer_digest) == ((EOS,), 4, "t")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_log_probs_are_kept_to_float32(tmp_path):
    guides = cache()
    guides.add(replace(GOOD, logps=(-0.1, -1 / 3, -12.3456789)))
    guides.save(tmp_path / "g.parquet")
    kept = GuidanceCache.load(tmp_path / "g.parquet").guide("a", 0).logps
    assert kept == tuple(float(np.float32(x)) for x in (-0.1, -1 / 3, -12.3456789))


@pytest.fixture
def saved(tmp_path):
    guides = cache()
    guides.add(GOOD)
    guides.save(tmp_path / "guides.parquet")
    return tmp_path / "guides.parquet"


def rewrite(path, **columns):
    """Change columns of a saved cache as somebody with a data frame would."""
    table = pq.read_table(path)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)


def test_the_path_may_be_a_string_and_the_temperature_of_the_log_probs_is_kept(tmp_path):
    guides = cache()
    guides.add(replace(GOOD, temperature=0.6))
    guides.save(str(tmp_path / "g.parquet"))
    (guide,) = GuidanceCache.load(str(tmp_path / "g.parquet"), "t")
    assert guide.temperature == 0.6


def test_a_file_that_says_no_temperature_was_scored_at_one(saved):
    pq.write_table(pq.read_table(saved).drop_columns("temperature"), saved)
    assert GuidanceCache.load(saved).guide("a", 0).temperature == 1.0


def test_another_tokenizer_is_refused(saved):
    assert len(GuidanceCache.load(saved, "t")) == 1
    with pytest.raises(ValueError, match="another tokenizer"):
        GuidanceCache.load(saved, "other")


def test_other_picture_settings_are_refused(tmp_path):
    path = tmp_path / "guides.parquet"
    GuidanceCache([9], 4, "t", image_digest="small").save(path)
    assert GuidanceCache.load(path, "t", image_digest="small").image_digest == "small"
    assert GuidanceCache.load(path, "t").image_digest == "small"
    with pytest.raises(ValueError, match=r"other picture settings \(small\) than this policy's \(large\)"):
        GuidanceCache.load(path, "t", image_digest="large")
    GuidanceCache([9], 4, "t").save(path)
    assert len(GuidanceCache.load(path, "t", image_digest="large")) == 0, "a cache that does not say is taken"


def test_a_cache_for_other_prompts_is_refused(saved):
    with pytest.raises(GuidanceRefused, match="unknown prompt 'a'"):
        GuidanceCache.load(saved, "t", known_uids=["b"])


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"reward": [0.0]}, "not verified correct"),
        ({"reward": [0.5]}, "not verified correct"),
        ({"token_ids": [[5, 6, 7]]}, "end-of-sequence"),
        ({"token_ids": [[5, 6, 7, 8, EOS]]}, "at most 4"),
        ({"logps": [[-1.0]]}, "1 log-probs"),
    ],
)
def test_a_tampered_cache_is_refused_on_loading(saved, columns, complaint):
    rewrite(saved, **columns)
    with pytest.raises(GuidanceRefused, match=complaint):
        GuidanceCache.load(saved)


def test_what_is_no_cache_is_refused_by_name(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        GuidanceCache.load(tmp_path / "none.parquet")
    for content in (b"", b"not parquet at all", saved.read_bytes()[:-20], saved.read_bytes()[:30]):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.parquet is not a parquet file"):
            GuidanceCache.load(tmp_path / "bad.parquet")
    write_table(tmp_path / "rollouts.parquet", [{"uid": "a"}])
    with pytest.raises(ValueError, match="not a guidance cache"):
        GuidanceCache.load(tmp_path / "rollouts.parquet")


def test_a_cache_of_a_later_format_is_refused(saved):
    table = pq.read_table(saved)
    about = table.schema.metadata[b"npo_guidance"].replace(b'"format": 1', b'"format": 99')
    pq.write_table(table.replace_schema_metadata({"npo_guidance": about}), saved)
    with pytest.raises(ValueError, match="format 99"):
        GuidanceCache.load(saved)


def test_a_trajectory_as_a_row_has_all_its_parts():
    assert Trajectory(**as_row(GOOD)) == GOOD
