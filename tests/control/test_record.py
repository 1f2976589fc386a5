"""What a run keeps for a reader: the guided groups that trained, probes that add up to the decision, all bounded."""

import json
import math

import pytest
import torch
from factories import Factory, controller_of, own_config
from worlds import correct_in, rig, trainer_of, world

import npo_core.control.watch
from npo_core.control.record import GuidedGroups, question_of
from npo_core.explore.reading import read_run
from npo_core.files import read_lines
from npo_core.guidance.trajectories import Trajectory
from npo_core.method.groups import group_advantages
from npo_core.method.trigger import PlateauTrigger, PlateauWarning
from npo_core.runs.folder import RunFolder


class AtSix(PlateauTrigger):
    def update(self, step, reward, entropy):
        super().update(step, reward, entropy)
        return PlateauWarning(step, reward, 0.0, entropy, -0.5) if step == 6 else None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(**settings)`: an AutoNPO run over somebody else's factory, with a roll-back at step 6."""

    def make(**settings):
        config = own_config(compute_steps=8, quality_floor=0.0, confirm_quality=0.0, **settings)
        controller = controller_of(Factory(config), tmp_path_factory.mktemp("runs"))
        controller.run()
        return controller.run_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npo_core.control.watch, "PlateauTrigger", AtSix)
        yield make


@pytest.fixture(scope="module")
def run(made):
    return made()


def recorded(run):
    """Recorded lines with the metric line of their step."""
    logged = {(line["branch"], line["policy_step"]): line for line in run.metrics()}
    for path in sorted((run.path / "guided").glob("b*.jsonl")):
        for line in read_lines(path):
            yield line, logged[int(path.stem[1:]), line["policy_step"]]


def test_every_guided_group_is_kept_with_what_it_replaced(run):
    seen = 0
    for line, logged in recorded(run):
        assert len(line["groups"]) == logged["npo/replaced_slots"]
        for group in line["groups"]:
            *own, guide = group["slots"]
            assert [slot["source"] for slot in group["slots"]] == ["policy"] * 3 + ["guide"]
            verdicts = [slot["correct"] for slot in own] + [guide["overwritten_correct"]]
            assert sum(verdicts) / 4 == pytest.approx(logged["groups"][group["uid"]])
            rewards = torch.tensor([[slot["reward"] for slot in group["slots"]]])
            expected = group_advantages(rewards)[0].tolist()
            assert [slot["advantage"] for slot in group["slots"]] == pytest.approx(expected, abs=1e-4)
            assert len(guide["pieces"]) == len(guide["token_ids"]) == len(guide["behaviour_logps"])
            assert guide["overwritten_text"] is not None and "token_ids" not in own[0]
            seen += 1
    assert seen == sum(line["npo/replaced_slots"] for line in run.metrics()) > 0


def test_of_a_response_that_a_guide_began_it_is_kept_what_was_given(made, tmp_path_factory):
    config = own_config(compute_steps=8, quality_floor=0.0, confirm_quality=0.0, guide_prefix=0.5)
    factory = Factory(config, guide_prefix=0.5)
    controller = controller_of(factory, tmp_path_factory.mktemp("runs"))
    controller.run()
    run, decode = controller.run_folder, factory.tiny.processor.decode
    seen = 0
    for line, logged in recorded(run):
        assert len(line["groups"]) == logged["npo/replaced_slots"]
        for group in line["groups"]:
            *own, begun = group["slots"]
            assert [slot["source"] for slot in group["slots"]] == ["policy"] * 3 + ["prefix"]
            assert 0 <= begun["prefix"] <= len(begun["token_ids"])
            assert begun["prefix_text"] == decode(begun["token_ids"][: begun["prefix"]], skip_special_tokens=True)
            assert begun["text"].startswith(begun["prefix_text"]) and begun["guide_step"] == 6
            verdicts = [slot["correct"] for slot in own] + [begun["overwritten_correct"]]
            assert sum(verdicts) / 4 == pytest.approx(logged["groups"][group["uid"]])
            seen += 1
    assert seen == sum(line["npo/replaced_slots"] for line in run.metrics()) > 0
    slots = [slot for step in read_run(run.path)["steps"] for g in step["groups"] for slot in g["slots"]]
    begun = [slot for slot in slots if "begun" in slot]
    assert len(begun) == seen and all("q" not in slot and slot["guide"] == 6 for slot in begun)


def test_the_distance_of_the_kept_guides_is_the_one_that_was_logged(run):
    for line, logged in recorded(run):
        pairs = [
            q - pi
            for group in line["groups"]
            for q, pi in zip(*(group["slots"][-1][f"{who}_logps"] for who in ("behaviour", "current")), strict=True)
        ]
        assert sum(pairs) / len(pairs) == pytest.approx(logged["npo/guide_kl"], abs=1e-4)


def test_a_probe_by_prompt_adds_up_to_what_was_decided(run):
    (path,) = (run.path / "probes").iterdir()
    probe = json.loads(path.read_text())
    (event,) = run.events("probe")
    (choice,) = run.events("choice")
    assert (probe["policy_step"], probe["compute_step"]) == (6, 6)
    assert sum(p["correct"] for p in probe["prompts"]) == round(event["pass_rate"] * event["rollouts"])
    assert [c["distance"] for c in probe["candidates"]] == [c["distance"] for c in reversed(choice["candidates"])]
    for kept, weighed in zip(probe["candidates"], reversed(choice["candidates"]), strict=True):
        kl = max(sum(kept["sums"]) / sum(kept["tokens"]), 0.0)
        assert math.exp(run.config.variance_c * kl) == pytest.approx(weighed["variance"], rel=1e-3)
        since = [p for p in probe["prompts"] if p["failed_at"] > weighed["policy_step"]]
        assert len(since) == weighed["prompts"]
        assert sum(p["correct"] for p in since) / len(since) / probe["rollouts"] == pytest.approx(weighed["quality"])


def test_nothing_that_is_kept_moves_a_number_of_the_run(run, made):
    bare = made(record_mib=0.0)
    assert not (bare.path / "guided").exists() and not (bare.path / "probes").exists()
    assert bare.path.name == run.path.name, "a run has the same name whatever is kept of it"
    timeless = [[{**line, "step_time": 0} for line in each.metrics()] for each in (run, bare)]
    assert timeless[0] == timeless[1]


def test_the_explorer_shows_the_groups_of_somebody_elses_run(run):
    shown = read_run(run.path)
    assert shown["steps"], "there are no rollout tables: all that is shown comes from the record"
    guides = [slot for step in shown["steps"] for g in step["groups"] for slot in g["slots"] if "guide" in slot]
    assert len(guides) == sum(line["npo/replaced_slots"] for line in run.metrics())
    assert all(slot["guide"] == 6 and slot["pieces"] for slot in guides)
    assert {len(each["prompts"]) for each in shown["probes"]} == {run.events("probe")[0]["prompts"]}


def sink(tmp_path, limit, branch=0):
    tiny = world("pictures")
    run = RunFolder(own_config(), tmp_path)
    rows = {row["uid"]: row for row in tiny.dataset}
    return tiny, GuidedGroups(run, branch, rows, tiny.processor, limit)


def group_of(uid):
    row = {"uid": uid, "group": 0, "slot": 0, "source": "policy", "text": "t", "ended": True, "correct": False}
    return [{**row, "reward": 0.0, "advantage": -1.0}]


def test_a_record_stops_at_its_size_also_after_a_restart(tmp_path):
    tiny, record = sink(tmp_path, limit=0.004)
    uids = list(tiny.dataset["uid"])
    for step in range(100):
        record(step, group_of(uids[step % len(uids)]), [])
    kept = [line["policy_step"] for line in read_lines(record.path)]
    size = sum(path.stat().st_size for path in (tmp_path / record.folder).rglob("*") if path.is_file())
    assert kept == list(range(len(kept))) and 0 < len(kept) < 100
    assert size < 0.004 * 2**20 + 1500, "at most the step that reaches the limit lies over it"
    _, again = sink(tmp_path, limit=0.004, branch=1)
    again(100, group_of(uids[0]), [])
    assert not again.path.exists()


def test_a_picture_is_written_once_and_named_in_every_group(tmp_path):
    tiny, record = sink(tmp_path, limit=1.0)
    uid = tiny.dataset["uid"][0]
    for step in (1, 2):
        record(step, group_of(uid), [])
    names = {line["groups"][0]["picture"] for line in read_lines(record.path)}
    assert {path.name for path in (record.folder / "pictures").iterdir()} == names and len(names) == 1


def test_refused_guides_are_handed_over_with_the_groups_that_got_one(tmp_path, monkeypatch):
    tiny = world("text")
    bad, good = tiny.dataset["uid"][:2]
    rig(monkeypatch, correct_in(tiny, {}))
    guides = {good: tiny.guide(good), bad: tiny.guide(bad, token_ids=tiny.mistake(bad))}

    class Guides:
        def guide(self, uid: str, policy_step: int) -> Trajectory | None:
            return guides.get(uid)

    trainer = trainer_of(tiny, tmp_path, prompts=2, steps=1, guidance=Guides(), learning_rate=0.0)
    trainer.guided_sink = lambda *step: told.append(step)
    told = []
    trainer.train()
    ((step, rows, refused),) = told
    assert step == 1 and [guide.uid for guide in refused] == [bad]
    assert [(row["uid"], row["source"]) for row in rows] == [(good, "policy")] * 3 + [(good, "guide")]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("plain", "plain"),
        ([{"role": "system", "content": "be kind"}, {"role": "user", "content": "what?"}], "what?"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}], "what is it?"),
    ],
)
def test_a_question_is_read_from_every_form_of_a_prompt(prompt, question):
    assert question_of({"prompt": prompt}) == question
