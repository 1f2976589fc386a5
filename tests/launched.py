"""A run as the launcher starts it, sampling so that the number of processes cannot matter; for test_processes.

Each process of a run samples with a seed of its own, so runs of one and of two processes are different samples of the
same thing. To compare them, the uniform number behind each sampled token is made here from the prompt, the copy of it
and the place in the response, wherever that is computed. The trigger warns by the calendar. All else is the run's own.
"""

import hashlib
import json
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationMixin
from triggers import calendar

import npo_core.control.watch
from npo_core.runs.config import RunConfig
from npo_core.stages import run as stages

generate = GenerationMixin.generate


class Draws:
    """Uniform numbers for the rows of the batch that is sampled now."""

    rows: list[str]
    place: int


def free_port() -> int:
    """A port for the processes of one launch: two launches at a time must not meet at the launcher's own."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def generate_by_name(self, **inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    names = [str(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
    if "pixel_values" in inputs:
        pictures = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(dim=-1).tolist())
        shown = [hashlib.sha256(picture.float().numpy().tobytes()).hexdigest() for picture in pictures]
        names = [name + picture for name, picture in zip(names, shown, strict=True)]
    copies = Counter()
    Draws.rows, Draws.place = [], 0
    for name in names:
        Draws.rows.append(f"{name} {copies[name]}")
        copies[name] += 1
    return generate(self, **inputs)


def multinomial_by_name(probabilities, num_samples):
    assert num_samples == 1
    keys = [hashlib.sha256(f"{row} {Draws.place}".encode()).digest() for row in Draws.rows]
    draws = torch.tensor([[int.from_bytes(key[:4], "big") / 2**32] for key in keys], dtype=torch.float64)
    Draws.place += 1
    totals = probabilities.double().cumsum(dim=-1)
    return torch.searchsorted(totals, draws * totals[:, -1:]).clamp(max=probabilities.shape[-1] - 1)


def rig_process(warns_every: int, put: Callable[[object, str, object], None] = setattr) -> None:
    """Sample by name and warn by the calendar, here and until the process ends, or until what `put` set is undone."""
    put(npo_core.control.watch, "PlateauTrigger", calendar(warns_every))
    put(GenerationMixin, "generate", generate_by_name)
    put(torch, "multinomial", multinomial_by_name)


if __name__ == "__main__":
    rig_process(warns_every=int(sys.argv[3]))
    config = RunConfig.from_mapping(json.loads(Path(sys.argv[1]).read_text()))
    stages.run(config, Path(sys.argv[2]), quiet=True)
