"""The examples of docs/own_run.md and README.md, run as they stand there but for names, sizes and the verifier."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
from factories import even
from foreign import boxed_policy, byte_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from worlds import WIDTH, world

import npo_core.control.watch
from npo_core import GuidanceCache
from npo_core.__main__ import main
from npo_core.method.trigger import PlateauTrigger, PlateauWarning

ROOT = Path(__file__).parents[1]
CPU = {
    "use_cpu": True, "gradient_checkpointing": False, "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant",
}  # fmt: skip
"""TRL arguments for a test, added to those of an example."""


def examples(path: str) -> list[str]:
    return re.findall(r"```python\n(.+?)```", (ROOT / path).read_text(), re.DOTALL)


def run(code: str, changes: Mapping[str, str], **names) -> dict:
    """Execute an example; each text that is replaced must be there."""
    for old, new in {"BoxedVerifier()": "even", "NPOConfig(": "NPOConfig(**CPU, ", **changes}.items():
        assert old in code.partition("import")[2], old
        code = code.replace(old, new)
    found = {"even": even, "CPU": CPU, **names}
    exec(compile(code, "example", "exec"), found)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a policy, two checkpoints of it, and prompts."""
    tiny = world("text")
    for name in ("base", "out/checkpoint-100", "out/checkpoint-200"):
        tiny.build().save_pretrained(tmp_path / name)
        tiny.processor.save_pretrained(tmp_path / name)
    rows = ({name: row[name] for name in ("uid", "prompt", "answer")} for row in tiny.dataset)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def foreign_place(folder, monkeypatch, model, names=("out/checkpoint-100", "out/checkpoint-200"), prompts=6):
    """A stranger's folder: a policy under some names, and questions of which the first has no right answer."""
    for name in names:
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    asked = [[{"role": "user", "content": f"What is {'half of ' * (n % 3)}two?"}] for n in range(prompts)]
    rows = [{"uid": str(n), "prompt": prompt, "answer": "1" if n else "7"} for n, prompt in enumerate(asked)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)


def test_the_first_script_runs_as_it_is_printed(tmp_path, monkeypatch, capsys):
    """With a tokenizer that pads right, on this machine's CPU; nothing of the page is replaced."""
    foreign_place(tmp_path, monkeypatch, boxed_policy(byte_tokenizer()))
    (code, _), found = examples("docs/own_run.md"), {}
    exec(compile(code, "example", "exec"), found)
    assert found["trainer"].state.global_step == 20 and "later" not in found
    sampled = [one for group in found["groups"] for one in group]
    solved = {one.uid for one in sampled if one.correct}
    assert solved and solved <= {"1", "2", "3", "4", "5"}, "half of the answers are right, but for the first prompt's"
    assert {guide.uid for guide in GuidanceCache.load("guides.parquet")} == solved
    wrong = sum(not one.correct for one in sampled)
    assert f"{len(solved)} of 6 prompts have a guide: of 48 responses {wrong} were wrong" in capsys.readouterr().out
    assert found["cache"].filled.wrong == wrong
    lines = [line for line in found["trainer"].state.log_history if "npo/pass_rate" in line]
    assert lines and 0.2 < sum(line["npo/pass_rate"] for line in lines) / len(lines) < 0.8


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Folder of a policy in a cache of the hub, as a download leaves it; nothing is asked of the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def snapshot(name):
        place, revision = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(revision)
        return place / "snapshots" / revision

    return snapshot


@pytest.mark.slow
def test_thirty_minutes_from_top_to_bottom(tmp_path, monkeypatch, capsys, hub):
    """The page as it is printed, with a policy that answers by a coin under the name of the large one."""
    policy = hub("Qwen/Qwen3-0.6B")
    foreign_place(tmp_path, monkeypatch, boxed_policy(byte_tokenizer()), [policy.relative_to(tmp_path)], 64 + 256)
    monkeypatch.setenv("NPO_RUNS", str(tmp_path / "runs"))
    page = (ROOT / "docs" / "thirty_minutes.md").read_text()
    blocks = re.findall(r"```(python|bash)\n(.+?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "bash", "python", "bash"]
    for kind, block in blocks:
        if kind == "bash":
            python, dash, package, *command = block.split()
            assert (python, dash, package) == ("python", "-m", "npo_core")
            assert main(command) == 0
        else:
            exec(compile(block, "example", "exec"), found := {})
    told = capsys.readouterr().out
    guided = int(re.search(r"(\d+) of 320 prompts have a guide", told)[1])
    assert 300 < guided < 320, "eight answers by a coin miss one prompt in 256, and the first has no right one"
    assert "too few" in told and "0" not in {guide.uid for guide in found["cache"]}
    assert found["trainer"].state.global_step == 40
    lines = [line for line in found["trainer"].state.log_history if "npo/replaced_slots" in line]
    assert len(lines) == 40 and {"npo/all_wrong_groups", "npo/entropy"} <= lines[0].keys()
    named = set(re.findall(r"^\| `(npo/[a-z_]+)`", page, re.MULTILINE))
    assert named <= {name for line in lines for name in line}
    assert (tmp_path / "measured" / "figures").is_dir()
    (result,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result.read_text())["compute_steps"] == 80


def test_the_first_script_with_adapters(tmp_path, monkeypatch):
    """As the page says in words: adapters are loaded by peft's class, and train on from an earlier checkpoint."""
    boxed_policy(byte_tokenizer()).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    foreign_place(tmp_path, monkeypatch, get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")))
    page = (ROOT / "docs" / "own_run.md").read_text()
    (code, _), found = examples("docs/own_run.md"), {}
    for name in ("AutoPeftModelForCausalLM", "is_trainable=True", 'LoraConfig(task_type="CAUSAL_LM")'):
        assert name in page
    code = code.replace("AutoModelForCausalLM.from", "AutoPeftModelForCausalLM.from").replace("steps=20", "steps=1")
    code = code.replace("import torch\n", "import torch\nfrom peft import AutoPeftModelForCausalLM\n")
    earlier = 'AutoPeftModelForCausalLM.from_pretrained("out/checkpoint-100", is_trainable=True)'
    code = code.replace('model="out/checkpoint-100"', f"model={earlier}")
    exec(compile(code, "example", "exec"), found)
    assert len(found["cache"]) == 5 and found["trainer"].state.global_step == 1
    found["trainer"].save_model("final")
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()


def test_guides_from_a_later_checkpoint(place):
    code, _ = examples("docs/own_run.md")
    lengths = {f"{name}=512": f"{name}={WIDTH}" for name in ("max_completion_length", "max_new_tokens")}
    sizes = lengths | {"k=8": "k=64", "tau_gate=0.6": "tau_gate=1.0", "max_steps=20": "max_steps=2"}
    sizes["bf16=torch.cuda.is_available()"] = "bf16=False"
    found = run(code, sizes)
    lines = [line for line in found["trainer"].state.log_history if "npo/reward" in line]
    assert sum(line["npo/replaced_slots"] for line in lines) > 0
    assert 0 < len(found["cache"]) == len(GuidanceCache.load("guides.parquet"))
    assert found["trainer"].state.global_step == 2
    # the README's own example, on the same guides
    (short,) = examples("README.md")
    sizes = {'"Qwen/Qwen3-0.6B"': '"base"', "tau_gate=0.6": f"tau_gate=1.0, max_steps=2, max_completion_length={WIDTH}"}
    again = run(short, sizes, dataset=found["dataset"])
    assert again["trainer"].state.global_step == 2 and len(again["trainer"].guidance) == len(found["cache"])


def test_the_second_script_runs_as_it_is_printed_but_for_the_steps(tmp_path, monkeypatch, hub):
    """With a policy of another's habits under the large one's name; steps are what a CPU has no time for."""
    policy = hub("Qwen/Qwen3-0.6B")
    foreign_place(tmp_path, monkeypatch, boxed_policy(byte_tokenizer()), [policy.relative_to(tmp_path)], 64)
    _, code = examples("docs/own_run.md")
    assert '"compute_steps": 400' in code
    exec(compile(code.replace('"compute_steps": 400', '"compute_steps": 3'), "example", "exec"), found := {})
    lines = found["run"].metrics()
    assert [line["policy_step"] for line in lines] == [1, 2, 3]
    assert all(0.2 < line["npo/pass_rate"] < 0.8 for line in lines)
    assert (tmp_path / "final" / "model.safetensors").is_file()


class AtSix(PlateauTrigger):
    def update(self, step, reward, entropy):
        super().update(step, reward, entropy)
        return PlateauWarning(step, reward, 0.0, entropy, -0.5) if step == 6 else None


def test_autonpo_over_a_factory(place, monkeypatch, capsys):
    monkeypatch.setattr(npo_core.control.watch, "PlateauTrigger", AtSix)
    _, code = examples("docs/own_run.md")
    loose = '"pool_cutoff": 1.0, "cache_rollouts": 128, "quality_floor": 0.0, "rollout_every": 0'
    sizes = {
        '"Qwen/Qwen3-0.6B"': '"base"',
        '"compute_steps": 400': f'"compute_steps": 8, {loose}',
        "gradient_accumulation_steps=4": "gradient_accumulation_steps=1, tau_gate=1.0",
        "max_completion_length=512": f"max_completion_length={WIDTH}",
        "save_steps=10": "save_steps=2",
    }
    first = run(code, sizes)
    folder = first["run"]
    assert [line["policy_step"] for line in folder.metrics()] == [1, 2, 3, 4, 5, 6, 5, 6]
    assert "rollback" in [event["event"] for event in folder.events()]
    assert sum(line["npo/replaced_slots"] for line in folder.metrics()) > 0
    assert (place / "final" / "model.safetensors").is_file()
    assert "'loss'" not in capsys.readouterr().out, "with disable_tqdm, transformers prints each step's numbers"
    lines = folder.metrics()
    # killed after the roll-back, and run again
    shutil.rmtree(folder.path / "branches" / "01")
    again = run(code, sizes)["run"]
    timeless = [[{**line, "step_time": 0} for line in each] for each in (lines, again.metrics())]
    assert timeless[0] == timeless[1]


def test_the_table_of_public_names_is_that_of_the_package():
    _, section = (ROOT / "docs" / "own_run.md").read_text().split("## Public names\n")
    names = [name for line in section.splitlines() if line.startswith("| `") for name in line.split("|")[1].split(",")]
    assert sorted(name.strip(" `") for name in names) == npo_core.__all__
