"""What a denoiser is called with."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from compress.evaluate.config import EvaluateConfig
from compress.evaluate.sample import sampler
from compress.models import denoiser

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class _Captured(Exception):
    """Ends a sampling at its first pass of the denoiser."""


def denoiser_inputs(pipeline: "DiffusionPipeline", config: EvaluateConfig) -> Inputs:
    """The positional and keyword arguments of the denoiser's first pass for one image without guidance.

    Taken from a real call of the pipeline, so whatever a model wants besides sample, time and text is there.
    """
    twin = sampler(pipeline, config)
    wanted = {"prompt": "", "num_inference_steps": config.steps, "guidance_scale": 1.0}
    wanted |= {"generator": torch.Generator("cpu").manual_seed(0), **size(config)}
    return first_inputs(pipeline, lambda: twin(**accepted(twin, wanted)))


def first_inputs(pipeline: "DiffusionPipeline", draw: Callable[[], Any]) -> Inputs:
    """The arguments of the first pass of a pipeline's denoiser while something is drawn; it computes nothing.

    Args:
        pipeline: Stays as it is.
        draw: Calls the pipeline, or another with the same denoiser.
    """
    captured: list[Inputs] = []

    def capture(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args, kwargs))
        raise _Captured

    handle = denoiser(pipeline).register_forward_pre_hook(capture, with_kwargs=True)
    try:
        draw()
    except _Captured:
        pass
    finally:
        handle.remove()
    return captured[0]


def accepted(pipeline: "DiffusionPipeline", wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that a pipeline takes: one without text takes no prompt and no guidance."""
    known = inspect.signature(pipeline.__call__).parameters  # type: ignore[operator]
    return {name: value for name, value in wanted.items() if name in known}


def size(config: EvaluateConfig) -> dict[str, int]:
    """Arguments of the pipeline for the size of the images; none where it is the model's own."""
    wanted = {"height": config.height, "width": config.width}
    return {name: value for name, value in wanted.items() if value is not None}


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Applies ``change`` to every tensor inside nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(part, change) for part in value)
    return value
