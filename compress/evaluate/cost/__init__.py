"""What a denoiser costs: parameters, multiply-accumulates, bytes, seconds and memory."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UserError
from compress.evaluate.config import EvaluateConfig
from compress.evaluate.cost.latency import compiled_latencies, image_latencies, latencies, spread
from compress.evaluate.cost.memory import peak_memory
from compress.evaluate.cost.size import memory_bytes, weight_bytes
from compress.evaluate.cost.sparsity import count_zeros
from compress.evaluate.sample import sampler
from compress.models import denoiser, denoiser_name
from compress.models.inputs import Inputs, captured_inputs, map_tensors, sample_name
from compress.models.macs import Count, count
from compress.runtime import kernels
from compress.system.environment import environment
from compress.system.progress import bar

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "Count", "compiled_latencies", "count", "count_zeros", "denoiser_inputs", "device_name", "latencies", "map_tensors",
    "measure_cost", "memory_bytes", "peak_memory", "image_latencies", "spread", "weight_bytes",
]  # fmt: skip

IMAGES = 5  # timed images at most: one takes as long as twice its steps in passes
CONVENTIONS = {
    "macs": "multiply-accumulates (half the FLOPs) of convolutions, linear layers and the two products of each "
    "attention, for one pass over one image without guidance; norms, activations and sums do not count",
    "macs_without_attention": "macs without attention's two products",
    "bytes": "safetensors files of the denoiser",
    "sparsity": "share of zeros among the weights of convolutions and linear layers",
    "sparsity_2_4": "share of those weights that sit in layers where of four neighboring inputs at most two count",
    "sparse_bytes": "bytes, if each tensor took a bit for each number and only those that are not zero, where that is "
    "less: a size, not a file that diffusers reads",
    "memory_bytes": "weights and buffers of the loaded denoiser",
    "peak_memory_bytes": "loading the denoiser and one pass, above what Python and the libraries take",
    "latency_s": "median of one pass over one image without guidance, in its engine; low and high: 5th and 95th "
    "percentile",
    "image_latency_s": "median of one image from prompt to pixels, with guidance; low and high as above",
    "compiled_latency_s": "latency_s of the denoiser after torch.compile, which is not timed itself",
}


def measure_cost(
    pipeline: "DiffusionPipeline",
    folder: Path,
    config: EvaluateConfig,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    *,
    running: "DiffusionPipeline | None" = None,
) -> dict[str, Any]:
    """All costs of the pipeline's denoiser for one pass over one image without guidance, and of a whole image.

    Args:
        pipeline: On ``device``.
        folder: Its checkpoint.
        config: Size, scheduler, steps and guidance of an image, number of timed passes, whether to compile.
        device: Where the run computes.
        dtype: The run's precision.
        variant: Of the weight files, such as ``fp16``; None for those without one in their name.
        running: The same pipeline as an engine runs it, whose latencies are measured; None: ``pipeline``.

    Returns:
        ``params``, ``params_by_type``, ``macs``, ``macs_by_type``, ``macs_without_attention``, ``bytes``, ``sparsity``,
        ``sparsity_2_4``, ``sparse_bytes`` (None where there are too few zeros to gain from), ``memory_bytes``,
        ``peak_memory_bytes``, ``latency_s``, ``image_latency_s`` and ``compiled_latency_s`` (None where it was not
        asked for or cannot be had; ``compiled_note`` says why). Each latency is a median in seconds, beside it its
        5th and 95th percentile: ``latency_low_s``, ``latency_high_s`` and so on. Beside them ``pipeline_params`` with
        every other model, ``bytes_by_dtype``, ``settings``, and ``conventions``: what each number is of.

    Raises:
        UserError: ``folder`` holds no weights of the denoiser, or the pipeline does not pass all that it takes.
        RuntimeError: The denoiser has a shape that its config does not describe.
    """
    model, component = denoiser(pipeline), denoiser_name(pipeline)
    inputs = denoiser_inputs(pipeline, config)
    others = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module) and part is not model]
    size, by_dtype = weight_bytes(folder / component, variant)
    images = min(config.latency_repeats, IMAGES)
    running = running or pipeline
    with bar() as progress:
        task = progress.add_task("measuring cost", total=4 + config.compiled)
        try:
            counted = count(model, inputs)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{type(pipeline).__name__} does not give its denoiser all it needs: {error}") from error
        progress.advance(task)
        passes = latencies(denoiser(running), inputs, config.latency_repeats, device)
        seconds = spread("latency", passes)
        progress.advance(task)
        drawn = image_latencies(running, config, images, device, statistics.median(passes))
        seconds |= spread("image_latency", drawn)
        progress.advance(task)
        memory = peak_memory(folder, component, inputs, device, dtype, variant)
        progress.advance(task)
        compiled: list[float] = []
        note = None
        if config.compiled:
            compiled, note = compiled_latencies(model, inputs, config.latency_repeats, device)
            progress.advance(task)
        seconds |= spread("compiled_latency", compiled)
    sample = inputs[sample_name(model)]
    return {
        "params": counted.params,
        "params_by_type": counted.params_by_type,
        "macs": counted.macs,
        "macs_by_type": counted.macs_by_type,
        "macs_without_attention": counted.macs_without_attention,
        "bytes": size,
        **count_zeros(model, folder / component, variant),
        "memory_bytes": memory_bytes(model),
        "peak_memory_bytes": memory["peak_memory_bytes"],
        **seconds,
        "compiled_note": note,
        "pipeline_params": counted.params + sum(p.numel() for part in others for p in part.parameters()),
        "bytes_by_dtype": by_dtype,
        "settings": {
            "of": component,
            "batch": sample.shape[0],
            "sample": list(sample.shape[1:]),
            "dtype": str(dtype).removeprefix("torch."),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "latency_repeats": len(passes),
            "image_repeats": len(drawn),
            "memory": memory["method"],
            "engine": config.engine,
            "kernels": kernels(running),
        },
        "conventions": CONVENTIONS,
    }


def denoiser_inputs(pipeline: "DiffusionPipeline", config: EvaluateConfig) -> Inputs:
    """The arguments of the denoiser's first pass for one image without guidance, as the pipeline passes them."""
    scheduler = sampler(pipeline, config).scheduler
    return captured_inputs(pipeline, steps=config.steps, scheduler=scheduler, height=config.height, width=config.width)


def device_name(device: torch.device) -> str:
    """What the maker calls it: the GPU, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return environment()["cpu"]
