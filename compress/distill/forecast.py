"""Says before a long training how long it will take and how much memory, from a measured step."""

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from compress.system.progress import roughly, say

if TYPE_CHECKING:
    from compress.distill.trainer import Trainer

LONG = 1000
"""Steps from which a training is long: two more passes are nothing then."""


def forecast(trainer: "Trainer") -> None:
    """Prints the expected time and peak memory of the remaining steps of a long training; changes nothing.

    A part of a batch is passed forward and backward twice, and the second pass is timed. The moments of the optimizer,
    which do not exist before the first step, are counted as 8 bytes a trained parameter.
    """
    settings, left = trainer.settings, trainer.settings.steps - trainer.record.step
    if left < LONG or trainer.accelerator.num_processes > 1:
        return
    device = trainer.parameters[0].device
    batch = trainer.batches(trainer.record.step, trainer.parts[0])
    seconds, used = _measured(trainer.objective, batch, device)
    moments = 0 if trainer.optimizer.state else 8 * sum(p.numel() for p in trainer.parameters)
    step = len(trainer.parts) * seconds
    say(
        f"{trainer.title}: {left:,} steps of batch {settings.batch_size} at {step:.3g} s each, as measured here: about "
        f"{roughly(left * step)}; about {(used + moments) / 1e9:.1f} GB of memory"
    )


def _measured(objective: torch.nn.Module, batch: Any, device: torch.device) -> tuple[float, int]:
    """Seconds of the second pass, and the peak memory in bytes: on CUDA of its tensors, else of this process."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        objective(batch)[0].backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        used = _peak(device)
        objective.zero_grad(set_to_none=True)
    return seconds, used


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
