"""Inputs of a denoiser: captured from its own pipeline, or made from its config.

Captured inputs need no knowledge of a model: the stock pipeline passes text embeddings, pooled embeddings, time ids,
masks and guidance. Inputs made from the config need no weights: see :mod:`compress.models.families`.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.errors import UserError
from compress.models import denoiser
from compress.models.families import Draw, family_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Inputs = dict[str, Any]
"""Keyword arguments of one pass of a denoiser."""

SMALL_SIDE = 32  # latents: enough for every level of a UNet, and cheap even for the largest
SMALL_TOKENS = 8

AS_ASKED = {"use_resolution_binning": False, "clean_caption": False}
"""Arguments of PixArt's and SANA's pipelines: the size that is asked for, not the nearest of a list, which lacks those
of some models; and the prompt as it is, whether or not the packages that clean it are installed."""


class _Captured(Exception):
    """Ends sampling at the first pass of the denoiser."""


def example_inputs(
    model: Any, batch: int = 1, *, side: int | None = None, tokens: int | None = None, seed: int | None = None
) -> Inputs:
    """Inputs made from a denoiser's config, by default at the model's own size.

    Args:
        model: The denoiser; only its class and config matter.
        batch: Rows.
        side: Largest side of the latents; None: the model's.
        tokens: Length of the text; None: the family's.
        seed: Of normal values on the model's device and in its dtype, the same on every machine; None: float32 tensors
            on the meta device.

    Raises:
        UserError: The denoiser's inputs are unknown.
    """
    family = family_of(model)
    inputs = family.example(model.config, Draw(batch, side, tokens, seed)) if family else None
    if inputs is None:
        raise UserError(f"the inputs of a {type(model).__name__} of this config are not known")
    if seed is None:
        return inputs
    return map_tensors(inputs, lambda t: t.to(model.device, model.dtype if t.is_floating_point() else t.dtype))


def known_inputs(model: Any, batch: int = 1, **options: Any) -> Inputs | None:
    """As :func:`example_inputs`, or None if the denoiser's inputs are unknown."""
    try:
        return example_inputs(model, batch, **options)
    except UserError:
        return None


def small_inputs(model: Any, seed: int = 0) -> Inputs | None:
    """Random inputs of two rows with small latents and few tokens; None if the denoiser is unknown."""
    return known_inputs(model, 2, side=SMALL_SIDE, tokens=SMALL_TOKENS, seed=seed)


@torch.no_grad()
def predict(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The denoiser's output, in evaluation mode, moved to the CPU."""
    training = model.training
    model.eval()
    try:
        return model(**{**inputs, "return_dict": False})[0].cpu()
    finally:
        model.train(training)


def call(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    steps: int = 1,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    scheduler: Any = None,
) -> torch.Tensor:
    """Draws latents with any pipeline that takes a prompt.

    Unsupported arguments are left out; an inpainting pipeline gets a gray, fully masked image.

    Args:
        pipeline: Unchanged.
        prompts: One for each image.
        steps: Of the scheduler.
        guidance: Guidance scale; None: the pipeline's default.
        height: In pixels; None: the pipeline's.
        width: As ``height``.
        seed: Image i starts from the noise of ``seed + i``.
        scheduler: Replaces the pipeline's.

    Returns:
        The latents as the denoiser takes them, on the CPU; pixels in [-1, 1] of a pipeline without prompts.

    Raises:
        UserError: The pipeline needs more than a prompt.
    """
    from PIL import Image

    twin = copy.copy(pipeline)  # shallow: setting a component leaves the original unchanged
    twin.scheduler = copy.deepcopy(pipeline.scheduler if scheduler is None else scheduler)
    twin.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    wanted: dict[str, Any] = {
        "prompt": list(prompts), "num_inference_steps": steps, "guidance_scale": guidance, "height": height,
        "width": width, "generator": generators, "output_type": "latent", **AS_ASKED,
    }  # fmt: skip
    known = inspect.signature(twin.__call__).parameters
    if "prompt" not in known:
        wanted |= {"batch_size": len(prompts), "output_type": "np"}
    if "mask_image" in known:
        size = (width or 64, height or 64)
        wanted["image"] = [Image.new("RGB", size, "gray")] * len(prompts)
        wanted["mask_image"] = [Image.new("L", size, 255)] * len(prompts)
    try:
        found = twin(**{key: value for key, value in wanted.items() if key in known and value is not None})[0]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{type(pipeline).__name__} cannot draw an image from a prompt alone: {error}") from error
    return found.cpu() if isinstance(found, torch.Tensor) else torch.from_numpy(found).permute(0, 3, 1, 2) * 2 - 1


@contextmanager
def watch(model: nn.Module, see: Callable[[Inputs], None]) -> Iterator[None]:
    """Calls ``see`` with the keyword arguments before every pass of a denoiser."""
    signature = inspect.signature(type(model).forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        bound.pop("self")
        see({**bound, **bound.pop("kwargs", {})})

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def captured_inputs(pipeline: "DiffusionPipeline", prompts: Sequence[str] = ("",), **options: Any) -> Inputs:
    """The inputs of the denoiser's first pass for some prompts without guidance; the denoiser computes nothing.

    Args:
        pipeline: Unchanged.
        prompts: One row each.
        options: Of :func:`call`; the guidance scale is :func:`one_pass_guidance` unless it is given.

    Raises:
        UserError: The pipeline needs more than a prompt.
    """
    if not callable(pipeline):  # the stand-in for a denoiser without a pipeline
        return example_inputs(denoiser(pipeline), len(prompts))
    found: list[Inputs] = []

    def see(inputs: Inputs) -> None:
        found.append(inputs)
        raise _Captured

    options.setdefault("guidance", one_pass_guidance(denoiser(pipeline)))
    with watch(denoiser(pipeline), see):
        try:
            call(pipeline, prompts, **options)
        except _Captured:
            return found[0]
    raise UserError(f"{type(pipeline).__name__} draws without a pass of its denoiser")


def one_pass_guidance(model: Any) -> float | None:
    """The guidance scale that gives one row a prompt; None, the default, for models that take the scale as an input."""
    told = model.config.get("guidance_embeds") or model.config.get("time_cond_proj_dim")
    return None if told else 1.0


def own_size(pipeline: Any) -> tuple[int, int]:
    """Height and width in pixels of a model's default images."""
    side = getattr(pipeline, "default_sample_size", None) or denoiser(pipeline).config.get("sample_size") or 64
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    scale = getattr(pipeline, "vae_scale_factor", 1)
    return scale * height, scale * width


def smaller(pipeline: Any, most: int | None) -> tuple[int | None, int | None]:
    """Height and width of the model's images, scaled to at most ``most`` pixels a side; None: the model's own.

    At least one patch of latents, and whole patches.
    """
    if most is None:
        return None, None
    model = denoiser(pipeline)
    patch = 2 if getattr(family_of(model), "packed", False) else model.config.get("patch_size") or 1
    scale = getattr(pipeline, "vae_scale_factor", 1) * (patch if isinstance(patch, int) else max(patch))
    height, width = (min(own, max(scale, most // scale * scale)) for own in own_size(pipeline))
    return height, width


def sample_name(model: nn.Module) -> str:
    """Name of a denoiser's argument for the noisy latents."""
    return "sample" if "sample" in inspect.signature(type(model).forward).parameters else "hidden_states"


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Applies ``change`` to every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(part, change) for part in value)
    return value


def on_meta(inputs: Inputs) -> Inputs:
    """The same inputs on the meta device, numbers in float32."""
    return map_tensors(inputs, lambda t: t.to("meta", torch.float32 if t.is_floating_point() else t.dtype))
