"""Samples images with one seed per prompt; finished batches are stored, so an interrupted run continues."""

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from compress.evaluate.config import EvaluateConfig
from compress.evaluate.images import ImageFiles, reduced_size
from compress.evaluate.latents import KEPT, FirstStep, write_latents
from compress.models.inputs import AS_ASKED
from compress.models.sampling import Sampling
from compress.models.schedulers import exchanged, used
from compress.system.files import replace_with
from compress.system.progress import track

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


def own_settings(config: EvaluateConfig, own: Sampling) -> EvaluateConfig:
    """The settings with the scheduler, steps and guidance that a checkpoint was trained for, where it was.

    The latents after its first step are then those of another timestep than its teacher's, so they are not compared.
    """
    if own.steps is not None:
        left_out = tuple(dict.fromkeys([*config.leave_out, "latent_psnr"]))
        config = replace(config, steps=config.few_steps or own.steps, leave_out=left_out)
    if own.scheduler is not None:
        config = replace(config, scheduler="checkpoint")
    return replace(config, guidance=own.argument(config.guidance))


def sampler(pipeline: "DiffusionPipeline", config: EvaluateConfig) -> "DiffusionPipeline":
    """A pipeline with the same models, the configured scheduler and no progress bar of its own.

    The models are shared; ``pipeline`` itself keeps its scheduler. A scheduler of another family than the pipeline's,
    as for a flow-matching model, is replaced by the pipeline's own; :func:`scheduler_used` says which one it is.
    """
    # A shallow copy: setting a component on it leaves the original's components and config alone.
    twin = copy.copy(pipeline)
    twin.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    other = None if config.scheduler == "checkpoint" else exchanged(own, config.scheduler)
    twin.scheduler = copy.deepcopy(own) if other is None else other
    return twin


def scheduler_used(pipeline: "DiffusionPipeline", config: EvaluateConfig) -> str:
    """The scheduler that images are sampled with: ``config.scheduler``, or the class of the pipeline's own."""
    name = used(pipeline.scheduler, config.scheduler)
    return type(pipeline.scheduler).__name__ if name == "checkpoint" else name


@overload
def sample(
    pipeline: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], config: EvaluateConfig
) -> torch.Tensor: ...


@overload
def sample(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: EvaluateConfig,
    folder: Path,
    first: int = 0,
    name: str = "sample",
    latents: bool = False,
) -> ImageFiles: ...


def sample(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: EvaluateConfig,
    folder: Path | None = None,
    first: int = 0,
    name: str = "sample",
    latents: bool = False,
) -> torch.Tensor | ImageFiles:
    """Samples one image per prompt.

    Image ``i`` starts from the noise of ``torch.Generator("cpu").manual_seed(seeds[i])`` for any batch size, device and
    number of processes. Images are bit-identical at the same batch size; another one changes the rounding of sums.

    Args:
        pipeline: On its device, in its precision; not changed.
        prompts: n captions, at least one.
        seeds: n seeds.
        config: Steps, guidance, scheduler, size and batch size.
        folder: Where every finished batch is written, ``sample-000000.png`` and so on; batches found there are not
            sampled again. None keeps all images in memory.
        first: Index of the first image if a process samples only a part; a multiple of the batch size, so that batches
            do not depend on the number of processes.
        name: Prefix of the file names.
        latents: Whether to store the latents after the first denoising step too, for the first :data:`KEPT` images.

    Returns:
        The images, uint8 RGB, rounded as the pipeline's ``output_type="pil"`` rounds: a tensor
        ``(n, 3, height, width)`` on the CPU, or files of ``folder``.

    Raises:
        FloatingPointError: The model gives NaN.
    """
    twin = sampler(pipeline, config)
    starts = range(0, len(prompts), config.batch_size)

    def batch(start: int) -> torch.Tensor:
        chosen = slice(start, start + config.batch_size)
        return _batch(twin, prompts[chosen], seeds[chosen], config, first + start)

    if folder is None:
        return torch.cat([batch(start) for start in track(starts, f"sampling {len(prompts)} images")])
    folder.mkdir(parents=True, exist_ok=True)
    files = image_paths(folder, range(first, first + len(prompts)), name)
    missing = [start for start in starts if not all(file.exists() for file in files[start : start + config.batch_size])]
    if not missing:
        return ImageFiles(files)
    recorder = FirstStep(twin.scheduler) if latents else None
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:  # writes a batch while the next is sampled
        for start in track(missing, f"sampling {len(prompts)} images"):
            targets = files[start : start + config.batch_size]
            images = batch(start)
            keep = recorder.take() if recorder is not None and first + start < KEPT else None
            if writing is not None:
                writing.result()  # raises if the disk is full; at most two batches are in memory
            writing = writer.submit(_write, targets, images, folder, first + start, keep)
        if writing is not None:
            writing.result()
    return ImageFiles(files)


def image_paths(folder: Path, indices: Iterable[int], name: str = "sample") -> list[Path]:
    """The files of the images with these indices."""
    return [folder / f"{name}-{index:06d}.png" for index in indices]


def _write(files: Sequence[Path], images: torch.Tensor, folder: Path, start: int, latents: torch.Tensor | None) -> None:
    """Writes a batch; its images come last because they mark it as finished."""
    if latents is not None:
        write_latents(folder, start, latents)
    for file, image in zip(files, images, strict=True):
        with replace_with(file) as beside:
            to_pil(image).save(beside, compress_level=1)  # a fifth larger than the best, and four times as fast


def call(
    pipeline: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], config: EvaluateConfig
) -> np.ndarray:
    """One call of a pipeline made by :func:`sampler`.

    Returns:
        float32 in [0, 1], ``(b, height, width, 3)``.
    """
    return pipeline(
        prompt=list(prompts),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        output_type="np",
        **size(config),
        **accepted(pipeline, AS_ASKED),
    ).images


def accepted(pipeline: "DiffusionPipeline", wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that a pipeline takes: one without text takes no prompt and no guidance."""
    known = inspect.signature(pipeline.__call__).parameters  # type: ignore[operator]
    return {name: value for name, value in wanted.items() if name in known}


def size(config: EvaluateConfig) -> dict[str, int]:
    """Arguments of the pipeline for the size of the images; none where it is the model's own."""
    wanted = {"height": config.height, "width": config.width}
    return {name: value for name, value in wanted.items() if value is not None}


def _batch(
    twin: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], config: EvaluateConfig, first: int
) -> torch.Tensor:
    """uint8 ``(b, 3, height, width)``; ``first`` is the index of the first image, for the message."""
    images = call(twin, prompts, seeds, config)
    broken = np.isnan(images).any(axis=(1, 2, 3))
    if broken.any():
        index = int(broken.argmax())
        raise FloatingPointError(
            f"the model gives NaN: image {first + index} (prompt {prompts[index]!r}, seed {seeds[index]}) and "
            f"{int(broken.sum()) - 1} more of its batch; a precision with a wider range (bf16, fp32) may help"
        )
    whole = torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
    return whole if config.resize is None else _reduced(whole, config.resize)


def _reduced(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images resized to a shorter side of ``side`` pixels with Pillow's antialiased bicubic filter."""
    from PIL import Image

    height, width = reduced_size(images.shape[2], images.shape[3], side)
    resized = [np.asarray(to_pil(image).resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def alone(config: EvaluateConfig) -> EvaluateConfig:
    """Settings that give the same bits as a user's own call of the pipeline with one prompt."""
    return replace(config, batch_size=1, resize=None)


def to_pil(image: torch.Tensor) -> "Image":
    """A uint8 tensor ``(3, height, width)`` as a PIL image."""
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).numpy())


def blank(images: Iterable[torch.Tensor]) -> int:
    """The number of uint8 images ``(3, height, width)`` with a single color, which a broken model may give."""
    return sum(bool((image == image[:, :1, :1]).all()) for image in images)
