"""Measures the cost of a pipeline and the quality of its images."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.evaluate.config import SAMPLED_FAST_FROM, EvaluateConfig, check
from compress.system.callable import make_callable

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from compress.data import Data
    from compress.evaluate.images import Images
    from compress.evaluate.networks import Networks
    from compress.evaluate.reference import Reference

__all__ = ["EvaluateConfig", "Evaluation", "check", "evaluate"]

VERSION = 7  # raised when the numbers change their meaning
IMAGES_VERSION = 1  # raised when other images are sampled

# Offset of the noise floor's seeds. Generators on the CPU use 32 bits of a seed.
OTHER_SEEDS = 2**31
FEATURES = "features.safetensors"

logger = logging.getLogger(__name__)
make_callable(__name__)  # compress.evaluate(pipeline, ...)

Metrics = dict[str, dict[str, Any] | None]


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        cost: See :func:`compress.evaluate.cost.measure_cost`; empty if not requested, and in all processes but the
            first.
        metrics: See :func:`compress.evaluate.quality.score_images`, and ``latent_psnr``: each with ``value``, ``low``,
            ``high`` (95 % interval), ``n``, the network and its hash, and the sampling settings. None for a metric that
            does not apply, such as the teacher's PSNR to itself. Empty if no images were sampled.
        manifest: Everything that the images and scores depend on, see :func:`compress.evaluate.manifest.manifest`.
        grid: ``{"prompt", "seed", "image"}``; the image is a path inside the evaluation's folder.
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
    graphs: Path | None = None,
    variant: str | None = None,
) -> Evaluation:
    """Measures a pipeline, with the scheduler, steps and guidance that it was trained for, if it was.

    With ``accelerate launch`` every process calls it and samples its share; every process gets the metrics of all
    images. Batches already in ``folder``, from an interrupted call, are not sampled again.

    Args:
        pipeline: On ``device``; not changed.
        data: Captions to sample and real images to compare with.
        config: What to measure.
        folder: Where the images go, the same for all processes: ``images/sample-*.png`` for the metrics and
            ``images/grid-*.png``. The teacher's folder also holds its features, for its students.
        device: Where the run computes.
        dtype: The run's precision.
        seed: Seed of the choice of prompts; image i has the seed ``seed + i``.
        cost_of: The pipeline's checkpoint, to measure its cost; None for no cost.
        teacher: ``folder`` of the teacher's evaluation at the same config and seed; None for the teacher itself.
        other_seeds: Whether to use other noise and no grid. With the teacher as pipeline this gives the noise floor.
        networks: The metrics' networks, if several evaluations share them.
        cache: Folder for computed features of real images.
        graphs: Folder for what engines compile.
        variant: Variant of the weight files in ``cost_of``, such as ``fp16``.

    Raises:
        FloatingPointError: The model gives NaN.
        UserError: A file is missing or does not match, or the pipeline draws no images from prompts alone.
    """
    from compress.evaluate.sample import own_settings
    from compress.models.call import check_draws
    from compress.models.sampling import sampling_of
    from compress.system import processes

    check_draws(type(pipeline), config.images)
    config = own_settings(config, sampling_of(pipeline))
    running = pipeline
    if config.engine != "eager":
        from compress.runtime import Engines, accelerate

        running = accelerate(pipeline, Engines(config.engine, config.engine), graphs)
    cost: dict[str, Any] = {}
    with processes.together():
        if cost_of is not None and processes.is_main():
            from compress.evaluate.cost import measure_cost

            cost = measure_cost(pipeline, cost_of, config, device, dtype, variant, running=running)
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
    fast = _fast(pipeline, config, dtype, graphs)
    with processes.together():
        mine = _sample(running, fast, prompts, seeds, config, folder / "images", wanted)
    size = _size(folder)
    shown = settings(pipeline, config, size, dtype, seeds[0])
    reference = _reference(data, config, size, networks, cache)
    images = _images(folder, mine)
    metrics = _score(folder, images, mine, prompts, config, networks, reference, teacher)
    metrics["latent_psnr"] = _latents(folder, mine, config, teacher) if config.wants("latent_psnr") else None
    blank = sum(processes.gather(_blank(images, config)))
    if blank:
        logger.warning("%d of %d images have a single color", blank, config.images)
    for found in metrics.values():
        if found is not None:
            found |= {**shown, "interval": 0.95, "blank": blank}
    grid = [
        {"prompt": prompts[index], "seed": seeds[index], "image": f"images/grid-{index:06d}.png"}
        for index in range(wanted)
    ]
    about = manifest(pipeline, config, shown, prompts[: config.images], metrics, reference)
    if fast is not None:
        about["sampled_in"] = "openvino, float32"
    return Evaluation(cost, metrics, about, grid)


def _fast(
    pipeline: "DiffusionPipeline", config: EvaluateConfig, dtype: "torch.dtype", graphs: Path | None
) -> "DiffusionPipeline | None":
    """The pipeline in the engine that computes what eager mode does, but faster; None if there is none here."""
    from compress.runtime import Engines, accelerate, resolve

    if (config.engine, config.sampling_engine) != ("eager", "auto") or config.images < SAMPLED_FAST_FROM:
        return None
    if str(dtype) != "torch.float32" or resolve("auto", pipeline.device) != "openvino":
        return None
    return accelerate(pipeline, Engines("openvino", "openvino", precision="fp32", int8_inputs=False), graphs)


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
    fast: "DiffusionPipeline | None",
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: EvaluateConfig,
    folder: Path,
    grid: int,
) -> range:
    """Samples this process's share of the images and of the grid; returns the images' numbers.

    The grid's images are those of the pipeline itself.
    """
    from compress.evaluate.sample import alone, sample
    from compress.system import processes

    mine = processes.share(config.images, config.batch_size)
    if mine:
        chosen = slice(mine.start, mine.stop)
        keep = {"folder": folder, "first": mine.start, "latents": config.wants("latent_psnr")}
        try:
            sample(fast or pipeline, prompts[chosen], seeds[chosen], config, **keep)
        except UserError as error:
            if fast is None:
                raise
            logger.warning("%s: images are sampled in eager mode", error)
            sample(pipeline, prompts[chosen], seeds[chosen], config, **keep)
    cells = processes.share(grid, 1)
    if cells:
        chosen = slice(cells.start, cells.stop)
        sample(pipeline, prompts[chosen], seeds[chosen], alone(config), folder, cells.start, "grid")
    return mine


def _size(folder: Path) -> tuple[int, int]:
    """Height and width of the sampled images, the same in every process."""
    from PIL import Image

    with Image.open(folder / "images" / "sample-000000.png") as image:
        return image.height, image.width


def _reference(
    data: "Data", config: EvaluateConfig, size: tuple[int, int], networks: "Networks", cache: Path | None
) -> "Reference":
    from compress.evaluate.reference import data_reference, folder_reference

    if config.reference is None:
        return data_reference(data, config, size, networks, cache)
    # If sampled images are reduced, real images are too, as in the published protocol.
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
    """The metrics of all processes' images. A teacher's features are stored beside its images."""
    import torch
    from safetensors.torch import load_file

    from compress.evaluate.quality import score_images
    from compress.system import processes
    from compress.system.files import write_tensors

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
            # A process without images does not know the width.
            whole = {name: torch.cat([share[name] for share in shares if len(share[name])]) for name in keep}
            write_tensors(folder / FEATURES, whole)
    return metrics


def _images(folder: Path, chosen: range) -> "Images":
    import torch

    from compress.evaluate.images import ImageFiles
    from compress.evaluate.sample import image_paths

    if not chosen:  # more processes than batches
        return torch.empty(0, 3, *_size(folder), dtype=torch.uint8)
    return ImageFiles(image_paths(folder / "images", chosen))


def _latents(folder: Path, mine: range, config: EvaluateConfig, teacher: Path | None) -> dict[str, Any] | None:
    """Distance of the latents after the first denoising step to the teacher's."""
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
    """The number of this process's images with a single color."""
    from compress.evaluate.sample import blank

    starts = range(0, len(images), config.score_batch_size)
    return sum(blank(images[start : start + config.score_batch_size]) for start in starts)
