"""The runtime choices of a row, the grid of rows, and the limits of the best row."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from compress.config.values import PRECISIONS, build, nearest
from compress.errors import UserError, bad_value
from compress.models.schedulers import SCHEDULERS
from compress.runtime import ENGINES

OFFLOADS = ("none", "model", "sequential")


@dataclass(frozen=True)
class Choices:
    """How a pipeline is run. Only the number format changes weights.

    Attributes:
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        scheduler: One of :data:`compress.models.schedulers.SCHEDULERS`.
        steps: Denoising steps, 1 to 1000.
        batch_size: Images per call.
        channels_last: Whether convolutions use the channels-last memory format.
        attention: ``sdpa`` (torch's fused one), ``plain`` (two products and a softmax), ``xformers``, or a name that
            diffusers' ``set_attention_backend`` knows.
        attention_slicing: Whether attention is computed for a part of the heads at a time.
        vae_slicing: Whether images are decoded one by one.
        vae_tiling: Whether an image is decoded in tiles.
        offload: ``none``, or what stays on the CPU until it is needed: each ``model``, or each layer (``sequential``).
        compile: Whether the denoiser is compiled by torch.compile as it is.
        engine: What runs the denoiser and the decoder: ``eager``, or an engine of :mod:`compress.runtime`.
        reuse_prompt: Whether prompts are embedded once, not in each call.
    """

    dtype: str = "fp32"
    scheduler: str = "pndm"
    steps: int = 50
    batch_size: int = 1
    channels_last: bool = False
    attention: str = "sdpa"
    attention_slicing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    offload: str = "none"
    compile: bool = False
    engine: str = "eager"
    reuse_prompt: bool = False

    def __post_init__(self) -> None:
        """Checks every value on its own.

        Raises:
            UserError: A value is out of range, or two exclude each other.
        """
        for key, known in (
            ("dtype", PRECISIONS),
            ("scheduler", tuple(SCHEDULERS)),
            ("offload", OFFLOADS),
            ("engine", ENGINES),
        ):
            if getattr(self, key) not in known:
                raise bad_value(key, getattr(self, key), "one of " + ", ".join(known))
        if not 1 <= self.steps <= 1000:
            raise bad_value("steps", self.steps, "a whole number from 1 to 1000")
        if self.batch_size < 1:
            raise bad_value("batch_size", self.batch_size, "a whole number of at least 1")
        if self.compile and self.engine != "eager":
            raise bad_value("compile", True, f"false, because engine={self.engine} compiles the denoiser itself")
        if not self.attention:
            raise bad_value("attention", repr(self.attention), "sdpa, plain, xformers or a backend of diffusers")
        if self.attention_slicing and self.attention != "sdpa":
            raise bad_value("attention_slicing", True, f"false, because it would replace attention={self.attention}")


@dataclass(frozen=True)
class BenchmarkConfig:
    """The grid, and how each row is measured.

    Attributes:
        reference: The row that all others are compared with.
        change: Choice to values: one row each, with that choice changed from the reference.
        schedulers: Scheduler to numbers of steps: one row each, otherwise as the reference.
        combine: Rows that change several choices from the reference.
        guidance: Classifier-free guidance scale, at least 0; 1 and below turn guidance off.
        height: Of the images in pixels; None for the model's own.
        width: As ``height``.
        images: Images of each row for quality, at least 4; the reference row samples as many again with other noise.
        image_batch: Batch size for these images if the row's own is smaller; a compiled row keeps its own.
        repeats: Timed calls of each row, at least 2. Slow rows get fewer, but 3 if ``repeats`` is at least 3.
        slowest: A row is skipped if an image takes more than this multiple of the reference row's time.
    """

    reference: Choices = field(default_factory=Choices)
    change: dict[str, list[Any]] = field(default_factory=dict)
    schedulers: dict[str, list[int]] = field(default_factory=dict)
    combine: list[dict[str, Any]] = field(default_factory=list)
    guidance: float = 4.0
    height: int | None = None
    width: int | None = None
    images: int = 16
    image_batch: int = 8
    repeats: int = 5
    slowest: float = 8.0

    def __post_init__(self) -> None:
        """Checks every value on its own.

        Raises:
            UserError: A value is out of range, or ``change`` or ``combine`` name a choice that does not exist.
        """
        for key, low in {"images": 4, "image_batch": 1, "repeats": 2, "height": 8, "width": 8}.items():
            value = getattr(self, key)
            if value is not None and value < low:
                raise bad_value(key, value, f"a whole number of at least {low}")
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise bad_value("guidance", self.guidance, "a number of at least 0")
        if not self.slowest >= 1:
            raise bad_value("slowest", self.slowest, "a number of at least 1")
        rows(self)


@dataclass(frozen=True)
class Limits:
    """Limits of the best row; None is no limit.

    Attributes:
        memory_gb: Largest peak memory in 10^9 bytes.
        psnr_db: Smallest PSNR to the reference row's images.
        latency_s: Longest time of a call in seconds.
    """

    memory_gb: float | None = None
    psnr_db: float | None = None
    latency_s: float | None = None

    def __post_init__(self) -> None:
        """Checks every value on its own.

        Raises:
            UserError: A limit is not a positive number.
        """
        for key, value in dataclasses.asdict(self).items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise bad_value(key, value, "a number above 0, or null for no limit")


def rows(config: BenchmarkConfig) -> dict[str, Choices]:
    """The grid: rows by name, the reference first, without duplicates.

    Raises:
        UserError: A choice does not exist, or a value is out of range.
    """
    reference = dataclasses.asdict(config.reference)
    found = [config.reference]
    for key, values in config.change.items():
        _check_names(f"change.{key}", [key], list(reference))
        found += [_changed(f"change.{key}", config.reference, {key: value}) for value in values]
    for scheduler, numbers in config.schedulers.items():
        key = f"schedulers.{scheduler}"
        found += [_changed(key, config.reference, {"scheduler": scheduler, "steps": steps}) for steps in numbers]
    for index, changes in enumerate(config.combine):
        _check_names(f"combine.{index}", list(changes), list(reference))
        found.append(_changed(f"combine.{index}", config.reference, changes))
    return {label(choices, config.reference): choices for choices in found}


def _changed(path: str, reference: Choices, changes: dict[str, Any]) -> Choices:
    try:
        return build(Choices, {**dataclasses.asdict(reference), **changes}, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check_names(path: str, names: list[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{path}: no such choice{nearest(name, known)}; known: {', '.join(known)}")


def label(choices: Choices, reference: Choices) -> str:
    """A row's name: its differences from the reference."""
    if choices == reference:
        return "reference"
    parts = []
    if (choices.scheduler, choices.steps) != (reference.scheduler, reference.steps):
        parts.append(f"{SCHEDULERS[choices.scheduler].label} {choices.steps}")
    for key, value in dataclasses.asdict(choices).items():
        if key not in ("scheduler", "steps") and value != getattr(reference, key):
            parts.append(_part(key, value))
    return ", ".join(parts)


def _part(key: str, value: Any) -> str:
    names = {"channels_last": "channels-last", "vae_slicing": "VAE slicing", "vae_tiling": "VAE tiling"}
    words = names.get(key, {"compile": "compiled", "reuse_prompt": "prompt reused"}.get(key, key.replace("_", " ")))
    if isinstance(value, bool):
        return words if value else f"not {words}"
    if key in ("offload", "attention"):
        return f"{value} {words}"
    return f"batch {value}" if key == "batch_size" else str(value)
