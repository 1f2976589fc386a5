"""The notebook widget: where the reader is comes back to Python as a table, and a run that goes on is read again."""

import asyncio
import json

import pytest
from made_runs import line, make_run

from npo_core.explore import explore
from npo_core.explore.page import module


def test_the_group_that_is_looked_at_is_a_table(run):
    ex = explore(run, live=True)
    assert ex.selected.empty, "nothing is looked at yet"
    ex.chosen = {"run": run.name, "policy_step": 3, "compute_step": 5, "branch": 1, "group": 0, "uid": "a"}
    assert ex.selected["source"].tolist() == ["policy"] * 3 + ["guide"]
    assert ex.selected["reward"].tolist() == [0, 0, 0, 1]
    assert ex.selected.iloc[3][["guide_step", "overwritten_text"]].tolist() == [4, "the lost rollout"]
    ex.chosen = {**ex.chosen, "policy_step": 2, "branch": 0, "uid": "c"}
    assert ex.selected.empty, "of this step the pass rates alone were kept"


def test_a_run_that_goes_on_is_read_again(tmp_path):
    run = make_run(tmp_path / "on")
    ex = explore(run, live=True)

    def more(compute):
        with (run / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(line(compute - 2, compute, 1, {"a": 1.0})) + "\n")

    more(7)
    ex.refresh()
    assert ex.data["runs"][0]["lines"][-1]["c"] == 7

    async def watch():
        task = asyncio.create_task(ex.follow(0.01))
        more(8)
        while ex.data["runs"][0]["lines"][-1]["c"] < 8:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(watch(), 20))


def test_it_is_the_pages_own_module(run):
    ex = explore(run, live=True)
    assert ex._esm == module() and "export default { render }" in ex._esm
    ex.select(3, group=0)
    assert ex.wanted == {"step": 3, "group": 0, "branch": None}


def test_a_bad_run_makes_no_widget(tmp_path):
    with pytest.raises(ValueError, match="is no run"):
        explore(tmp_path, live=True)
