"""Measures a pipeline: what it costs and what its images are worth."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.evaluate.config import EvaluateConfig, check

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from compress.data import Data
    from compress.evaluate.images import Images
    from compress.evaluate.networks import Networks
    from compress.evaluate.reference import Reference

__all__ = ["EvaluateConfig", "Evaluation", "check", "evaluate"]

VERSION = 6  # raised when the numbers change their meaning
IMAGES_VERSION = 1  # raised when other images are sampled

# What the noise floor's seeds are further on than the teacher's. Generators on the CPU look at 32 bits of a seed.
OTHER_SEEDS = 2**31
FEATURES = "features.safetensors"

logger = logging.getLogger(__name__)

Metrics = dict[str, dict[str, Any] | None]


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        cost: See :func:`compress.evaluate.cost.measure_cost`; empty where it was not asked for, and in processes other
            than the first.
        metrics: See :func:`compress.evaluate.quality.score_images`, and ``latent_psnr``: each with ``value``,
            ``low``, ``high`` (95 % interval), ``n``, the network and its hash, and how the images were made. None
            where a metric cannot be had, as the teacher's PSNR to itself. Empty if no images were sampled.
        manifest: All that decides the images and their scores; see :func:`compress.evaluate.manifest.manifest`.
        grid: ``{"prompt", "seed", "image"}``, the image as the path of its file inside the evaluation's folder.
    """

    cost: dict[str, Any]
    metrics: Metrics
    manifest: dict[str, Any]
    grid: list[dict[str, Any]]


def evaluate(
    pipeline: "DiffusionPipeline",
    data: "Data",
    config: EvaluateConfig,
    folder: Path,
    *,
    device: "torch.device",
    dtype: "torch.dtype",
    seed: int,
    cost_of: Path | None = None,
    teacher: Path | None = None,
    other_seeds: bool = False,
    networks: "Networks | None" = None,
    cache: Path | None = None,
    variant: str | None = None,
) -> Evaluation:
    """Measures a pipeline.

    Under ``accelerate launch`` every process calls it and makes its share of the images; the metrics are those of all
    images, in every process. Batches of images that are in ``folder`` already, from a call that was interrupted,
    are not sampled again.

    Args:
        pipeline: On ``device``; left as it was.
        data: Captions to sample from and real images to compare with.
        config: What to measure.
        folder: Where the images go, the same for all processes: ``images/sample-*.png`` behind the metrics and
            ``images/grid-*.png``. A teacher's holds what its students are compared with besides.
        device: Where the run computes.
        dtype: The run's precision.
        seed: Seed of the choice of prompts; image i has the seed ``seed + i``.
        cost_of: The pipeline's checkpoint, to measure its cost; None leaves that out.
        teacher: ``folder`` of the teacher's evaluation at the same config and seed; None for the teacher itself.
        other_seeds: Samples from other noise, and no grid: with the teacher itself as pipeline, what the metrics make
            of nothing but chance.
        networks: Those of the metrics, where several evaluations share them.
        cache: Folder for the features of real images where they have to be computed.
        variant: Of the weight files in ``cost_of``, such as ``fp16``.

    Raises:
        FloatingPointError: The model gives NaN.
        UserError: A file is missing or does not fit.
    """
    from compress.system import processes

    cost: dict[str, Any] = {}
    with processes.together():
        if cost_of is not None and processes.is_main():
            from compress.evaluate.cost import measure_cost

            cost = measure_cost(pipeline, cost_of, config, device, dtype, variant)
    if config.images == 0:
        return Evaluation(cost, {}, {}, [])

    from compress.evaluate.manifest import manifest, settings
    from compress.evaluate.networks import Networks
    from compress.evaluate.prompts import evaluation_prompts

    if processes.is_main():
        _tell_scheduler(pipeline, config)
    networks = networks or Networks(config, device)
    with processes.together():
        networks.load(sets=True, captions=True, pairs=True)
    wanted = 0 if other_seeds else config.grid
    prompts = evaluation_prompts(data, config, max(config.images, wanted), seed)
    seeds = [(seed + index + OTHER_SEEDS * other_seeds) % 2**32 for index in range(len(prompts))]
    with processes.together():
        mine = _sample(pipeline, prompts, seeds, config, folder / "images", wanted)
    size = _size(folder)
    shown = settings(pipeline, config, size, dtype, seeds[0])
    reference = _reference(data, config, size, networks, cache)
    images = _images(folder, mine)
    metrics = _score(folder, images, mine, prompts, config, networks, reference, teacher)
    metrics["latent_psnr"] = _latents(folder, mine, config, teacher) if config.wants("latent_psnr") else None
    blank = sum(processes.gather(_blank(images, config)))
    if blank:
        logger.warning("%d of %d images are of one color all over", blank, config.images)
    for found in metrics.values():
        if found is not None:
            found |= {**shown, "interval": 0.95, "blank": blank}
    grid = [
        {"prompt": prompts[index], "seed": seeds[index], "image": f"images/grid-{index:06d}.png"}
        for index in range(wanted)
    ]
    return Evaluation(
        cost, metrics, manifest(pipeline, config, shown, prompts[: config.images], metrics, reference), grid
    )


def _tell_scheduler(pipeline: "DiffusionPipeline", config: EvaluateConfig) -> None:
    """Says, once for each kind of scheduler, that the one of the config does not fit the model."""
    from compress.evaluate.sample import scheduler_used

    own = type(pipeline.scheduler).__name__
    if config.scheduler != "checkpoint" and scheduler_used(pipeline, config) == own:
        _warn_once(f"evaluate.scheduler={config.scheduler} does not fit the model: its own {own} samples the images")


@lru_cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _sample(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: EvaluateConfig,
    folder: Path,
    grid: int,
) -> range:
    """Samples this process's share of the images and of the grid; returns the images' numbers."""
    from compress.evaluate.sample import alone, sample
    from compress.system import processes

    mine = processes.share(config.images, config.batch_size)
    if mine:
        chosen = slice(mine.start, mine.stop)
        kept = config.wants("latent_psnr")
        sample(pipeline, prompts[chosen], seeds[chosen], config, folder, mine.start, latents=kept)
    cells = processes.share(grid, 1)
    if cells:
        chosen = slice(cells.start, cells.stop)
        sample(pipeline, prompts[chosen], seeds[chosen], alone(config), folder, cells.start, "grid")
    return mine


def _size(folder: Path) -> tuple[int, int]:
    """Height and width of the sampled images, which every process has to know."""
    from PIL import Image

    with Image.open(folder / "images" / "sample-000000.png") as image:
        return image.height, image.width


def _reference(
    data: "Data", config: EvaluateConfig, size: tuple[int, int], networks: "Networks", cache: Path | None
) -> "Reference":
    from compress.evaluate.reference import data_reference, folder_reference

    if config.reference is None:
        return data_reference(data, config, size, networks, cache)
    # Where sampled images are reduced the real ones are too, as published.
    return folder_reference(config.reference, config, networks, cache, squeeze=size if config.resize else None)


def _score(
    folder: Path,
    images: "Images",
    mine: range,
    prompts: Sequence[str],
    config: EvaluateConfig,
    networks: "Networks",
    reference: "Reference",
    teacher: Path | None,
) -> Metrics:
    """The metrics of all processes' images; a teacher's features are kept beside its images."""
    import torch
    from safetensors.torch import load_file, save_file

    from compress.evaluate.quality import score_images
    from compress.system import processes
    from compress.system.files import replace_with

    keep: dict[str, torch.Tensor] = {}
    known = None
    if teacher is not None:
        known = {name: rows[mine.start : mine.stop] for name, rows in load_file(teacher / FEATURES).items()}
    metrics = score_images(
        images,
        config,
        networks,
        reference=reference,
        teacher=None if teacher is None else _images(teacher, mine),
        teacher_features=known,
        captions=[prompts[index] for index in mine],
        keep=keep,
    )
    if teacher is None:
        shares = processes.gather(keep)
        if processes.is_main():
            with replace_with(folder / FEATURES) as beside:
                # Of a process without images not even the width is known.
                whole = {name: torch.cat([share[name] for share in shares if len(share[name])]) for name in keep}
                save_file(whole, beside)
    return metrics


def _images(folder: Path, chosen: range) -> "Images":
    import torch

    from compress.evaluate.images import ImageFiles
    from compress.evaluate.sample import image_paths

    if not chosen:  # more processes than batches
        return torch.empty(0, 3, *_size(folder), dtype=torch.uint8)
    return ImageFiles(image_paths(folder / "images", chosen))


def _latents(folder: Path, mine: range, config: EvaluateConfig, teacher: Path | None) -> dict[str, Any] | None:
    """How far the latents after the first denoising step are from the teacher's."""
    if teacher is None:
        return None
    from compress.evaluate.latents import KEPT, read_latents
    from compress.evaluate.metrics import LatentPSNR

    metric = LatentPSNR(resamples=config.bootstrap)
    for start in mine[:: config.batch_size]:
        if start < KEPT:
            metric.update(read_latents(folder / "images", start), read_latents(teacher / "images", start))
    return {**metric.compute(), "network": None, "network_sha256": None, "denoising_steps": 1}


def _blank(images: "Images", config: EvaluateConfig) -> int:
    """How many of this process's images are of one color all over."""
    from compress.evaluate.sample import blank

    starts = range(0, len(images), config.score_batch_size)
    return sum(blank(images[start : start + config.score_batch_size]) for start in starts)
