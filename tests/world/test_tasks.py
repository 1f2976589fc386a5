"""The procedural tasks: rules, solver, pictures, splits, words and data order. Properties only: numbers may change."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from npo_core.guidance.verdicts import Verdict
from npo_core.guidance.verifiers import BoxedVerifier, behind_answer
from npo_core.runs.config import RunConfig, resolve_config
from npo_core.stages.factory import TEST_SEED
from npo_core.trainer.dataset import require_columns
from npo_core.world.policies import build_processor
from npo_core.world.tasks import (
    FAMILIES,
    SUITES,
    PathVerifier,
    Problem,
    conversation,
    family_of,
    make_dataset,
    parse_uid,
    sample_problems,
    split_of,
    vocabulary,
    write_response,
)
from npo_core.world.tasks.families import CELL
from npo_core.world.tasks.problems import COLUMNS, ROWS, SPACE, SPLITS

by_suite = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.suite)


@st.composite
def problems(draw):
    family = draw(st.sampled_from(FAMILIES))
    glyph = st.integers(0, len(family.glyphs) - 1)
    glyphs = draw(st.lists(glyph, min_size=family.lengths[0], max_size=family.lengths[1]))
    return Problem(family.suite, draw(st.integers(0, family.states - 1)), tuple(glyphs))


@pytest.fixture(scope="module")
def processor():
    return build_processor(vocabulary())


# Families


@by_suite
def test_a_rule_is_total_and_stays_among_the_states(family):
    for state in range(family.states):
        for glyph in range(len(family.glyphs)):
            following = family.rule(state, glyph)
            assert type(following) is int
            assert following in range(family.states)


@by_suite
def test_the_glyphs_of_a_family_are_different_operations(family):
    tables = {tuple(family.rule(state, glyph) for state in range(family.states)) for glyph in range(len(family.glyphs))}
    assert len(tables) == len(family.glyphs)
    # and each permutes the states: no chain forgets its start, and every state is met as often
    assert all(sorted(table) == list(range(family.states)) for table in tables)


@by_suite
def test_a_family_fits_the_picture_and_its_words(family):
    shortest, longest = family.lengths
    assert 1 <= shortest <= longest <= ROWS * COLUMNS
    assert len(set(family.glyphs)) == len(family.glyphs)
    assert family.states <= 10  # a state is one digit


def test_there_is_one_family_per_suite_and_a_fact_per_state_and_glyph():
    assert len(set(SUITES)) == len(FAMILIES)
    assert [family_of(suite) for suite in SUITES] == list(FAMILIES)
    facts = [fact for family in FAMILIES for fact in family.facts]
    assert len(set(facts)) == len(facts) == sum(family.states * len(family.glyphs) for family in FAMILIES)
    with pytest.raises(ValueError, match="Unknown suite 'mathvison'"):
        family_of("mathvison")


# The meaning of some families, told in other terms than the rules are written in


def walk_on_a_ring(ring, steps):
    """Paths of a family whose glyphs move so many places forward on a ring of states."""
    return lambda start, glyphs: [
        (ring * 9)[ring.index(start) + sum(steps[glyph] for glyph in glyphs[: count + 1])]
        for count in range(len(glyphs))
    ]


def walk_on_a_grid(start, glyphs):
    rows = [list(range(0, 4)), list(range(4, 8))]
    row, column = next((r, c) for r in range(2) for c in range(4) if rows[r][c] == start)
    path = []
    for glyph in glyphs:
        if glyph == "down":
            row = 1 - row
        else:
            column = (column + {"right": 1, "left": 3}[glyph]) % 4
        path.append(rows[row][column])
    return path


def gates_on_bits(start, glyphs):
    bits, path = f"{start:03b}", []
    for glyph in glyphs:
        flipped = "".join("10"[int(b)] for b in bits)
        bits = {"not": flipped, "shift": bits[1:] + bits[0], "swap": bits[::-1]}[glyph]
        path.append(int(bits, 2))
    return path


def hands_of_a_clock(start, glyphs):
    back = {"quarter": 1, "half": 4, "last": 6}
    face, path = list(range(8)), []
    for glyph in glyphs:
        for _ in range(back[glyph]):
            face = face[-1:] + face[:-1]
        path.append(face[start])
    return path


INDEPENDENT = {
    "chart": walk_on_a_ring(list(range(8)), {"low": 1, "middle": 2, "high": 3}),
    "colours": walk_on_a_ring(list(range(8)), {"red": 2, "blue": 4, "green": 5}),
    "path": walk_on_a_grid,
    "gates": gates_on_bits,
    "clock": hands_of_a_clock,
}


@pytest.mark.parametrize("title", INDEPENDENT)
def test_the_solver_against_another_implementation(title):
    (family,) = (family for family in FAMILIES if family.title == title)
    rng = np.random.default_rng(0)
    for start in range(family.states):
        for _ in range(20):
            glyphs = tuple(rng.integers(0, len(family.glyphs), size=rng.integers(1, 7)).tolist())
            words = [family.glyphs[glyph] for glyph in glyphs]
            places = INDEPENDENT[title](family.dial.index(start), words)
            expected = [family.dial[place] for place in places]
            assert Problem(family.suite, start, glyphs).states() == expected, (start, words)


@given(problems())
def test_the_solver_applies_one_rule_after_the_other(problem):
    states = problem.states()
    assert len(states) == problem.difficulty == len(problem.glyphs)
    for before, glyph, after in zip([problem.start, *states], problem.glyphs, states, strict=False):
        assert problem.family.rule(before, glyph) == after
    assert problem.answer.split() == [str(state) for state in states]


# No luck


def right_responses(problem: Problem) -> list[tuple[int, ...]]:
    """The responses of the world's format that the verifier takes, of all paths that a policy could write."""
    verifier, row = PathVerifier(), {"answer": problem.answer}
    paths = product(range(problem.family.states), repeat=problem.difficulty)
    return [path for path in paths if verifier(write_response(problem, path), row).correct]


@by_suite
def test_of_all_paths_one_is_right_and_chance_is_below_a_thousandth_at_every_length(family):
    shortest, longest = family.lengths
    example = next(p for p in sample_problems("train", 40, 0, [family.suite]) if p.difficulty == shortest)
    assert right_responses(example) == [tuple(example.states())]
    # one path in states^length, so no length is guessed more easily than the shortest
    assert all(family.states**length > 1000 for length in range(shortest, longest + 1))


MEETING = {"gates": 2, "dice": 3}
"""Glyphs of a family that lead from one state to the same other, at most; elsewhere all three lead apart. A shift and a
swap of bits leave 000 as it is, and the dice's factors make nothing of zero."""


@by_suite
def test_a_right_path_says_what_the_picture_shows(family):
    """Knowing the start and the rules is not enough. Without the picture each of the 3^n paths of six families is as
    likely as another; the best guess of all is right (2/3)^n of the time, a fifth at four steps: that of the gates,
    which can stay at 000."""
    meet = [Counter(family.rule(state, glyph) for glyph in range(3)).values() for state in range(family.states)]
    assert (max(map(max, meet)), len(family.glyphs)) == (MEETING.get(family.title, 1), 3)
    most = 2 if family.title in MEETING else 1
    for length in range(family.lengths[0], family.lengths[1] + 1):
        for start in range(family.states):
            pictures = product(range(3), repeat=length)
            paths = Counter(Problem(family.suite, start, glyphs).answer for glyphs in pictures)
            assert max(paths.values()) <= most**length, (length, start, paths.most_common(1))


@given(problem=problems(), data=st.data())
def test_a_correct_rollout_is_right_in_every_step(problem, data):
    """Every change of a right response, one step or more, is wrong."""
    right = problem.states()
    places = data.draw(st.sets(st.integers(0, len(right) - 1), min_size=1))
    other = [(state + 1 + data.draw(st.integers(0, problem.family.states - 2))) % problem.family.states if i in places
             else state for i, state in enumerate(right)]  # fmt: skip
    for second_form in (False, True):
        text = write_response(problem, other, second_form)
        assert PathVerifier()(text, {"answer": problem.answer}) is Verdict.WRONG
    for shorter in (right[:-1], right[1:], [*right, right[-1]], []):
        box = " ".join(map(str, shorter))
        assert not PathVerifier()(f"\\boxed{{ {box} }}", {"answer": problem.answer}).correct


@given(problem=problems(), second_form=st.booleans(), words=st.lists(st.sampled_from(vocabulary()), min_size=1))
def test_a_right_response_ends_with_its_box(problem, second_form, words):
    """Whatever of the world's words follow it, unless they end as a box themselves, which is then the answer."""
    row, right = {"answer": problem.answer}, write_response(problem, problem.states(), second_form)
    assert PathVerifier()(right, row) is PathVerifier()(f"{right} \n", row) is Verdict.CORRECT
    further = f"{right} {' '.join(words)}"
    assume(behind_answer(further))
    assert not PathVerifier()(further, row).correct
    assert PathVerifier()(f"{further} {right}", row) is Verdict.CORRECT, "what stands before it is free"
    braces = " ".join([right, *"}" * len(words)])
    assert BoxedVerifier()(braces, row) is Verdict.CORRECT and PathVerifier()(braces, row) is Verdict.WRONG
    assert PathVerifier()(problem.answer, row) is Verdict.UNPARSEABLE


# Uids and splits


@given(problems())
def test_a_uid_names_its_problem(problem):
    assert parse_uid(problem.uid) == problem


@given(problems(), problems())
def test_different_problems_have_different_uids(one, other):
    assert (one.uid == other.uid) == (one == other)


@pytest.mark.parametrize(
    "uid",
    [
        "",
        "mathvista",
        "mathvista-3",
        "mathvista--01",
        "mathvista-3-",
        "mathvison-3-01",
        "mathvista-3-01-0",
        "mathvista-x-01",
        "mathvista-3-0x",
        "mathvista-03-01",
        "mathvista-²-01",
        "mathvista-99-01",
        "mathvista-3-09",
    ],
)
def test_what_is_no_uid_is_refused_by_name(uid):
    with pytest.raises(ValueError, match=r"uid of this world|does not have") as caught:
        parse_uid(uid)
    assert repr(uid) in str(caught.value)


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_the_splits_share_no_problem_whatever_the_seeds(train_seed, test_seed):
    train = {problem.uid for problem in sample_problems("train", 60, train_seed)}
    test = {problem.uid for problem in sample_problems("test", 30, test_seed)}
    assert len(train) == 60
    assert len(test) == 30
    assert not train & test


@pytest.mark.parametrize("split", SPLITS)
def test_a_sample_is_of_its_split_even_over_suites_and_repeatable(split):
    sample = sample_problems(split, 80, seed=3)
    assert {split_of(problem) for problem in sample} == {split}
    assert Counter(problem.suite for problem in sample) == dict.fromkeys(SUITES, 10)
    assert sample == sample_problems(split, 80, seed=3)
    assert sample[:20] == sample_problems(split, 20, seed=3)
    assert sample != sample_problems(split, 80, seed=4)
    for problem in sample:
        assert problem.family.lengths[0] <= problem.difficulty <= problem.family.lengths[1]


def test_a_tenth_of_all_problems_is_for_testing():
    every = [
        Problem(family.suite, start, glyphs)
        for family in FAMILIES
        for start in range(family.states)
        for length in range(1, 6)
        for glyphs in product(range(len(family.glyphs)), repeat=length)
    ]
    share = np.mean([split_of(problem) == "test" for problem in every])
    assert share == pytest.approx(0.1, abs=4 * np.sqrt(0.1 * 0.9 / len(every)))


def test_preset_cpu_meets_each_training_prompt_at_most_once():
    config = resolve_config("grpo", "cpu")
    assert config.train_problems >= config.compute_steps * config.prompts_per_step
    train = sample_problems("train", config.train_problems, config.data_seed, config.suites)
    assert len({problem.uid for problem in train}) == config.train_problems
    test = sample_problems("test", config.eval_problems, TEST_SEED, config.suites)
    assert not {problem.uid for problem in train} & {problem.uid for problem in test}
    for sample in (train, test):  # lengths alike in training and in the test
        counts = Counter(problem.difficulty for problem in sample)
        assert min(counts.values()) / len(sample) > 0.25, counts


def test_lengths_that_are_used_up_give_way_to_longer_ones():
    (family,) = (family for family in FAMILIES if family.suite == "mathvista")
    shortest = [
        problem
        for start in range(family.states)
        for glyphs in product(range(3), repeat=family.lengths[0])
        if split_of(problem := Problem(family.suite, start, glyphs)) == "test"
    ]
    sample = sample_problems("test", 4 * len(shortest), 0, [family.suite])
    assert len(set(sample)) == 4 * len(shortest)
    assert sum(problem.difficulty == family.lengths[0] for problem in sample) <= len(shortest)


def test_only_some_suites():
    assert {problem.suite for problem in sample_problems("train", 9, 0, SUITES[2:4])} == set(SUITES[2:4])
    assert sample_problems("train", 0, 0) == []


def test_a_sample_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="Unknown split 'valid'"):
        sample_problems("valid", 1, 0)
    with pytest.raises(ValueError, match="Unknown suite"):
        sample_problems("train", 1, 0, ["mathvist"])
    with pytest.raises(ValueError, match="No suite given"):
        sample_problems("train", 1, 0, [])
    with pytest.raises(ValueError, match="more than mathvista hold"):
        sample_problems("test", 100_000, 0, ["mathvista"])


# Pictures


@given(problems())
def test_a_picture_has_its_size_and_is_the_same_every_time(problem):
    picture = problem.picture()
    assert picture.mode == "RGB"
    assert picture.size == (COLUMNS * CELL, ROWS * CELL)
    assert picture.tobytes() == Problem(problem.suite, problem.start, problem.glyphs).picture().tobytes()


def ink(problem) -> np.ndarray:
    """Where something is drawn, cell by cell in reading order, shape (cells, CELL, CELL)."""
    pixels = np.asarray(problem.picture()).astype(int)
    drawn = np.abs(pixels - pixels[-1, -1]).sum(axis=-1)
    return drawn.reshape(ROWS, CELL, COLUMNS, CELL).swapaxes(1, 2).reshape(-1, CELL, CELL)


@given(problems())
def test_a_glyph_stands_in_its_cell_and_the_other_cells_are_empty(problem):
    cells = ink(problem)
    for place in range(ROWS * COLUMNS - 1):  # the last cell gave the background
        assert cells[place].any() == (place < problem.difficulty)


@by_suite
def test_different_glyphs_give_different_pictures(family):
    length = family.lengths[1]
    for start in range(family.states):
        pictures = {}
        for glyphs in product(range(len(family.glyphs)), repeat=length):
            pictures.setdefault(Problem(family.suite, start, glyphs).picture().tobytes(), []).append(glyphs)
        assert [same for same in pictures.values() if len(same) > 1] == []


@by_suite
def test_the_glyphs_of_a_family_can_be_told_apart_wherever_they_are_moved_to(family):
    # each drawn in all nine places: even the likest two differ in a twentieth of the cell
    def cell(glyph, x, y):
        picture = Image.new("RGB", (CELL, CELL), (250, 250, 248))
        family.draw(ImageDraw.Draw(picture), glyph, (2 + x, 2 + y, 13 + x, 13 + y))
        return np.asarray(picture).astype(int)

    places = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    for one in range(len(family.glyphs)):
        for other in range(one):
            nearest = min(
                (np.abs(cell(one, *here) - cell(other, *there)).sum(axis=-1) > 30).mean()
                for here in places
                for there in places
            )
            assert nearest > 0.05, (family.glyphs[one], family.glyphs[other], nearest)


def test_the_picture_does_not_tell_the_start_or_the_answer():
    # it may move its glyphs by a pixel, by an amount that depends on the uid, and that is all
    family = FAMILIES[0]
    for glyphs in [(0, 0), (0, 1), (1, 1)]:
        colours = [
            Counter(map(tuple, np.asarray(Problem(family.suite, s, glyphs).picture()).reshape(-1, 3))) for s in (0, 1)
        ]
        assert colours[0] == colours[1]


# Words


@given(problem=problems(), second_form=st.booleans(), data=st.data())
def test_the_vocabulary_covers_every_prompt_and_response(processor, problem, second_form, data):
    states = [data.draw(st.integers(0, problem.family.states - 1)) for _ in problem.glyphs]
    prompt = processor.apply_chat_template(conversation(problem, True), tokenize=False, add_generation_prompt=True)
    text_only = make_dataset([problem], text_only=True)[0]["prompt"][0]["content"]
    for text in (prompt, text_only, write_response(problem, states, second_form) + processor.tokenizer.eos_token):
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.unk_token_id not in ids, text
        assert "".join(processor.tokenizer.decode(ids).split()) == "".join(text.split())


@given(problem=problems(), second_form=st.booleans())
def test_the_exact_response_is_verified_correct_after_the_tokenizer(processor, problem, second_form):
    text = write_response(problem, problem.states(), second_form)
    decoded = processor.tokenizer.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert BoxedVerifier()(decoded, {"answer": problem.answer}) is Verdict.CORRECT


@given(problem=problems(), second_form=st.booleans(), data=st.data())
def test_the_whole_path_decides_in_either_form(problem, second_form, data):
    states = [data.draw(st.integers(0, problem.family.states - 1)) for _ in problem.glyphs]
    right = states == problem.states()
    verdict = BoxedVerifier()(write_response(problem, states, second_form), {"answer": problem.answer})
    assert verdict is (Verdict.CORRECT if right else Verdict.WRONG)


def test_both_forms_say_the_same_in_other_words():
    problem = sample_problems("train", 1, 0)[0]
    first, second = (write_response(problem, problem.states(), form).split() for form in (False, True))
    assert first == ["\\boxed{", *problem.answer.split(), "}"]
    assert second == [*problem.reading.split(), SPACE, *first]
    with pytest.raises(ValueError, match="pass one per step"):
        write_response(problem, problem.states()[:-1])


def test_the_vocabulary_is_fixed_and_has_no_word_twice():
    words = vocabulary()
    assert len(set(words)) == len(words)
    assert words == vocabulary()
    assert not any(" " in word or not word for word in words)


def test_a_longest_response_fits_the_default_width(processor):
    width = RunConfig().max_completion_length
    for family in FAMILIES:
        problem = Problem(family.suite, 0, (1,) * family.lengths[1])
        text = write_response(problem, problem.states(), second_form=True) + processor.tokenizer.eos_token
        assert len(processor.tokenizer(text)["input_ids"]) <= width, family.suite


# Data sets


def test_a_data_set_has_a_row_per_problem():
    sample = sample_problems("train", 16, 0)
    rows = make_dataset(sample)
    require_columns(rows)
    for problem, row in zip(sample, rows, strict=True):
        assert parse_uid(row["uid"]) == problem
        assert (row["answer"], row["suite"], row["difficulty"]) == (problem.answer, problem.suite, problem.difficulty)
        assert row["prompt"] == conversation(problem, with_picture=False)
        assert row["image"].tobytes() == problem.picture().tobytes()


def test_text_only_rows_name_the_glyphs_instead():
    problem = sample_problems("train", 1, 0)[0]
    row = make_dataset([problem], text_only=True)[0]
    assert "image" not in row
    assert row["prompt"][0]["content"].split()[-problem.difficulty :] == [
        problem.family.glyphs[glyph] for glyph in problem.glyphs
    ]
