"""What a denoiser costs: parameters, multiply-accumulates, bytes, seconds and memory."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import compress
from compress.errors import UserError
from compress.evaluate.config import EvaluateConfig
from compress.evaluate.sample import sampler
from compress.models import denoiser, denoiser_name
from compress.progress import bar

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WARM_UP = 3
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def measure_cost(
    pipeline: "DiffusionPipeline",
    folder: Path,
    config: EvaluateConfig,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
) -> dict[str, Any]:
    """All costs of the pipeline's denoiser for one pass over one picture of native size, without guidance.

    Args:
        pipeline: On ``device``.
        folder: Its checkpoint.
        config: Scheduler and number of timed passes.
        device: Where the run computes.
        dtype: The run's precision.
        variant: Of the weight files, such as ``fp16``; None for those without one in their name.

    Returns:
        ``params``, ``macs``, ``bytes``, ``peak_memory_bytes`` and ``latency_s`` (median), and what they mean:
        ``pipeline_params`` with every other model, ``bytes_by_dtype``, ``latency_low_s`` and ``latency_high_s``
        (5th and 95th percentile) and ``settings``.

    Raises:
        UserError: ``folder`` holds no weights of the denoiser.
        RuntimeError: The denoiser has a shape that its config does not describe.
    """
    model, component = denoiser(pipeline), denoiser_name(pipeline)
    inputs = denoiser_inputs(pipeline, config)
    others = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module) and part is not model]
    size, by_dtype = weight_bytes(folder / component, variant)
    with bar() as progress:
        task = progress.add_task("measuring cost", total=3)
        params, macs = count(model, inputs)
        progress.advance(task)
        seconds = latencies(model, inputs, config.latency_repeats, device)
        progress.advance(task)
        memory = peak_memory(folder, component, inputs, device, dtype, variant)
        progress.advance(task)
    low, high = np.percentile(seconds, [5, 95]).tolist()
    sample = next(value for value in (*inputs[0], *inputs[1].values()) if isinstance(value, torch.Tensor))
    return {
        "params": params,
        "macs": macs,
        "bytes": size,
        "peak_memory_bytes": memory["peak_memory_bytes"],
        "latency_s": statistics.median(seconds),
        "latency_low_s": low,
        "latency_high_s": high,
        "pipeline_params": params + sum(p.numel() for part in others for p in part.parameters()),
        "bytes_by_dtype": by_dtype,
        "settings": {
            "of": component,
            "batch": sample.shape[0],
            "sample": list(sample.shape[1:]),
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "latency_repeats": config.latency_repeats,
            "memory": memory["method"],
        },
    }


class _Captured(Exception):
    """Ends a sampling at its first pass of the denoiser."""


def denoiser_inputs(pipeline: "DiffusionPipeline", config: EvaluateConfig) -> Inputs:
    """The positional and keyword arguments of the denoiser's first pass for one picture without guidance.

    Taken from a real call of the pipeline, so whatever a model wants besides sample, time and text is there.
    """
    twin, captured = sampler(pipeline, config), []

    def capture(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args, kwargs))
        raise _Captured

    handle = denoiser(pipeline).register_forward_pre_hook(capture, with_kwargs=True)
    try:
        generator = torch.Generator("cpu").manual_seed(0)
        twin(prompt="", num_inference_steps=config.steps, guidance_scale=1.0, generator=generator)
    except _Captured:
        pass
    finally:
        handle.remove()
    return captured[0]


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Applies ``change`` to every tensor inside nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(part, change) for part in value)
    return value


def count(model: torch.nn.Module, inputs: Inputs) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one pass, of the model that the denoiser's config describes.

    Counted on the meta device, on a model in float: quantized weights count as the numbers that they stand for, and
    attention is counted, which a CPU's fused kernel would hide. Products in convolutions, linear layers and attention
    count; norms, activations and additions do not.

    Raises:
        RuntimeError: The model's parameters are not those of its config.
    """
    from torch.utils.flop_counter import FlopCounterMode

    settings = {key: value for key, value in model.config.items() if key != "quantization_config"}  # type: ignore
    with torch.device("meta"):
        empty = type(model).from_config(settings).eval().to("meta", torch.float32)  # type: ignore[attr-defined]
    params = sum(p.numel() for p in empty.parameters())
    plain = "quantization_config" not in model.config  # type: ignore[operator]
    if plain and params != (found := sum(p.numel() for p in model.parameters())):
        raise RuntimeError(f"the denoiser has {found} parameters, but its config describes {params}")
    args, kwargs = map_tensors(inputs, lambda t: t.to("meta", torch.float32 if t.is_floating_point() else t.dtype))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        empty(*args, **kwargs)
    return params, counter.get_total_flops() // 2


def weight_bytes(folder: Path, variant: str | None = None) -> tuple[int, dict[str, int]]:
    """Bytes on disk of a model's safetensors files, one or several shards, and of their tensors by data type.

    Raises:
        UserError: There are none.
    """
    found = sorted(folder.glob("*.safetensors"))
    plain = [file for file in found if file.name.count(".") == 1]
    files = [file for file in found if variant and f".{variant}." in file.name] or plain
    if not files:
        raise UserError(f"{folder}: no safetensors files; the checkpoint is not whole")
    by_dtype: dict[str, int] = {}
    for file in files:
        # The header alone: 8 bytes of its length, then JSON.
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                by_dtype[entry["dtype"]] = by_dtype.get(entry["dtype"], 0) + end - start
    return sum(file.stat().st_size for file in files), by_dtype


@torch.no_grad()
def latencies(model: torch.nn.Module, inputs: Inputs, repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of ``repeats`` passes, after some that are not timed."""
    args, kwargs = inputs
    seconds = []
    for index in range(WARM_UP + repeats):
        _synchronize(device)
        start = time.perf_counter()
        model(*args, **kwargs)
        _synchronize(device)
        if index >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(
    folder: Path,
    component: str,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
) -> dict[str, Any]:
    """Peak memory of loading the denoiser from its checkpoint and of one pass, in a process of its own.

    Returns:
        ``{"peak_memory_bytes", "method"}``.

    Raises:
        RuntimeError: The process failed.
    """
    root = str(Path(compress.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs.pt"
        torch.save(map_tensors(inputs, lambda t: t.cpu()), file)
        command = [sys.executable, "-m", "compress.evaluate.memory", str(folder.resolve()), component, str(file)]
        command += ["--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
        command += ["--threads", str(torch.get_num_threads())]
        command += ["--variant", variant] if variant else []
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the peak memory of {folder} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
