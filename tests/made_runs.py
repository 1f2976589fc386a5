"""Run folders made by hand, so that every number on the page is known; and TRL's own log of completions."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from npo_core.files import write_json, write_table
from npo_core.guidance.trajectories import GuidanceCache, Trajectory
from npo_core.method.groups import group_advantages

HOSTILE = "</script><img src=x onerror='window.hacked=1'><script>window.hacked=1</script>&lt;b&gt; **bold** \u2028 😀"
"""What a policy might write to break out of a page."""

N = 4


def picture(color: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), color).save(stream, "PNG")
    return stream.getvalue()


def slot(number, reward, text=None, guide=None, lost=None):
    """A row of a rollout table; with `guide` (policy step) it holds a guide in the place of the rollout `lost`."""
    return {
        "slot": number,
        "source": "policy" if guide is None else "guide",
        "guide_step": guide,
        "token_ids": [5, 6, 2],
        "text": text or f"answer {number} \\boxed{{ {number} }}",
        "ended": True,
        "correct": reward == 1.0,
        "reward": reward,
        "behaviour_logps": [-0.1, -0.2, -0.5],
        "current_logps": [-0.1, -1.2, -0.4],
        "overwritten_text": lost,
        "overwritten_correct": None if lost is None else False,
    }


def group(number, uid, rewards, texts=None, guide=None, lost=None):
    """Rows of a group with TRL's advantages; a guide takes the last slot."""
    advantages = group_advantages(torch.tensor([rewards]))[0].tolist()
    rows = []
    for place, (reward, advantage) in enumerate(zip(rewards, advantages, strict=True)):
        text = texts[place] if texts else None
        last = place == len(rewards) - 1
        row = slot(place, reward, text, guide if last else None, lost if last else None)
        rows.append({"uid": uid, "group": number, **row, "advantage": advantage})
    return rows


def table(run: Path, name: str, groups) -> None:
    rows = [row for rows in groups for row in rows]
    for row in rows:
        row["question"], row["answer"], row["suite"] = f"Question of {row['uid']}?", "3", "dice"
        row["picture"] = picture("blue") if row["slot"] == 0 else None
    (run / "rollouts").mkdir(exist_ok=True)
    write_table(run / "rollouts" / name, rows)


def line(step, compute, branch, groups, **further):
    return {
        "policy_step": step,
        "compute_step": compute,
        "branch": branch,
        "npo/pass_rate": sum(groups.values()) / len(groups),
        "npo/entropy": 1.0 / compute,
        "npo/replaced_slots": 0.0,
        "groups": groups,
        **further,
    }


def make_run(folder: Path) -> Path:
    """Four steps, then a roll-back from step 4 to step 2 and a guided replay of two steps; compute steps 1 to 6."""
    folder.mkdir()
    config = {
        "method": "autonpo", "preset": "cpu", "seed": 0, "num_generations": N, "tau_gate": 0.6, "compute_steps": 6,
        "advantage_scale": "group", "ratio_mode": "current", "ratio_truncation": 2.0, "ratio_gamma": 0.1,
        "guide_behaviour": "stored", "placement": "replace", "guides_per_group": 1, "pool_cutoff": 0.25,
        "pool_expiry": 400, "variance_proxy": "kl", "variance_c": 3.3, "quality_floor": 0.0, "rollout_every": 2,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    prompts = {1: {"a": 0.0, "b": 0.5}, 2: {"c": 1.0, "d": 0.25}, 3: {"a": 0.0, "b": 1.0}, 4: {"c": 0.75, "d": 0.0}}
    lines = [line(step, step, 0, groups) for step, groups in prompts.items()]
    lines.append(line(3, 5, 1, {"a": 0.0, "b": 0.5}, **{"npo/replaced_slots": 1.0, "npo/guide_kl": 0.2}))
    lines.append(line(4, 6, 1, {"c": 1.0, "d": 0.25}, **{"npo/refused_guides": 1.0}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    clocks = {"policy_step": 4, "compute_step": 4}
    candidates = [
        {"distance": 2, "policy_step": 2, "quality": 0.25, "variance": 1.1, "prompts": 2, "signal": 0.25 / 1.1},
        {"distance": 4, "policy_step": 0, "quality": 0.3125, "variance": 2.0, "prompts": 2, "signal": 0.15625},
    ]
    events = [
        {"event": "segment", "branch": 0, "start": 0, "compute_start": 0, "guidance": None, "guide_until": 0},
        {"event": "warning", **clocks, "reward": 0.4, "reward_change": 0.0, "entropy": 0.3, "entropy_change": -0.2},
        {"event": "probe", **clocks, "pool": 2, "prompts": 2, "rollouts": 16, "pass_rate": 0.25},
        {"event": "choice", **clocks, "chosen": 2, "at_edge": True, "reason": HOSTILE, "candidates": candidates},
        {"event": "cache", **clocks, "file": "guidance/00-00004.parquet", "prompts": 2, "cached": 2, "rollouts": 16},
        {"event": "rollback", **clocks, "to": 2, "distance": 2},
        {"event": "segment", "branch": 1, "start": 2, "compute_start": 4, "guidance": "guidance/00-00004.parquet",
         "guide_until": 4},
    ]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    first = group(0, "a", [0.0] * N, [HOSTILE, "x " * 600, "**bold**\n\n- one\n- two", "short"])
    table(folder, "step-00001-b00.parquet", [first, group(1, "b", [1.0, 0.0, 1.0, 0.0])])
    _guided(folder)
    cache = GuidanceCache([2], 8, "", None)
    for uid in ("a", "d"):
        cache.add(Trajectory(uid, (5, 6, 2), (-0.1, -0.2, -0.5), 4, True, f"the guide of {uid}"))
    (folder / "guidance").mkdir()
    cache.save(folder / "guidance" / "00-00004.parquet")
    (folder / "probes").mkdir()
    probe = {
        **clocks, "rollouts": 8,
        "prompts": [{"uid": "a", "correct": 2, "failed_at": 3}, {"uid": "d", "correct": 3, "failed_at": 4}],
        "candidates": [
            {"distance": 2, "sums": [0.02, 0.04], "tokens": [1, 1]},
            {"distance": 4, "sums": [0.2, 0.22], "tokens": [1, 1]},
        ],
    }  # fmt: skip
    write_json(folder / "probes" / "00-00004.json", probe)
    write_json(folder / "result.json", {"schema": 1, "base": {"average": 0.25}, "final": {"average": 0.5}})
    return folder


def _guided(folder: Path) -> None:
    """The record of the replay: a guide in group a at step 3, and one that was refused for d at step 4."""
    rows = group(0, "a", [0.0] * (N - 1) + [1.0], guide=4, lost="the lost rollout")
    rows[-1]["pieces"] = ["five", " six", ""]
    record = {"uid": "a", "group": 0, "question": "Question of a?", "answer": "3", "suite": "dice", "slots": rows}
    record["picture"] = "a.png"
    (folder / "guided" / "pictures").mkdir(parents=True)
    (folder / "guided" / "pictures" / "a.png").write_bytes(picture("red"))
    lines = [
        {"policy_step": 3, "groups": [{**record, "slots": []}], "refused": []},
        {"policy_step": 3, "groups": [record], "refused": []},  # done again after a kill: the later one counts
        {"policy_step": 4, "groups": [], "refused": [{"uid": "d", "guide_step": 4, "text": "a wrong guide"}]},
    ]
    (folder / "guided" / "b01.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))


def make_prefix_run(folder: Path) -> Path:
    """The same run with prefix guidance: the policy went on from a beginning, and ended wrong."""
    make_run(folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"guide_prefix": 0.5})
    rows = group(0, "a", [1.0] + [0.0] * (N - 1), guide=4, lost="the lost rollout")
    rows[-1] |= {"source": "prefix", "prefix": 2, "prefix_text": "given words", "text": "given words and my own"}
    rows[-1] |= {"token_ids": [5, 6, 7, 8, 2], "pieces": ["given", " words", " and", " my", " own"], "correct": False}
    record = {"uid": "a", "group": 0, "question": "Question of a?", "answer": "3", "suite": "dice", "slots": rows}
    line = {"policy_step": 3, "groups": [record | {"picture": "a.png"}], "refused": []}
    (folder / "guided" / "b01.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def make_run_of_two(folder: Path) -> Path:
    """The same run in two processes: a whole table numbers its groups over both, a record each by itself."""
    make_run(folder)
    guided = group(3, "a", [0.0] * (N - 1) + [1.0], guide=4, lost="the lost rollout")
    others = [group(place, uid, [1.0, 0.0, 0.0, 0.0]) for place, uid in enumerate("bcd")]
    table(folder, "step-00003-b01.parquet", [*others, guided])
    record = json.loads((folder / "guided" / "b01.jsonl").read_text().splitlines()[1])
    (folder / "guided" / "b01.jsonl").unlink()
    (folder / "guided" / "b01-p1.jsonl").write_text(json.dumps(record) + "\n")  # its group has number 0 there
    return folder


def make_large_run(folder: Path) -> Path:
    """The same run with long responses in its tables, about as many as a page of two megabytes holds."""
    make_run(folder)
    for step in range(1, 5):
        draws = np.random.default_rng(step)
        groups = [
            group(place, f"p{place}", [1.0, 0.0, 0.0, 0.0], [draws.bytes(600).hex() for _ in range(N)])
            for place in range(158)
        ]
        table(folder, f"step-{step:05d}-b00.parquet", groups)
    return folder


def make_trl_run(folder: Path) -> Path:
    """A folder as TRL's log_completions leaves it: two prompts of four completions, two rewards, a conversation."""
    (folder / "completions").mkdir(parents=True)
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]]
    rows = []
    for number, values in enumerate(rewards):
        advantages = group_advantages(torch.tensor([values]))[0].tolist()
        for place, (value, advantage) in enumerate(zip(values, advantages, strict=True)):
            turns = [{"role": "user", "content": f"How many? {number}"}]
            said = [{"role": "assistant", "content": f"I say {place}. {HOSTILE}"}]
            rows.append(
                {"step": 3, "prompt": turns, "completion": said, "accuracy": value, "format": 0.0, "answer": "7",
                 "advantage": advantage}
            )  # fmt: skip
    write_table(folder / "completions" / "completions_00003.parquet", rows)
    state = {"log_history": [{"step": 3, "reward": 0.5, "entropy": 0.7, "loss": 0.0}, {"step": 3, "train_loss": 0.0}]}
    (folder / "checkpoint-3").mkdir()
    write_json(folder / "checkpoint-3" / "trainer_state.json", state)
    return folder
