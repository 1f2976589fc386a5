"""A run that accelerate shards over two processes of the CPU, and what its trainers do there; for test_sharded."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import DistributedType, PartialState
from launched import rig_process
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from npo_core.processes import is_writer
from npo_core.runs.config import RunConfig
from npo_core.stages import run as stages
from npo_core.stages.factory import TrainerMaker, prepare
from npo_core.trainer.sampling import completion_logps
from npo_core.trainer.vllm import trainer_generate

prepare_backend = PartialState._prepare_backend


def with_gloo(self, *arguments):
    """accelerate shards only where it finds a GPU for each process."""
    backend, kind = prepare_backend(self, *arguments)
    return backend, DistributedType.MULTI_GPU if kind == DistributedType.MULTI_CPU else kind


class Passes(TrainerCallback):
    """Types of the gradients that are kept between the passes of a step."""

    def __init__(self):
        self.kept, self.missing = set(), 0

    def on_substep_end(self, args, state, control, model, **_):
        for parameter in model.parameters():
            if isinstance(parameter.grad, DTensor):
                self.kept.add(str(parameter.grad.dtype))
            else:
                self.missing += 1


def in_half_precision(config: RunConfig, folder: Path) -> dict:
    """Types in a step whose products are in bfloat16, and the weights that vLLM would be sent after a scoring pass."""
    world = prepare(config, quiet=True)
    passes, types = Passes(), set()
    trainer = TrainerMaker(config, world)(folder, None, [passes])
    score = trainer._get_per_token_logps_and_entropies

    def scored(*arguments, **settings):
        found = score(*arguments, **settings)
        types.add(str(found[0].dtype))
        return found

    trainer._get_per_token_logps_and_entropies = scored
    trainer.train()
    # as `_fill_cache` does, more than one portion of prompts: score, then send the weights
    rows, response = [world.train[0], world.train[1]], [world.processor.tokenizer.eos_token_id]
    completion_logps(trainer.model, world.processor, rows, [response] * 2)
    sent = {}

    class Sends(VLLMGeneration):
        def __init__(self):
            self.accelerator = trainer.accelerator

        def _fix_param_name_to_vllm(self, name, extra_prefixes=None):
            return name

        def sync_weights(self):
            sent.update(self._iter_fsdp2_params(trainer.model))

        def generate(self, **_):
            return None, [response], None, None

    engine = Sends()
    engine.temperature = 0
    asked = SimpleNamespace(
        use_vllm=True,
        vllm_mode="server",
        vllm_generation=engine,
        processing_class=world.processor,
        model=trainer.model,
        state=trainer.state,
        chat_template_kwargs={},
    )
    assert trainer_generate(asked)(rows[:1], 1, {"temperature": 1}) == [response]
    saved = trainer.accelerator.get_state_dict(trainer.model)
    same = all(torch.equal(saved[name], weight) for name, weight in sent.items()) if is_writer() else True
    return {
        "gradients": sorted(passes.kept),
        "without": passes.missing,
        "logps": sorted(types),
        "sent": len(sent),
        "same": same,
    }


if __name__ == "__main__":
    PartialState._prepare_backend = with_gloo
    rig_process(warns_every=int(sys.argv[3]))
    config = RunConfig.from_mapping(json.loads(Path(sys.argv[1]).read_text()))
    stages.run(config, Path(sys.argv[2]), quiet=True)
    half = config.with_changes(mixed_precision="bf16", compute_steps=1, method="grpo")
    found = in_half_precision(half, Path(sys.argv[2]) / "half")
    if is_writer():
        (Path(sys.argv[2]) / "half.json").write_text(json.dumps(found))
