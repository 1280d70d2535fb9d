"""Times in turns: what else the machine does meanwhile hits all that are compared alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")

WARM_UP = 2  # turns that are not timed
LEAST = 5  # timed turns where as many are asked for


def turns(
    calls: Mapping[Name, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    most_seconds: float = float("inf"),
) -> dict[Name, list[float]]:
    """Seconds of each call in each of ``repeats`` turns.

    In a turn every call is timed once, after one that is not: the call before belongs to another, and its weights are
    in the caches.

    Args:
        calls: Called in this order in every turn.
        repeats: Timed turns.
        device: Where they compute.
        most_seconds: Fewer turns are timed where all would take longer, but :data:`LEAST` of them.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for turn in range(WARM_UP + repeats):
        if turn >= WARM_UP + LEAST and time.perf_counter() - started > most_seconds:
            break
        for name, call in calls.items():
            call()
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Waits until a device has computed what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
