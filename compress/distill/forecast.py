"""Says before a long training how long it will take and how much memory, from a measured step."""

import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from compress.distill import optimizers
from compress.system.progress import roughly, say

if TYPE_CHECKING:
    from compress.distill.trainer import Trainer

LONG = 1000
"""Steps from which a training is long: two more passes are nothing then."""
SAMPLE = 20_000_000
"""Weights that the optimizer's step is measured with, in copies; it takes as much longer as there are more."""


def forecast(trainer: "Trainer") -> None:
    """Prints the expected time and peak memory of the remaining steps of a long training; changes nothing.

    A part of a batch is passed forward and backward twice, and the second pass is timed. So is the optimizer's step:
    that of Muon is a fifth of a small model's. The moments, which do not exist before the first step, are counted as 8
    bytes a trained parameter.
    """
    settings, left = trainer.settings, trainer.settings.steps - trainer.record.step
    if left < LONG or trainer.accelerator.num_processes > 1:
        return
    device = trainer.parameters[0].device
    batch = trainer.batches(trainer.record.step, trainer.parts[0])
    seconds, used = _measured(trainer.objective, batch, device)
    moments = 0 if trainer.optimizer.state else 8 * sum(p.numel() for p in trainer.parameters)
    step = len(trainer.parts) * seconds + _update(trainer)
    expected = min(left * step, settings.seconds - trainer.record.seconds)
    say(
        f"{trainer.title}: {left:,} steps of batch {settings.batch_size} at {step:.3g} s each, as measured here: about "
        f"{roughly(expected)}; about {(used + moments) / 1e9:.1f} GB of memory"
    )


def _measured(objective: torch.nn.Module, batch: Any, device: torch.device) -> tuple[float, int]:
    """Seconds of the second pass, and the peak memory in bytes: on CUDA of its tensors, else of this process."""
    seconds = 0.0
    for _ in range(2):
        seconds = _timed(lambda: objective(batch)[0].backward(), device)
        used = _peak(device)
        objective.zero_grad(set_to_none=True)
    return seconds, used


def _update(trainer: "Trainer") -> float:
    """Seconds of the optimizer's second step, from copies of some of the weights with those as their gradients."""
    weights = trainer.parameters
    total = sum(weight.numel() for weight in weights)
    copies = [weight.detach().clone().requires_grad_() for weight in weights[:: -(-total // SAMPLE)]]
    optimizer, seconds = optimizers.make(copies, trainer.settings), 0.0
    for _ in range(2):
        for copy in copies:
            copy.grad = copy.detach().clone()
        seconds = _timed(optimizer.step, copies[0].device)
    return seconds * total / sum(copy.numel() for copy in copies)


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """The seconds that some work takes."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
