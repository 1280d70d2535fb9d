"""Calls of a denoiser, recorded while its pipeline draws images: what it is given and what it predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UserError
from compress.models import denoiser
from compress.models.inputs import Inputs, call, smaller, watch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.prune.depth import DepthCalibration


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        inputs: Keyword arguments.
        output: What it predicted, any shape.
    """

    inputs: Inputs
    output: torch.Tensor


def record_calls(
    pipeline: "DiffusionPipeline", captions: Sequence[str], config: "DepthCalibration", seed: int
) -> list[Call]:
    """Draws images with few steps and records every call of the denoiser.

    Works for any pipeline that draws from a prompt, so nothing has to be known of its conditions and timesteps.

    Args:
        pipeline: Stays as it is; its parts are on one device.
        captions: To choose from.
        config: See :class:`compress.prune.depth.DepthCalibration`.
        seed: The run's.

    Raises:
        UserError: The pipeline cannot be called with a prompt alone, or predicts NaN.
    """
    seed = seed if config.seed is None else config.seed
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [captions[order[i % len(order)]] for i in range(config.examples)]
    calls: list[Call] = []

    def record(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call(given[-1], output[0]))

    given: list[Inputs] = []
    handle = denoiser(pipeline).register_forward_hook(record, with_kwargs=True)
    try:
        with watch(denoiser(pipeline), given.append):
            height, width = smaller(pipeline, config.side)
            call(pipeline, prompts, steps=config.steps, guidance=config.guidance, height=height, width=width, seed=seed)
    finally:
        handle.remove()
    if not all(call.output.isfinite().all() for call in calls):
        raise UserError(f"the denoiser predicts NaN or infinite values in {calls[0].output.dtype}: use precision=fp32")
    return calls
