"""Latents after the first denoising step: a cheap look at how far a student is from its teacher."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from compress.evaluate.config import EvaluateConfig
from compress.system.files import replace_with

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

KEPT = 1024
"""Latents are kept of the first so many images: enough for a mean to 0.1 dB, and 64 MB of Stable Diffusion's."""


class Stopped(Exception):
    """Ends a sampling after its first denoising step."""


class FirstStep:
    """Remembers what a scheduler's first step of each sampling gives.

    Args:
        scheduler: Of the pipeline that samples; ``step`` is replaced on this object alone.
        stop: Whether to end each sampling there, with :class:`Stopped`.
    """

    def __init__(self, scheduler: Any, stop: bool = False) -> None:
        self._latents: torch.Tensor | None = None
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at the signature
        def remembering(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if self._latents is None:
                latents = result[0] if isinstance(result, tuple) else result.prev_sample
                self._latents = latents.float().cpu()
            if stop:
                raise Stopped
            return result

        scheduler.step = remembering

    def take(self) -> torch.Tensor:
        """The latents of the sampling just made, float32 ``(b, ...)`` on the CPU; the next starts afresh.

        Raises:
            RuntimeError: No denoising step was made.
        """
        if self._latents is None:
            raise RuntimeError("the pipeline made no denoising step")
        found, self._latents = self._latents, None
        return found


def first_step(
    pipeline: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], config: EvaluateConfig
) -> torch.Tensor:
    """The latents after one denoising step, from the noise that :func:`compress.evaluate.sample.sample` starts with.

    Costs one pass of the denoiser instead of ``config.steps`` and no decoding: for analyses that ask often how much a
    change to the model changes its images.

    Args:
        pipeline: On its device, in its precision; left as it was.
        prompts: n captions, at least one.
        seeds: n seeds.
        config: Steps (which decide how far the first goes), guidance, scheduler, size and batch size.

    Returns:
        float32, ``(n, channels, height, width)``, or whatever shape the model's latents have, on the CPU.
    """
    from compress.evaluate.sample import call, sampler

    twin = sampler(pipeline, config)
    first = FirstStep(twin.scheduler, stop=True)
    found = []
    for start in range(0, len(prompts), config.batch_size):
        chosen = slice(start, start + config.batch_size)
        try:
            call(twin, prompts[chosen], seeds[chosen], config)
        except Stopped:
            found.append(first.take())
    return torch.cat(found)


def write_latents(folder: Path, start: int, latents: torch.Tensor) -> None:
    """Keeps the latents of the batch that starts with image ``start``; the file appears whole or not at all."""
    with replace_with(_file(folder, start)) as beside:
        save_file({"latents": latents.contiguous()}, beside)


def read_latents(folder: Path, start: int) -> torch.Tensor:
    """The latents of a batch, as they were kept.

    Raises:
        FileNotFoundError: They were not.
    """
    return load_file(_file(folder, start))["latents"]


def _file(folder: Path, start: int) -> Path:
    return folder / f"latents-{start:06d}.safetensors"
