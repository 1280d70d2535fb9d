"""Calls of a denoiser, recorded while its pipeline draws images: what it is given and what it predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, bad_value
from compress.models import denoiser

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from compress.models.inputs import Inputs


@dataclass(frozen=True)
class CallsConfig:
    """How images are sampled while the denoiser is watched.

    Attributes:
        examples: Number of sampled images, at least 1; their captions are random ones from the training data.
        steps: Scheduler steps per image, at least 1; they set the timesteps of the calls.
        side: Maximum side of the images in pixels; None: the model's own.
        guidance: Guidance scale; None: the pipeline's default.
        seed: Seed of the captions and the noise, in [0, 2^32); None: the run's seed.
    """

    examples: int = 2
    steps: int = 3
    side: int | None = 64
    guidance: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        for key in ("examples", "steps"):
            if getattr(self, key) < 1:
                raise bad_value(key, getattr(self, key), "a whole number of at least 1")
        if self.side is not None and self.side < 1:
            raise bad_value("side", self.side, "pixels, or null for the model's own size")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise bad_value("seed", self.seed, "a whole number from 0 to 2^32 - 1, or null for the run's")


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        inputs: Keyword arguments.
        output: What it predicted, any shape.
    """

    inputs: "Inputs"
    output: "torch.Tensor"


def draw(pipeline: "DiffusionPipeline", captions: Sequence[str], config: CallsConfig, seed: int) -> None:
    """Samples images, in one batch, for hooks to see what the denoiser is given at every step.

    A pipeline that was trained for few steps, or with guidance in it, is sampled so.

    Args:
        pipeline: Its parts are on one device.
        captions: To choose from.
        config: How many images, steps and so on.
        seed: The run's.

    Raises:
        UserError: The pipeline cannot be called with a prompt alone.
    """
    import torch

    from compress.models.inputs import call, smaller
    from compress.models.sampling import sampling_of

    own = sampling_of(pipeline)
    seed = seed if config.seed is None else config.seed
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [captions[order[i % len(order)]] for i in range(config.examples)]
    height, width = smaller(pipeline, config.side)
    guidance = None if config.guidance is None else own.argument(config.guidance)
    call(pipeline, prompts, steps=own.steps or config.steps, guidance=guidance, height=height, width=width, seed=seed)


def record_calls(pipeline: "DiffusionPipeline", captions: Sequence[str], config: CallsConfig, seed: int) -> list[Call]:
    """Samples images with few steps and records every call of the denoiser.

    Works for any pipeline that draws from a prompt, so nothing has to be known of its conditions and timesteps.

    Args:
        pipeline: Stays as it is; its parts are on one device.
        captions: To choose from.
        config: How many images, steps and so on.
        seed: The run's.

    Raises:
        UserError: The pipeline cannot be called with a prompt alone, or predicts NaN.
    """
    from compress.models.inputs import watch

    calls: list[Call] = []

    def record(module: "torch.nn.Module", args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call(given[-1], output[0]))

    given: list[Inputs] = []
    handle = denoiser(pipeline).register_forward_hook(record, with_kwargs=True)
    try:
        with watch(denoiser(pipeline), given.append):
            draw(pipeline, captions, config, seed)
    finally:
        handle.remove()
    if not all(call.output.isfinite().all() for call in calls):
        raise UserError(f"the denoiser predicts NaN or infinite values in {calls[0].output.dtype}: use precision=fp32")
    return calls
