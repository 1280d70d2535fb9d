"""Calls of a denoiser, recorded while its pipeline draws images: what it is given and what it predicts."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UserError
from compress.models import denoiser
from compress.models.inputs import Inputs, first_inputs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.prune.depth import Calibration


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        inputs: Positional and keyword arguments.
        output: What it predicted, any shape.
    """

    inputs: Inputs
    output: torch.Tensor


def record_calls(
    pipeline: "DiffusionPipeline", captions: Sequence[str], config: "Calibration", seed: int
) -> list[Call]:
    """Draws images with few steps and records every call of the denoiser.

    Works for any pipeline that draws from a prompt, so nothing has to be known of its conditions and timesteps.

    Args:
        pipeline: Stays as it is; its parts are on one device.
        captions: To choose from.
        config: See :class:`compress.prune.depth.Calibration`.
        seed: The run's.

    Raises:
        UserError: The pipeline cannot be called with a prompt alone, or predicts NaN.
    """
    seed = seed if config.seed is None else config.seed
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [captions[order[i % len(order)]] for i in range(config.examples)]
    calls: list[Call] = []

    def record(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call((args, kwargs), output[0]))

    handle = denoiser(pipeline).register_forward_hook(record, with_kwargs=True)
    try:
        _draw(pipeline, prompts, config.steps, config.guidance, seed, _side(pipeline, config.side))
    finally:
        handle.remove()
    if not all(call.output.isfinite().all() for call in calls):
        raise UserError(f"the denoiser predicts NaN or infinite values in {calls[0].output.dtype}: use precision=fp32")
    return calls


def full_size_inputs(pipeline: "DiffusionPipeline") -> Inputs:
    """Arguments of the denoiser for one image of the model's own size; it computes nothing."""
    return first_inputs(pipeline, lambda: _draw(pipeline, [""], 1, 1.0, 0, None))


def _side(pipeline: Any, most: int | None) -> int | None:
    own = getattr(pipeline, "default_sample_size", None) or denoiser(pipeline).config.sample_size  # type: ignore
    scale = getattr(pipeline, "vae_scale_factor", None)
    if most is None or own is None or scale is None:
        return most
    return min(most, scale * (max(own) if isinstance(own, (list, tuple)) else own))


def _draw(pipeline: Any, prompts: list[str], steps: int, guidance: float | None, seed: int, side: int | None) -> None:
    """Calls the pipeline, whatever its kind; with a scheduler of its own, whose state is then nobody else's."""
    from PIL import Image

    twin = copy.copy(pipeline)  # shallow: a component that is set on it stays its own
    twin.scheduler = copy.deepcopy(pipeline.scheduler)
    twin.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    wanted = {
        "prompt": prompts, "num_inference_steps": steps, "guidance_scale": guidance, "height": side, "width": side,
        "generator": generators, "output_type": "latent",
        # PixArt and Sana would turn the size into a larger one, or want packages to clean captions.
        "use_resolution_binning": False, "clean_caption": False,
    }  # fmt: skip
    known = inspect.signature(twin.__call__).parameters
    if "mask_image" in known:  # everything is to be painted
        pixels = side or 64
        wanted["image"] = [Image.new("RGB", (pixels, pixels), "gray")] * len(prompts)
        wanted["mask_image"] = [Image.new("L", (pixels, pixels), 255)] * len(prompts)
    try:
        twin(**{key: value for key, value in wanted.items() if key in known and value is not None})
    except (TypeError, ValueError) as error:
        raise UserError(f"{type(pipeline).__name__} cannot draw a image from a prompt alone: {error}") from error
