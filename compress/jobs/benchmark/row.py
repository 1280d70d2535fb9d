"""Measures one row of a benchmark, in a separate process of :mod:`compress.jobs.benchmark.process`."""

import functools
import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.config.values import PRECISIONS
from compress.evaluate.cost.latency import spread, timed
from compress.evaluate.cost.memory import forget_peak, peak_since, process_peak
from compress.evaluate.sample import accepted
from compress.jobs.benchmark.apply import apply, refusal
from compress.jobs.benchmark.config import Choices
from compress.jobs.benchmark.model import load_model
from compress.jobs.benchmark.prompt import embedding_names
from compress.models import ModelConfig
from compress.models.inputs import AS_ASKED, own_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Embedding = dict[str, torch.Tensor]  # replaces a prompt; by the names of the call's arguments
REHEARSAL = (2, 4)  # steps of the images sampled before measuring


@dataclass(frozen=True)
class Task:
    """Everything that the process of a row gets.

    Attributes:
        model: The pipeline.
        choices: The row's choices.
        device: Where to run.
        threads: CPU threads.
        prompts: Prompts of the images for quality.
        seeds: A seed for each prompt.
        guidance: Classifier-free guidance scale.
        height: Of the images in pixels; None for the model's own.
        width: As ``height``.
        image_batch: Batch size of the images for quality; the row's own if that is larger.
        repeats: Timed calls.
        longest: Longest seconds per image; a slower row is skipped. None is no limit.
        other_seeds: Seeds of as many further images of the same prompts with other noise.
    """

    model: ModelConfig
    choices: Choices
    device: str
    threads: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float
    height: int | None
    width: int | None
    image_batch: int
    repeats: int
    longest: float | None = None
    other_seeds: tuple[int, ...] = ()


def measure(task: Task) -> dict[str, Any]:
    """Measures a row; call it in a process that does nothing else.

    Returns:
        ``{"skipped": reason}``, or ``cost`` (see :func:`_cost`), ``images`` (uint8, ``(n, 3, height, width)``) and, if
        the task has other seeds, ``others``, of the same shape.

    Raises:
        FloatingPointError: The model gives NaN.
        UserError: The pipeline cannot be loaded.
    """
    torch.set_num_threads(task.threads)
    choices, device = task.choices, torch.device(task.device)
    pipeline = _load(task)
    if reason := refusal(pipeline, choices, device, _size(pipeline, task), task.model.folder):
        return {"skipped": reason}
    # Imports and one-time setup are not the row's memory: do them before the baseline.
    pipeline = apply(pipeline, replace(choices, compile=False, engine="eager"), device)
    _call(pipeline, task, [0], steps=REHEARSAL[0])
    if task.longest is not None and (expected := _expected(pipeline, task, device)) > task.longest:
        return {"skipped": f"an image would take about {expected:.2g} s, longer than the limit of {task.longest:.2g} s"}
    del pipeline
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    forget_peak()
    baseline = process_peak()
    pipeline = apply(_load(task), choices, device)
    embedded = _embed(pipeline, task) if choices.reuse_prompt else None
    first = [index % len(task.prompts) for index in range(choices.batch_size)]
    cost = _cost(task, timed(lambda: _call(pipeline, task, first, embedded), task.repeats, device, warm_up=1), baseline)
    found = {"cost": cost, "images": _draw(pipeline, task, embedded)}
    if task.other_seeds:
        found["others"] = _draw(pipeline, replace(task, seeds=task.other_seeds), embedded)
    return found


def _draw(pipeline: "DiffusionPipeline", task: Task, embedded: list[Embedding] | None) -> np.ndarray:
    """All images of a row, uint8, ``(n, 3, height, width)``."""
    choices = task.choices
    at_once = choices.batch_size if choices.compile else max(choices.batch_size, task.image_batch)
    images = []
    for start in range(0, len(task.prompts), at_once):
        chosen = list(range(start, min(start + at_once, len(task.prompts))))
        images.append(_call(pipeline, task, chosen, embedded))
    drawn = np.concatenate(images)
    if np.isnan(drawn).any():
        raise FloatingPointError("the model gives NaN")
    rounded = (drawn * 255).round().astype(np.uint8)
    return np.ascontiguousarray(rounded.transpose(0, 3, 1, 2))


def _expected(pipeline: "DiffusionPipeline", task: Task, device: torch.device) -> float:
    """Seconds per image, extrapolated from images of few steps by the time of a step.

    The faster of two calls counts, so that a busy machine does not make a row look slow.
    """
    draw = functools.partial(_call, pipeline, task, [0])
    seconds = [min(timed(functools.partial(draw, steps=steps), 2, device, warm_up=0)) for steps in REHEARSAL]
    step = max(seconds[1] - seconds[0], 0.0) / (REHEARSAL[1] - REHEARSAL[0])
    return seconds[0] + (task.choices.steps - REHEARSAL[0]) * step


def _load(task: Task) -> "DiffusionPipeline":
    return load_model(task.model, getattr(torch, PRECISIONS[task.choices.dtype]))


def _size(pipeline: "DiffusionPipeline", task: Task) -> tuple[int, int]:
    """Height and width of the images in pixels."""
    height, width = own_size(pipeline)
    return task.height or height, task.width or width


def _cost(task: Task, seconds: list[float], baseline: int) -> dict[str, Any]:
    """Latency of a call, throughput and memory.

    Returns:
        ``latency_s`` in seconds (median; ``latency_low_s`` and ``latency_high_s`` are 5th and 95th percentile) of
        ``latency_repeats`` calls, ``throughput`` in images a second, and ``peak_memory_bytes`` of loading and
        sampling above that of Python and the libraries, with ``memory_method``.
    """
    peak, method = peak_since(baseline, torch.device(task.device))
    latency = spread("latency", seconds)
    assert latency["latency_s"] is not None
    throughput = task.choices.batch_size / latency["latency_s"]
    return {
        **latency, "latency_repeats": len(seconds), "throughput": throughput, "peak_memory_bytes": peak,
        "memory_method": method,
    }  # fmt: skip


@torch.no_grad()
def _embed(pipeline: "DiffusionPipeline", task: Task) -> list[Embedding]:
    """Embeddings of each prompt, and of the empty prompt for guidance."""
    names, where = embedding_names(type(pipeline)), {"device": torch.device(task.device), "num_images_per_prompt": 1}
    found = []
    for prompt in task.prompts:
        given = pipeline.encode_prompt(prompt=prompt, **where, do_classifier_free_guidance=task.guidance > 1)
        found.append({name: part for name, part in zip(names, given, strict=True) if part is not None})
    return found


@torch.no_grad()
def _call(
    pipeline: "DiffusionPipeline",
    task: Task,
    chosen: list[int],
    embedded: list[Embedding] | None = None,
    steps: int | None = None,
) -> np.ndarray:
    """Samples images of some prompts: floats in [0, 1], ``(n, height, width, 3)``.

    Args:
        pipeline: With the row's choices applied.
        task: The row's task.
        chosen: Indices of the prompts.
        embedded: Embeddings of all prompts if they are reused.
        steps: Denoising steps; None for the row's.
    """
    size = {name: side for name, side in (("height", task.height), ("width", task.width)) if side is not None}
    if embedded is None:
        text: dict[str, Any] = {"prompt": [task.prompts[index] for index in chosen]}
    else:
        text = {name: torch.cat([embedded[index][name] for index in chosen]) for name in embedded[0]}
    return pipeline(
        **text,
        **size,
        **accepted(pipeline, AS_ASKED),
        generator=[torch.Generator("cpu").manual_seed(task.seeds[index]) for index in chosen],
        num_inference_steps=steps or task.choices.steps,
        guidance_scale=task.guidance,
        output_type="np",
    ).images
