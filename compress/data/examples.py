"""The examples a student is trained on: latents and text embeddings, computed once."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from compress.data.white import on_white
from compress.errors import UserError
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
        latents: ``(n, c, h, w)``, the modes of the autoencoder's posteriors, scaled as the denoiser expects them.
        captions: ``(n,)`` integers, the row of ``embeddings`` that belongs to each image.
        embeddings: ``(m, tokens, width)``, one row a distinct caption; row 0 is the empty prompt.
    """

    latents: torch.Tensor
    captions: torch.Tensor
    embeddings: torch.Tensor

    def __post_init__(self) -> None:
        """Checks that the three fit each other.

        Raises:
            UserError: There is no example, or shapes or indices are wrong.
        """
        if self.latents.ndim != 4 or self.embeddings.ndim != 3 or self.captions.shape != self.latents.shape[:1]:
            raise UserError(
                "examples: expected latents (n, c, h, w), captions (n,) and embeddings (m, tokens, width), got "
                f"{tuple(self.latents.shape)}, {tuple(self.captions.shape)} and {tuple(self.embeddings.shape)}"
            )
        if not len(self.latents):
            raise UserError("there is no example to distill with: the training data is empty")
        if self.captions.min() < 0 or self.captions.max() >= len(self.embeddings):
            raise UserError(f"examples: captions must be rows of embeddings, 0 to {len(self.embeddings) - 1}")


@dataclass(frozen=True)
class Batch:
    """A part of one step's batch, on the CPU.

    Attributes:
        latents: ``(b, c, h, w)``, clean.
        noise: ``(b, c, h, w)``, standard normal.
        timesteps: ``(b,)`` integers in [0, timesteps of the scheduler).
        embeddings: ``(b, tokens, width)``.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    embeddings: torch.Tensor


def draw(
    examples: Examples, step: int, size: int, part: slice, *, timesteps: int, prompt_dropout: float, seed: int
) -> Batch:
    """Draws ``part`` of the ``size`` examples of a step.

    Everything is drawn for the whole batch from a generator that only the seed and the step decide, so an example gets
    the same noise whatever the number of processes, and nothing has to be remembered to continue a training.
    """
    source = generator(seed, "batch", step)
    times = torch.randint(timesteps, (size,), generator=source)
    noise = torch.randn(size, *examples.latents.shape[1:], generator=source)
    dropped = torch.rand(size, generator=source) < prompt_dropout
    count = len(examples.latents)
    # Every example comes once before any comes again.
    index = torch.stack([_order(count, seed, i // count)[i % count] for i in range(step * size, (step + 1) * size)])[
        part
    ]
    captions = examples.captions[index].masked_fill(dropped[part], 0)
    return Batch(examples.latents[index], noise[part], times[part], examples.embeddings[captions])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch))


def encode_examples(
    pipeline: "DiffusionPipeline",
    dataset: "Dataset",
    *,
    max_examples: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    side: int | None = None,
) -> Examples:
    """Encodes images and captions with the pipeline's own image processor, autoencoder, tokenizer and text encoder.

    Args:
        pipeline: A ``StableDiffusionPipeline``, its parts on ``device``.
        dataset: With columns ``image`` (images of any size, cropped to the pipeline's) and ``text``.
        max_examples: At most this many, chosen at random by ``seed``; None: all.
        seed: Of that choice.
        device: Where the pipeline's parts are.
        side: Of the images in pixels, at most; None: the pipeline's own.

    Raises:
        UserError: The pipeline is of another kind, the dataset is empty, or a image or caption cannot be read.
    """
    _check_pipeline(pipeline)
    chosen = torch.arange(len(dataset))
    if max_examples is not None and max_examples < len(dataset):
        chosen = torch.randperm(len(dataset), generator=generator(seed, "examples", 0))[:max_examples].sort().values
    if not len(chosen):
        raise UserError("there is no example to distill with: the training data is empty")

    captions = dataset.select_columns("text").select(chosen.tolist())[:]["text"]
    for row, text in zip(chosen.tolist(), captions, strict=True):
        if not isinstance(text, str):
            raise UserError(f"row {row} of the training data has no caption")
    distinct = ["", *sorted(set(captions) - {""})]
    row_of = {text: row for row, text in enumerate(distinct)}
    with torch.no_grad():
        embeddings = _gather(_embed(pipeline, distinct, device), len(distinct), "encoding captions")
        latents = _gather(_encode(pipeline, dataset, chosen.tolist(), device, side), len(chosen), "encoding images")
    return Examples(latents, torch.tensor([row_of[text] for text in captions]), embeddings)


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
        except (SafetensorError, OSError, UserError) as error:
            warnings.warn(f"{file} is damaged ({error}); encoding the examples again", RuntimeWarning, stacklevel=2)
    examples = encode_examples(pipeline, dataset, **options)
    if not write:
        return examples
    write_tensors(file, vars(examples))
    return _read(file)


def _read(file: Path) -> Examples:
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
        if names != {"latents", "captions", "embeddings"}:
            raise UserError(f"unexpected tensors {sorted(names)}")
        return Examples(**{name: tensors.get_tensor(name) for name in names})


def _check_pipeline(pipeline: "DiffusionPipeline") -> None:
    parts = ("vae", "text_encoder", "tokenizer", "image_processor", "unet", "scheduler")
    missing = [part for part in parts if getattr(pipeline, part, None) is None]
    if missing or hasattr(pipeline, "text_encoder_2"):
        what = f"lacks {', '.join(missing)}" if missing else "has several text encoders"
        raise UserError(
            "method features distills StableDiffusionPipeline (Stable Diffusion 1 and 2); "
            f"{type(pipeline).__name__} {what}"
        )


def _gather(chunks: Iterator[torch.Tensor], count: int, what: str) -> torch.Tensor:
    """Puts chunks of rows into one tensor of ``count`` rows without holding them twice; shows a bar."""
    first = next(chunks)
    rows = torch.empty(count, *first.shape[1:], dtype=first.dtype)
    done = 0
    with bar() as progress:
        task = progress.add_task(what, total=count)
        for chunk in itertools.chain([first], chunks):
            rows[done : done + len(chunk)] = chunk
            done += len(chunk)
            progress.update(task, completed=done)
    return rows


def _embed(pipeline: Any, texts: list[str], device: torch.device | str) -> Iterator[torch.Tensor]:
    for start in range(0, len(texts), _CHUNK):
        yield pipeline.encode_prompt(texts[start : start + _CHUNK], device, 1, False)[0].cpu()


def _encode(
    pipeline: Any, dataset: "Dataset", rows: list[int], device: torch.device | str, side: int | None
) -> Iterator[torch.Tensor]:
    size, scale = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    sides = (size, size) if isinstance(size, int) else size
    height, width = (scale * (own if side is None else min(own, max(1, side // scale))) for own in sides)
    config = pipeline.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    count = min(_CHUNK, max(1, _PIXELS // (height * width)))
    for start in range(0, len(rows), count):
        images = [_image(dataset, row) for row in rows[start : start + count]]
        pixels = pipeline.image_processor.preprocess(images, height=height, width=width, resize_mode="crop")
        posterior = pipeline.vae.encode(pixels.to(device, pipeline.vae.dtype)).latent_dist
        yield ((posterior.mode() - shift) * config.scaling_factor).cpu()


def _image(dataset: "Dataset", row: int) -> "Image.Image":
    try:
        return on_white(dataset[row]["image"])
    except (OSError, AttributeError, ValueError) as error:
        raise UserError(f"the image of row {row} of the training data cannot be read: {error}") from error
