"""The one way pictures are sampled here: a seed for every prompt."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import torch

from compress.errors import bad_value
from compress.evaluate.config import SCHEDULERS, EvaluateConfig
from compress.progress import track

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

# Stable Diffusion's PNDM is the one without Runge-Kutta steps; a DDPM config does not say so.
CHANGES = {"pndm": {"skip_prk_steps": True}}


def sampler(pipeline: "DiffusionPipeline", config: EvaluateConfig) -> "DiffusionPipeline":
    """A pipeline with the same models, the configured scheduler and no progress bar of its own.

    The models are shared; ``pipeline`` itself keeps its scheduler.

    Raises:
        UserError: The scheduler is of another family than the pipeline's, as for a flow-matching model.
    """
    # A shallow copy: setting a component on it leaves the original's components and config alone.
    twin = copy.copy(pipeline)
    twin.set_progress_bar_config(disable=True)
    name = SCHEDULERS[config.scheduler]
    own = pipeline.scheduler
    if name is not None:
        kind = getattr(diffusers, name)
        if not isinstance(own, kind) and kind not in own.compatibles:
            expected = f"checkpoint, since the model's {type(own).__name__} cannot be exchanged for a {name}"
            raise bad_value("evaluate.scheduler", config.scheduler, expected)
        own = kind.from_config(own.config, **CHANGES.get(config.scheduler, {}))
    else:
        own = copy.deepcopy(own)
    twin.scheduler = own
    return twin


def sample(
    pipeline: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], config: EvaluateConfig
) -> torch.Tensor:
    """Samples a picture for every prompt, at the pipeline's native size.

    Picture ``i`` starts from the noise of ``torch.Generator("cpu").manual_seed(seeds[i])``, whatever the batch size,
    the device or the number of processes.

    Args:
        pipeline: On its device, in its precision; left as it was.
        prompts: n captions, at least one.
        seeds: n seeds.
        config: Steps, guidance, scheduler and batch size.

    Returns:
        uint8 RGB, ``(n, 3, height, width)``, on the CPU; rounded as the pipeline's ``output_type="pil"`` rounds.

    Raises:
        FloatingPointError: The model gives NaN.
        UserError: The scheduler does not fit the model.
    """
    twin = sampler(pipeline, config)
    starts = range(0, len(prompts), config.batch_size)
    batches = []
    for start in track(starts, f"sampling {len(prompts)} pictures"):
        chosen = slice(start, start + config.batch_size)
        pictures = twin(
            prompt=list(prompts[chosen]),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chosen]],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            output_type="np",
        ).images
        broken = np.isnan(pictures).any(axis=(1, 2, 3))
        if broken.any():
            first = start + int(broken.argmax())
            raise FloatingPointError(
                f"the model gives NaN: picture {first} (prompt {prompts[first]!r}, seed {seeds[first]}) and "
                f"{int(broken.sum()) - 1} more of its batch; a precision with a wider range (bf16, fp32) may help"
            )
        batches.append(torch.from_numpy((pictures * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous())
    return torch.cat(batches)


def sample_grid(
    pipeline: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], config: EvaluateConfig
) -> list[dict[str, object]]:
    """Samples pictures one at a time, so that a user who calls the pipeline with one prompt gets the same bits.

    Returns:
        ``{"prompt", "seed", "image"}`` for every prompt, the image as a PIL image. ``pipeline(prompt,
        generator=torch.Generator("cpu").manual_seed(seed), num_inference_steps=..., guidance_scale=...)`` with the
        configured scheduler gives it again.
    """
    pictures = sample(pipeline, prompts, seeds, replace(config, batch_size=1))
    return [
        {"prompt": prompt, "seed": seed, "image": to_pil(picture)}
        for prompt, seed, picture in zip(prompts, seeds, pictures, strict=True)
    ]


def to_pil(picture: torch.Tensor) -> "Image":
    """A uint8 tensor ``(3, height, width)`` as a PIL image."""
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def blank(pictures: torch.Tensor) -> int:
    """How many uint8 pictures ``(n, 3, height, width)`` are of one color all over, as a broken model's may be."""
    flat = pictures.flatten(2)
    return int((flat.amax(dim=2) == flat.amin(dim=2)).all(dim=1).sum())
