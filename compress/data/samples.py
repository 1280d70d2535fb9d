"""Latents that a teacher samples itself, to train on in place of images or beside them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclass(frozen=True)
class SamplesConfig:
    """How many latents the teacher samples, and how.

    Attributes:
        count: At least 0; of data without images 0 stands for one of each prompt.
        steps: Of the scheduler, at least 1.
        guidance: Guidance scale; None: the pipeline's default.
        scheduler: One of :data:`compress.models.schedulers.SCHEDULERS`; ``checkpoint`` is the pipeline's own.
        batch_size: Sampled at once, at least 1; decides memory, and results only up to rounding.
    """

    count: int = 0
    steps: int = 25
    guidance: float | None = None
    scheduler: str = "checkpoint"
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        from compress.models.schedulers import SCHEDULERS

        for key, least in (("count", 0), ("steps", 1), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise bad_value(key, getattr(self, key), f"a whole number of at least {least}")
        if self.guidance is not None and self.guidance < 0:
            raise bad_value("guidance", self.guidance, "a number of at least 0, or null for the pipeline's default")
        if self.scheduler not in SCHEDULERS:
            raise bad_value("scheduler", self.scheduler, "one of " + ", ".join(SCHEDULERS))


def sampled_prompts(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """The prompts of ``count`` samples: all in random order, again and again.

    Raises:
        UserError: There is no prompt.
    """
    import torch

    from compress.system.random import generator

    if not prompts:
        raise UserError("there is no prompt to sample from: the training data is empty")
    order = torch.randperm(len(prompts), generator=generator(seed, "prompts", 0)).tolist()
    return [prompts[order[index % len(order)]] for index in range(count)]


def sample_latents(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    config: SamplesConfig,
    height: int,
    width: int,
    seed: int,
    first: int = 0,
) -> "Tensor":
    """Latents of one batch as the denoiser takes them, ``(b, ...)`` on the CPU; without an autoencoder, pixels.

    Args:
        pipeline: The teacher; unchanged.
        prompts: Of this batch.
        config: See :class:`SamplesConfig`.
        height: Of the images, in pixels.
        width: As ``height``.
        seed: Of the noise, which is none that an evaluation with this seed draws.
        first: Number of the first sample; the noise depends on the number.

    Raises:
        UserError: The pipeline needs more than a prompt, or gives NaN.
    """
    from compress.models.inputs import call
    from compress.models.schedulers import exchanged

    any_pipeline: Any = pipeline
    other = None if config.scheduler == "checkpoint" else exchanged(any_pipeline.scheduler, config.scheduler)
    noise = int.from_bytes(hashlib.sha256(f"{seed}/samples".encode()).digest()[:4], "little")
    found = call(
        pipeline, prompts, steps=config.steps, guidance=config.guidance, height=height, width=width,
        seed=noise + first, scheduler=other,
    )  # fmt: skip
    if not found.isfinite().all():
        raise UserError("the teacher gives NaN or infinite latents: use precision=fp32 or bf16")
    return found
