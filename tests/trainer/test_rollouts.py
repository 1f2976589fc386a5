"""The table of a step's rollouts: its rows, when it is complete, and the log-probs and ratios that it notes."""

import math
from types import SimpleNamespace

import pytest
import torch
from worlds import SpyTrainer, trainer_of, world

from npo_core.guidance.trajectories import Trajectory
from npo_core.trainer.rollouts import RolloutTable, StepRollouts, mask_given

EOS = 2
GUIDE = Trajectory("q", (7, EOS), (-0.5, -1.0), 30, True, "seven")


def batch() -> tuple[StepRollouts, dict]:
    """Two groups of three rows: the last of the first is void, that of the second a guide in a right one's place."""
    step = StepRollouts(
        rows=[{"uid": "p"}] * 3 + [{"uid": "q"}] * 3,
        guided={5: GUIDE},
        overwritten={5: ([8, EOS], True)},
        void=[2],
        responses=[[5, EOS], [5, 6, 7], [EOS], [6, EOS], [4, 4, EOS], [7, EOS]],
        rewards=torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
        correct=torch.tensor([True, False, False, False, False, True]),
    )
    output = {
        "advantages": torch.tensor([0.5, -0.5, 0.0, -0.25, -0.25, 0.5]),
    }
    return step, output


def written(ids):
    """Token ids as a text, so that each row's text tells which row it is of."""
    return [" ".join(map(str, row)) for row in ids]


@pytest.fixture
def table() -> RolloutTable:
    return RolloutTable(4, *batch(), 3, written, [EOS])


def test_every_row_but_the_void_ones_has_its_place_and_source(table):
    assert table.step == 4
    assert [(row["uid"], row["group"], row["slot"], row["source"], row["text"]) for row in table.rows] == [
        ("p", 0, 0, "policy", "5 2"),
        ("p", 0, 1, "policy", "5 6 7"),
        ("q", 1, 0, "policy", "6 2"),
        ("q", 1, 1, "policy", "4 4 2"),
        ("q", 1, 2, "guide", "7 2"),
    ]
    assert [row["token_ids"] for row in table.rows] == [[5, EOS], [5, 6, 7], [6, EOS], [4, 4, EOS], [7, EOS]]
    assert [row["ended"] for row in table.rows] == [True, False, True, True, True]
    assert [row["correct"] for row in table.rows] == [True, False, False, False, True]
    assert [row["advantage"] for row in table.rows] == [0.5, -0.5, -0.25, -0.25, 0.5]


def test_a_guides_row_holds_its_source_and_what_it_replaced(table):
    guide, own = table.rows[4], table.rows[0]
    assert (guide["guide_step"], guide["behaviour_logps"]) == (30, [-0.5, -1.0])
    assert (guide["overwritten_ids"], guide["overwritten_correct"]) == ([8, EOS], True)
    assert own["guide_step"] is own["behaviour_logps"] is own["overwritten_ids"] is own["overwritten_correct"] is None


def seen(table, rows, logps, old=None):
    mask = torch.tensor([[1, 1, 0]] * len(rows)).bool()
    inputs = {"rollout_row": torch.tensor(rows)}
    if old is not None:
        inputs["old_per_token_logps"] = torch.tensor(old)
    return table.see(torch.tensor(logps), mask, inputs)


def test_a_table_is_complete_when_every_row_has_been_seen_in_whatever_order(table):
    logps = [[-1.0, -2.0, 9.0]] * 2
    assert not seen(table, [4, 1], logps)
    assert not seen(table, [5, 3], logps)
    assert not seen(table, [4, 1], logps), "rows of a second pass are no news"
    assert not seen(table, [0], logps[:1]), "the void row, which is in no table, may come in any pass of a process"
    assert seen(table, [2], logps[:1])
    assert len(table.rows) == 5 and all(row["current_logps"] == [-1.0, -2.0] for row in table.rows)


def test_the_ratio_is_to_the_stored_log_probs_of_a_guide_and_to_the_sampling_ones_of_a_rollout(table):
    seen(table, [5, 0, 1], [[-1.0, -2.0, 0.0]] * 3, old=[[-9.0, -9.0, 0.0], [-1.5, -2.0, 0.0], [-1.0, -1.0, 0.0]])
    guide, first, second = table.rows[4], table.rows[0], table.rows[1]
    assert guide["ratio"] == pytest.approx([math.exp(-0.5), math.exp(-1)])
    assert first["ratio"] == pytest.approx([math.exp(0.5), 1.0]) and first["behaviour_logps"] == [-1.5, -2.0]
    assert second["ratio"] == pytest.approx([1.0, math.exp(-1)])
    seen(table, [3], [[-1.0, -2.0, 0.0]])
    assert table.rows[2]["ratio"] == [1.0, 1.0] and table.rows[2]["behaviour_logps"] == [-1.0, -2.0]


def test_a_call_on_other_rows_changes_nothing(table):
    before = [dict(row) for row in table.rows]
    assert not table.see(torch.zeros(1, 2), torch.ones(1, 2).bool(), {})
    assert table.rows == before


def test_what_tools_said_stays_out_of_the_loss_beside_what_guides_gave():
    accelerator = SimpleNamespace(reduce=lambda value, reduction: value)
    output = {"completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]), "num_items_in_batch": 7}
    output["tool_mask"] = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])  # TRL's count has tools left out
    mask_given(output, {0: 2}, [2], accelerator)
    assert output["tool_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert output["num_items_in_batch"] == (output["completion_mask"] * output["tool_mask"]).sum() == 5


def test_without_a_verifier_there_is_no_verdict():
    step = StepRollouts(rows=[{}], responses=[[]], rewards=torch.tensor([0.5]))
    (row,) = RolloutTable(1, step, {"advantages": torch.zeros(1)}, 1, written, [EOS]).rows
    assert (row["uid"], row["correct"], row["token_ids"], row["ended"]) == (None, None, [], False)


def test_only_groups_with_a_guide_are_kept_where_nothing_else_is_asked_for():
    step, output = batch()
    step.refused = [GUIDE]
    table = RolloutTable(4, step, output, 3, written, [EOS], guided_only=True)
    assert [(row["group"], row["slot"], row["text"]) for row in table.rows] == [
        (1, 0, "6 2"), (1, 1, "4 4 2"), (1, 2, "7 2"),
    ]  # fmt: skip
    assert table.guided_rows() == table.rows and table.refused == [GUIDE]
    assert not seen(table, [0, 1, 3, 4], [[-1.0, -2.0, 0.0]] * 4)
    assert seen(table, [5], [[-1.0, -2.0, 0.0]]), "rows of other groups are waited for by nobody"
    step.guided = {}
    assert seen(RolloutTable(4, step, output, 3, written, [EOS], guided_only=True), [0], [[-1.0, -2.0, 0.0]])


def test_guided_rows_of_a_whole_table_are_those_of_the_groups_with_a_guide(table):
    assert [row["group"] for row in table.rows] == [0, 0, 1, 1, 1]
    assert [row["group"] for row in table.guided_rows()] == [1, 1, 1]


@pytest.mark.parametrize("placement", [{}, {"placement": "append", "guides_per_group": 2}], ids=["replace", "append"])
def test_every_process_hands_its_table_over_in_the_last_pass_of_the_step(tmp_path, placement):
    """A sink that collects the tables of all processes waits for ever for one whose rows were seen in another pass."""
    passes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    handed = []
    for seed in range(3):  # as processes have it, each a shuffle of its own
        trainer = trainer_of(world("text"), tmp_path, SpyTrainer, prompts=2, seed=seed, **placement, **passes)
        trainer.rollout_sink = lambda step, rows, done=trainer.loss_calls: handed.append((step, len(rows), len(done)))
        trainer.train()
        trainer.record_rollouts = False
        trainer.train()
    assert handed == [(1, 4 if placement else 8, 8)] * 3
