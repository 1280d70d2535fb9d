"""Seconds of a pass of the denoiser, eager and compiled, and of a whole image."""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.evaluate.config import EvaluateConfig
from compress.evaluate.sample import accepted, sampler, size
from compress.models.call import needs
from compress.models.inputs import AS_ASKED, Inputs
from compress.runtime.turns import synchronize

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WARM_UP = 3
LEAST = 3  # timed calls where as many are asked for: of fewer there is no median, and no spread
# What is slow varies little from call to call: where all calls would take longer than that, fewer are made.
MOST_SECONDS = 20.0
MOST_IMAGE_SECONDS = 60.0
# Largest difference that a compiled denoiser may have from the eager one, as a share of the largest output.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def timed(call: Callable[[], Any], repeats: int, device: torch.device, warm_up: int = WARM_UP) -> list[float]:
    """Seconds of each of ``repeats`` calls, after ``warm_up`` that are not timed.

    Where all would take longer than :data:`MOST_SECONDS`, one that is not timed and fewer that are, but :data:`LEAST`
    of them; the first call may have compiled something, so the second one decides.
    """
    seconds: list[float] = []
    while len(seconds) < warm_up + repeats:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 2 and seconds[1] * (warm_up + repeats - 1) > MOST_SECONDS:
            warm_up = min(warm_up, 1)
            repeats = min(repeats, max(LEAST, int(MOST_SECONDS / seconds[1])))
    return seconds[warm_up:]


def spread(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Median, and 5th and 95th percentile, as ``<name>_s``, ``<name>_low_s`` and ``<name>_high_s``.

    None of nothing; a single call has no percentiles.
    """
    found: dict[str, float | None] = {f"{name}_s": statistics.median(seconds) if seconds else None}
    for end, percent in (("low", 5), ("high", 95)):
        found[f"{name}_{end}_s"] = float(np.percentile(seconds, percent)) if len(seconds) > 1 else None
    return found


@torch.no_grad()
def latencies(model: torch.nn.Module, inputs: Inputs, repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of ``repeats`` passes, after some that are not timed; see :func:`timed`."""
    return timed(lambda: model(**inputs), repeats, device)


def image_latencies(
    pipeline: "DiffusionPipeline", config: EvaluateConfig, repeats: int, device: torch.device, step: float = 0.0
) -> list[float]:
    """Seconds of each of ``repeats`` images from prompt to pixels, one at a time, after one that is not timed.

    Fewer of slow ones, see :func:`timed`; none of a pipeline that needs more than a prompt, or where an image's passes
    of the denoiser alone would take longer than :data:`MOST_IMAGE_SECONDS`.

    Args:
        pipeline: On ``device``.
        config: Size, scheduler, steps and guidance of the image.
        repeats: Timed images.
        device: Where they are made.
        step: Seconds of one pass of the denoiser.
    """
    if step * config.steps * (2 if config.guidance > 1 else 1) > MOST_IMAGE_SECONDS:
        return []
    if needs(type(pipeline)):
        return []
    twin = sampler(pipeline, config)

    def draw() -> None:
        wanted = {
            "prompt": "an image", "generator": torch.Generator("cpu").manual_seed(0), "output_type": "np",
            "num_inference_steps": config.steps, "guidance_scale": config.guidance, **size(config),
            **AS_ASKED,
        }  # fmt: skip
        twin(**accepted(twin, wanted))

    return timed(draw, repeats, device, warm_up=1)


@torch.no_grad()
def compiled_latencies(
    model: torch.nn.Module, inputs: Inputs, repeats: int, device: torch.device
) -> tuple[list[float], str]:
    """Seconds of each of ``repeats`` passes of the compiled denoiser, whose output must be that of the eager one.

    Args:
        model: The denoiser; left as it was.
        inputs: Keyword arguments of the pass.
        repeats: Timed passes.
        device: Where to compute.

    Returns:
        The seconds, none if the model cannot be compiled or computes something else then; and a sentence that says
        how far the compiled output is from the eager one, or why there are none.
    """
    inputs = {**inputs, "return_dict": False}
    expected = model(**inputs)[0]
    try:
        compiled = torch.compile(model)
        found = compiled(**inputs)[0]
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE[expected.dtype]:  # NaN does not count as near
            return [], f"refused: the compiled output differs by {difference:.1g} of the largest value"
        seconds = latencies(compiled, inputs, repeats, device)
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways, none of which may end a measurement
        return [], f"torch.compile failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    finally:
        torch.compiler.reset()
    return seconds, f"torch.compile; its output differs by {difference:.1g} of the largest value"
