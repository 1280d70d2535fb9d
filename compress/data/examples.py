"""Training images and captions as a model sees them: latents and conditions, computed once."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from compress.data.white import on_white
from compress.errors import UserError
from compress.models.conditions import Conditions, conditions_of, joined
from compress.models.inputs import own_size, smaller
from compress.models.latents import check_latents, encode_images
from compress.system.files import write_tensors
from compress.system.progress import bar
from compress.system.random import generator

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from PIL import Image

# Images and captions are encoded this many at a time, large images fewer; it decides memory, not results.
_CHUNK = 32
_PIXELS = 2**20


@dataclass(frozen=True)
class Examples:
    """Encoded images and captions.

    Attributes:
        latents: ``(n, ...)``, clean, scaled as the denoiser expects them; see :mod:`compress.models.latents`.
        captions: ``(n,)`` integers, the row of ``conditions`` that belongs to each image.
        conditions: One row a distinct caption; row 0 is the empty prompt. Without rows for a model without prompts.
    """

    latents: torch.Tensor
    captions: torch.Tensor
    conditions: Conditions

    def __post_init__(self) -> None:
        """Checks that the three fit each other.

        Raises:
            UserError: There is no example, or shapes or indices are wrong.
        """
        if self.latents.ndim < 3 or self.captions.shape != self.latents.shape[:1]:
            raise UserError(
                "examples: expected latents (n, ...) and captions (n,), got "
                f"{tuple(self.latents.shape)} and {tuple(self.captions.shape)}"
            )
        if not len(self.latents):
            raise UserError("there is no example to train with: the training data is empty")
        if self.conditions.rows and not 0 <= self.captions.min() <= self.captions.max() < len(self.conditions):
            raise UserError(f"examples: captions must be rows of conditions, 0 to {len(self.conditions) - 1}")


def encode_examples(
    pipeline: "DiffusionPipeline",
    dataset: "Dataset",
    *,
    max_examples: int | None = None,
    seed: int = 0,
    side: int | None = None,
) -> Examples:
    """Encodes images and captions with the pipeline's own image processor, autoencoder, tokenizers and text encoders.

    Args:
        pipeline: Any that draws from a prompt, or without one; its parts are on one device.
        dataset: With columns ``image`` (of any size, cropped to the pipeline's) and ``text``.
        max_examples: At most this many, chosen at random by ``seed``; None: all.
        seed: Of that choice.
        side: Of the images in pixels, at most; None: the pipeline's own.

    Raises:
        UserError: The denoiser takes more than latents of the autoencoder and a prompt, the dataset is empty, or an
            image or caption cannot be read.
    """
    check_latents(pipeline)
    chosen = torch.arange(len(dataset))
    if max_examples is not None and max_examples < len(dataset):
        chosen = torch.randperm(len(dataset), generator=generator(seed, "examples", 0))[:max_examples].sort().values
    if not len(chosen):
        raise UserError("there is no example to train with: the training data is empty")

    captions = dataset.select_columns("text").select(chosen.tolist())[:]["text"]
    for row, text in zip(chosen.tolist(), captions, strict=True):
        if not isinstance(text, str):
            raise UserError(f"row {row} of the training data has no caption")
    distinct = ["", *sorted(set(captions) - {""})]
    row_of = {text: row for row, text in enumerate(distinct)}
    height, width = own_size(pipeline) if side is None else smaller(pipeline, side)
    assert height is not None and width is not None
    with torch.no_grad(), bar() as progress:
        task = progress.add_task("encoding captions", total=len(distinct))
        parts = []
        for start in range(0, len(distinct), _CHUNK):
            parts.append(conditions_of(pipeline, distinct[start : start + _CHUNK], height, width))
            progress.update(task, completed=min(start + _CHUNK, len(distinct)))
        task = progress.add_task("encoding images", total=len(chosen))
        latents = torch.empty(0)
        for rows, chunk in _encode(pipeline, dataset, chosen.tolist(), height, width):
            latents = latents if len(latents) else torch.empty(len(chosen), *chunk.shape[1:], dtype=chunk.dtype)
            latents[rows] = chunk
            progress.update(task, completed=rows.stop)
    return Examples(latents, torch.tensor([row_of[text] for text in captions]), joined(parts))


def cached_examples(
    pipeline: "DiffusionPipeline", dataset: "Dataset", folder: Path, *, write: bool = True, **options: Any
) -> Examples:
    """What :func:`encode_examples` gives, read from ``folder`` where it is there and put there where it is not.

    The tensors are mapped from the file, so processes on one machine share their memory.

    Args:
        pipeline: See :func:`encode_examples`.
        dataset: See :func:`encode_examples`.
        folder: Belongs to one pipeline, dataset and choice of options.
        write: False in a process that must not write; it encodes for itself where the file is missing.
        options: See :func:`encode_examples`.
    """
    file = folder / "examples.safetensors"
    if file.exists():
        try:
            return _read(file)
        except (SafetensorError, OSError, UserError, ValueError, KeyError) as error:
            warnings.warn(f"{file} is damaged ({error}); encoding the examples again", RuntimeWarning, stacklevel=2)
    examples = encode_examples(pipeline, dataset, **options)
    if not write:
        return examples
    tensors = {"latents": examples.latents, "captions": examples.captions}
    tensors |= {f"rows.{name}": rows for name, rows in examples.conditions.rows.items()}
    shared = examples.conditions.shared
    tensors |= {f"shared.{name}": value for name, value in shared.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in shared.items() if not isinstance(value, torch.Tensor)}
    write_tensors(file, tensors, {"shared": json.dumps(plain)})
    return _read(file)


def _read(file: Path) -> Examples:
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        shared = json.loads(opened.metadata()["shared"])
    parts: dict[str, dict[str, Any]] = {"rows": {}, "shared": shared}
    for name, tensor in tensors.items():
        place, _, key = name.partition(".")
        if key:
            parts[place][key] = tensor
    return Examples(tensors["latents"], tensors["captions"], Conditions(parts["rows"], parts["shared"]))


def _encode(
    pipeline: Any, dataset: "Dataset", rows: list[int], height: int, width: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Places and latents of chunks of images."""
    count = min(_CHUNK, max(1, _PIXELS // (height * width)))
    for start in range(0, len(rows), count):
        images = [_image(dataset, row) for row in rows[start : start + count]]
        yield slice(start, start + len(images)), encode_images(pipeline, images, height, width)


def _image(dataset: "Dataset", row: int) -> "Image.Image":
    try:
        return on_white(dataset[row]["image"])
    except (OSError, AttributeError, ValueError) as error:
        raise UserError(f"the image of row {row} of the training data cannot be read: {error}") from error
