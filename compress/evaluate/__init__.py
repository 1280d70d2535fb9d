"""Measures a pipeline: what it costs and what its pictures are worth."""

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.evaluate.config import SCHEDULERS, EvaluateConfig, check

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from compress.data import Data

__all__ = ["SCHEDULERS", "EvaluateConfig", "Evaluation", "check", "evaluate", "evaluation_prompts"]

VERSION = 1  # raised when the numbers change their meaning

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        cost: See :func:`compress.evaluate.cost.measure_cost`.
        metrics: ``fid``, ``kid``, ``clip_score``, ``psnr`` and ``ssim``, each with ``value``, ``low``, ``high``
            (95 % interval), ``n``, the network and its hash, and every setting; PSNR and SSIM are None for the
            teacher. Empty if no pictures were sampled.
        images: uint8 RGB, ``(n, 3, height, width)``; the pictures behind the metrics.
        grid: ``{"prompt", "seed", "image"}``, the image in PIL's form; see
            :func:`compress.evaluate.sample.sample_grid`.
    """

    cost: dict[str, Any]
    metrics: dict[str, dict[str, Any] | None]
    images: "torch.Tensor"
    grid: list[dict[str, Any]]


def evaluation_prompts(data: "Data", n: int, seed: int) -> list[str]:
    """A random choice of training captions, without repetition until all have been used once.

    The choice of a smaller n is the beginning of that of a larger one.
    """
    order = list(range(len(data.text)))
    random.Random(seed).shuffle(order)
    return [data.text[order[index % len(order)]] for index in range(n)]


def evaluate(
    pipeline: "DiffusionPipeline",
    teacher_images: "torch.Tensor | None",
    data: "Data",
    config: EvaluateConfig,
    cost_of: Path,
    device: "torch.device",
    dtype: "torch.dtype",
    seed: int,
    cache: Path | None = None,
    variant: str | None = None,
) -> Evaluation:
    """Measures a pipeline.

    Args:
        pipeline: On ``device``; left as it was.
        teacher_images: The teacher's ``Evaluation.images`` at the same config and seed; None for the teacher itself.
        data: Captions to sample from and real pictures to compare with.
        config: What to measure.
        cost_of: The pipeline's checkpoint, for bytes and memory.
        device: Where the run computes.
        dtype: The run's precision.
        seed: Seed of the choice of prompts; picture i has the seed ``seed + i``.
        cache: Folder for the features of real pictures where they have to be computed.
        variant: Of the weight files in ``cost_of``, such as ``fp16``.

    Raises:
        FloatingPointError: The model gives NaN.
        UserError: A file is missing or does not fit.
        ValueError: ``teacher_images`` are not of the same number and size.
    """
    import torch

    from compress.evaluate.cost import measure_cost
    from compress.evaluate.sample import sample, sample_grid

    cost = measure_cost(pipeline, cost_of, config, device, dtype, variant)
    if config.images == 0:
        return Evaluation(cost, {}, torch.empty(0, 3, 0, 0, dtype=torch.uint8), [])
    prompts = evaluation_prompts(data, max(config.images, config.grid), seed)
    seeds = [seed + index for index in range(len(prompts))]
    images = sample(pipeline, prompts[: config.images], seeds[: config.images], config)
    if teacher_images is not None and teacher_images.shape != images.shape:
        raise ValueError(f"the teacher's pictures are {tuple(teacher_images.shape)}, these {tuple(images.shape)}")
    grid = sample_grid(pipeline, prompts[: config.grid], seeds[: config.grid], config) if config.grid else []
    settings = {
        "n": config.images,
        "resolution": f"{images.shape[3]}x{images.shape[2]}",
        "scheduler": type(pipeline.scheduler).__name__ if config.scheduler == "checkpoint" else config.scheduler,
        "steps": config.steps,
        "guidance": config.guidance,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": config.batch_size,
        "seed": seed,
    }
    metrics = _metrics(images, teacher_images, prompts[: config.images], data, config, device, settings, cache)
    return Evaluation(cost, metrics, images, grid)


def _metrics(
    images: "torch.Tensor",
    teacher_images: "torch.Tensor | None",
    prompts: list[str],
    data: "Data",
    config: EvaluateConfig,
    device: "torch.device",
    settings: dict[str, Any],
    cache: Path | None,
) -> dict[str, dict[str, Any] | None]:
    from compress.evaluate import clip, inception, scores
    from compress.evaluate.sample import blank

    settings = {**settings, "interval": 0.95, "blank": blank(images)}
    if settings["blank"]:
        logger.warning("%d of %d pictures are of one color all over", settings["blank"], len(images))

    network = inception.Inception(config.inception, device)
    fake = inception.features(images, network, config.batch_size)
    size = (images.shape[2], images.shape[3])
    real, reference = inception.reference_features(data, config, size, cache, network)
    seen = {**settings, "network": inception.NAME, "network_sha256": inception.INCEPTION_SHA256, **reference}
    metrics: dict[str, dict[str, Any] | None] = {
        "fid": {**scores.frechet(real, fake), **seen},
        "kid": {**scores.kernel_distance(real, fake), **seen},
    }

    judge = clip.load_clip(config.clip, device)
    values = clip.clip_scores(images, prompts, judge, config.batch_size)
    named = {"network": config.clip_name, "network_sha256": judge.sha256}
    metrics["clip_score"] = {**scores.mean_score(values, config.bootstrap), **settings, **named}

    metrics["psnr"] = metrics["ssim"] = None
    if teacher_images is not None:
        psnr, equal = scores.psnr_values(images, teacher_images)
        same = {"network": None, "network_sha256": None, "equal": equal}
        metrics["psnr"] = {**scores.mean_score(psnr, config.bootstrap), **settings, **same, "cap": scores.PSNR_CAP}
        ssim = scores.ssim_values(images, teacher_images, config.batch_size)
        metrics["ssim"] = {**scores.mean_score(ssim, config.bootstrap), **settings, **same}
    return metrics
