"""Several processes that are one run: how they join, agree, and share the work.

One process writes the run folder and decides; the others are told. What is sampled or scored off line is shared between
them. With one process every function here hands back what it was given.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState

T = TypeVar("T")

PATIENCE = 6
"""Hours that processes wait for one that downloads a policy, copies checkpoints or writes a large one."""


def join() -> PartialState:
    """Join the other processes of a run, where a launcher started several; to be called before anything else.

    Returns:
        accelerate's state of this process, with its device.
    """
    if "WORLD_SIZE" not in os.environ:
        return PartialState(cpu=not torch.cuda.is_available())  # as the trainers choose their device
    if not torch.accelerator.is_available():
        # accelerate numbers the processors ("cpu:1"), and torch cannot load an optimiser's state to such a device
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    return PartialState(timeout=timedelta(hours=PATIENCE))


def own_device() -> torch.device:
    """Device of this process."""
    device = join().device
    assert device is not None  # accelerate has set it
    return device


def process_count() -> int:
    """Processes of this run."""
    return torch.distributed.get_world_size() if _joined() else 1


def process_number() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if _joined() else 0


def is_writer() -> bool:
    """Whether this process writes the run folder."""
    return process_number() == 0


def agree(decide: Callable[[], T]) -> T:
    """What the writing process makes of `decide`, in every process; an error there is raised in all of them."""
    if not _joined():
        return decide()
    told: list[Any] = [None, None]
    if is_writer():
        try:
            told[0] = decide()
        except Exception as error:  # handed to the others, which would wait for ever
            told[1] = error
    torch.distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def collect(part: T) -> list[T]:
    """The parts of all processes, in their order, in every process."""
    if not _joined():
        return [part]
    parts: list[Any] = [None] * process_count()
    torch.distributed.all_gather_object(parts, part)
    return parts


def shared(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[Any]]) -> list[Any]:
    """`work` on all items, each process doing a part; the results in the order of the items, in every process.

    Parts are equally long, so that processes which compute together never wait for each other: the last ones repeat an
    item, and what comes of it is dropped.

    Args:
        items: What is to be done.
        work: Makes one result per item.
    """
    count = process_count()
    if count == 1 or not items:
        return list(work(items))
    length = -(-len(items) // count)
    padded = [*items, *[items[-1]] * (length * count - len(items))]
    start = process_number() * length
    parts = collect(list(work(padded[start : start + length])))
    return [result for part in parts for result in part][: len(items)]


def _joined() -> bool:
    """Whether there are others; vLLM opens a process group for itself alone."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return together and torch.distributed.get_world_size() > 1
