"""Clocks for what is measured: on a CPU seconds of this process, on a GPU seconds until its work is done."""

import time
from collections.abc import Callable

import torch


def work_clock(device: torch.device | str) -> Callable[[], float]:
    """A clock, in seconds, of the work that a device does for this process.

    On a CPU it is the process's own time, which leaves out the waiting for a busy core; with several threads it is
    their sum. On a GPU it is that of the wall, as `wall_clock` has it.
    """
    return time.process_time if torch.device(device).type == "cpu" else wall_clock(device)


def work_unit(device: torch.device | str) -> str:
    """What `work_clock` counts, as a table has it."""
    return "CPU s" if torch.device(device).type == "cpu" else "s"


def wall_clock(device: torch.device | str) -> Callable[[], float]:
    """A clock of the wall, in seconds, that is read when all that a device was asked for is done.

    A call that gives work to a GPU returns before that work has begun.
    """
    place = torch.device(device)
    if place.type == "cpu":
        return time.perf_counter

    def read() -> float:
        torch.accelerator.synchronize(place)
        return time.perf_counter()

    return read
