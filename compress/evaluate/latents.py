"""Latents after the first denoising step: a cheap measure of a student's distance to its teacher."""

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compress.system.files import write_tensors

KEPT = 1024
"""Number of images whose latents are stored: enough for a mean to 0.1 dB; 64 MB for Stable Diffusion."""


class FirstStep:
    """Records the result of a scheduler's first step in each sampling.

    Args:
        scheduler: Scheduler of the sampling pipeline; ``step`` is replaced on this object only.
    """

    def __init__(self, scheduler: Any) -> None:
        self._latents: torch.Tensor | None = None
        step = scheduler.step

        @functools.wraps(step)  # pipelines inspect the signature
        def remembering(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if self._latents is None:
                latents = result[0] if isinstance(result, tuple) else result.prev_sample
                self._latents = latents.float().cpu()
            return result

        scheduler.step = remembering

    def take(self) -> torch.Tensor:
        """The latents of the last sampling, float32 ``(b, ...)`` on the CPU; resets for the next one.

        Raises:
            RuntimeError: No denoising step was made.
        """
        if self._latents is None:
            raise RuntimeError("the pipeline made no denoising step")
        found, self._latents = self._latents, None
        return found


def write_latents(folder: Path, start: int, latents: torch.Tensor) -> None:
    """Writes the latents of the batch that starts with image ``start``, atomically."""
    write_tensors(_file(folder, start), {"latents": latents})


def read_latents(folder: Path, start: int) -> torch.Tensor:
    """Reads the latents of a batch.

    Raises:
        FileNotFoundError: They were not written.
    """
    return load_file(_file(folder, start))["latents"]


def _file(folder: Path, start: int) -> Path:
    return folder / f"latents-{start:06d}.safetensors"
