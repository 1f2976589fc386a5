"""vLLM's CPU build made fit for training; run as a script, a whole run with it in a process of its own.

Its trigger warns by the calendar, and with a word more its verifier finds about every second response right, whatever
a tiny policy knows. One process holds one engine: vLLM tears its process group down with the engine, and
nothing distributed works after.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from triggers import calendar
from trl.generation import vllm_generation


def make_fit() -> None:
    """Linear layers keep their weights after loading, or none could be sent to them again; no compilation."""
    from vllm.model_executor.layers import linear, utils

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    for module in (utils, linear):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = plain
    vllm_generation.LLM = partial(vllm_generation.LLM, enforce_eager=True)


def by_words(text, row) -> bool:
    """Right by a coin that the words of a response toss; its length would not do, where all have one form."""
    return sum(map(ord, text)) % 2 == 0


if __name__ == "__main__":
    make_fit()
    import npo_core.control.watch
    from npo_core.runs.config import RunConfig
    from npo_core.stages import factory
    from npo_core.stages import run as stages

    if "lenient" in sys.argv:
        factory.BoxedVerifier = lambda: by_words
    npo_core.control.watch.PlateauTrigger = calendar(6)
    stages.run(RunConfig.from_mapping(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), quiet=True)
