"""Everything that an evaluation's numbers depend on, for the report."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from compress.evaluate.reference import Reference

PATHS = ("prompts", "reference", "clip", "clip_name", "inception", "encoders")


def settings(
    pipeline: "DiffusionPipeline", config: EvaluateConfig, size: tuple[int, int], dtype: "torch.dtype", seed: int
) -> dict[str, Any]:
    """The sampling settings that are stored with every metric; ``seed`` is that of the first image."""
    from compress.evaluate.sample import scheduler_used
    from compress.models.sampling import sampling_of

    own = sampling_of(pipeline)
    return {
        "resolution": f"{size[1]}x{size[0]}",
        "scheduler": scheduler_used(pipeline, config),
        "steps": config.steps,
        "guidance": own.scale(config.guidance),
        **({"passes": 1} if own.guidance is not None else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": config.batch_size,
        "seed": seed,
    }


def manifest(
    pipeline: "DiffusionPipeline",
    config: EvaluateConfig,
    shown: dict[str, Any],
    prompts: Sequence[str],
    metrics: dict[str, dict[str, Any] | None],
    reference: "Reference",
) -> dict[str, Any]:
    """Everything that the images and their scores depend on.

    Args:
        pipeline: The measured pipeline.
        config: The settings.
        shown: Result of :func:`settings`.
        prompts: One per image.
        metrics: The computed metrics, which name their networks.
        reference: The real images' features.

    Returns:
        ``protocol``, ``version`` and ``changed`` (the protocol's keys that this run has changed); the settings with the
        ``sampled`` size before any resize, the first and last seed, the scheduler's config, and ``scheduler_asked``
        if the configured one does not fit the model; hashes of the prompts, the networks and the reference's features.
    """
    from compress.evaluate.sample import sampler

    scheduler = sampler(pipeline, config).scheduler
    networks = {
        found["network"]: found["network_sha256"]
        for found in metrics.values()
        if found is not None and found.get("network")
    }
    return {
        "protocol": config.protocol,
        "version": config.version,
        "changed": [key for key in changed(config) if key != "noise_floor"],  # it changes no row
        **{key: value for key, value in shown.items() if key != "seed"},
        **({"scheduler_asked": config.scheduler} if config.scheduler not in ("checkpoint", shown["scheduler"]) else {}),
        **({"engine": config.engine} if config.engine != "eager" else {}),
        "images": config.images,
        "sampled": [config.height, config.width] if config.height or config.width else "the model's own size",
        "resize": config.resize,
        "seeds": {"first": shown["seed"], "last": (shown["seed"] + config.images - 1) % 2**32},
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "scheduler_class": type(scheduler).__name__,
        "scheduler_config": {key: _plain(value) for key, value in scheduler.config.items() if not key.startswith("_")},
        "fid_resize": config.fid_resize,
        "networks": networks,
        "reference": {
            "name": reference.name,
            "n": max((len(rows) for rows in reference.features.values()), default=0),
            "sha256": reference.sha256,
        },
    }


def _plain(value: Any) -> Any:
    """A scheduler's setting for JSON; infinity becomes text."""
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and isinstance(value, bool | int | float | str | list | dict | None) else str(value)


def changed(config: EvaluateConfig) -> list[str]:
    """The keys that differ from the protocol's file, without the user's paths."""
    from omegaconf import OmegaConf

    from compress.config.folders import conf_folders

    files = {file.stem: file for folder in conf_folders() for file in (folder / "evaluate").glob("*.yaml")}
    expected: dict[Any, Any] = {}
    names = [config.protocol]
    while names and names[-1] in files:
        values = OmegaConf.to_container(OmegaConf.load(files[names[-1]]))
        assert isinstance(values, dict)
        below = [name for name in values.pop("defaults", []) if name != "_self_"]
        expected = values | expected
        names = below
    return [
        key
        for key, value in expected.items()
        if key not in PATHS and (tuple(value) if isinstance(value, list) else value) != getattr(config, key)
    ]
