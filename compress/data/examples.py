"""Training images and captions as a model sees them: latents and conditions, computed once."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.data.framing import Framing, framed
from compress.data.samples import SamplesConfig, sample_latents, sampled_prompts
from compress.data.tensors import Chunk, Rows, filled, read
from compress.data.white import on_white
from compress.errors import UserError
from compress.models.conditions import Conditions, conditions_of, joined, unconditional
from compress.models.inputs import own_size, smaller
from compress.models.latents import check_latents, encode_images
from compress.system.leases import leased
from compress.system.progress import bar, say
from compress.system.random import generator

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from PIL import Image

# Images and captions are encoded this many at a time, large images fewer; it decides memory, not results.
_CHUNK = 32
_PIXELS = 2**20
FILES = ("conditions.safetensors", "examples.safetensors")


@dataclass(frozen=True)
class Examples:
    """Encoded images and captions.

    Attributes:
        latents: ``(n, ...)``, clean, scaled as the denoiser expects them; see :mod:`compress.models.latents`.
        captions: ``(n,)`` integers, the row of ``conditions`` that belongs to each image.
        conditions: One row a distinct caption; row 0 is what guidance points away from, the empty prompt
            as the pipeline passes it. Without rows for a model without prompts.
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
    framing: Framing | None = None,
    samples: SamplesConfig | None = None,
    prompts: Sequence[str] = (),
    folder: Path | None = None,
) -> Examples:
    """Encodes images and captions with the pipeline's own image processor, autoencoder, tokenizers and text encoders.

    Args:
        pipeline: Any that draws from a prompt, or without one; its parts are on one device.
        dataset: With columns ``image`` (of any size) and ``text``; or with ``text`` alone: then the pipeline samples
            one latent of each prompt, unless ``samples`` says how many.
        max_examples: At most this many images, chosen at random by ``seed``; None: all; 0: none.
        seed: Of that choice, of random crops and of the samples.
        side: Of the images in pixels, at most; None: the pipeline's own.
        framing: How images are brought to that size; None: scaled and center-cropped.
        samples: Latents that the pipeline samples, which follow those of the images; None: none.
        prompts: To sample from; empty: the captions.
        folder: Where the tensors are written part by part, so that they may be larger than memory and a call after a
            kill continues; None: in memory.

    Raises:
        UserError: The denoiser takes more than latents of the autoencoder and a prompt, there is no example, an image
            or caption cannot be read, or the folder cannot be written.
    """
    check_latents(pipeline)
    framing, samples = framing or Framing(), samples or SamplesConfig()
    with_images = "image" in dataset.column_names
    chosen = torch.arange(len(dataset) if with_images else 0)
    if max_examples is not None and max_examples < len(chosen):
        chosen = torch.randperm(len(chosen), generator=generator(seed, "examples", 0))[:max_examples].sort().values
    texts = _captions(dataset, chosen.tolist()) * (1 + framing.flip)
    count = samples.count or (0 if with_images else len(prompts or dataset))
    sampled = sampled_prompts(prompts or _captions(dataset, range(len(dataset))), count, seed) if count else []
    if not texts and not sampled:
        raise UserError("there is no example to train with: the training data is empty")
    height, width = training_size(pipeline, side, framing)
    images = _Images(pipeline, dataset, chosen.tolist(), framing, height, width, seed)

    distinct = ["", *sorted({*texts, *sampled} - {""})]
    row_of = {text: row for row, text in enumerate(distinct)}
    every = torch.tensor([row_of[text] for text in (*texts, *sampled)])
    of = hashlib.sha256(
        json.dumps([distinct, every.tolist(), height, width, seed, asdict(framing), asdict(samples)]).encode()
    )
    conditions, examples = (None, None) if folder is None else (folder / name for name in FILES)
    with torch.no_grad(), bar() as progress:
        task = progress.add_task("encoding captions", total=len(distinct))

        def encoded(start: int) -> Chunk:
            part = conditions_of(pipeline, distinct[start : start + _CHUNK], height, width)
            if start == 0:
                part = joined([unconditional(pipeline, height, width), part.rows_of(slice(1, None))])
            stop = min(start + _CHUNK, len(distinct))
            progress.update(task, completed=stop)
            return _packed(part, stop)

        table, metadata = filled(len(distinct), encoded, conditions, of.hexdigest())
        task = progress.add_task("encoding images" if texts else "sampling latents", total=len(every))

        def latents(start: int) -> Chunk:
            if start < len(images):
                found = images(start)
            else:
                first = start - len(images)
                wanted = sampled[first : first + samples.batch_size]
                found = sample_latents(pipeline, wanted, samples, height, width, seed, first)
            stop = start + len(found)
            progress.update(task, completed=stop)
            return Chunk({"latents": found, "captions": every[start:stop]}, stop, {}, {})

        rows, _ = filled(len(every), latents, examples, of.hexdigest())
    return Examples(rows["latents"], rows["captions"], _unpacked(table, metadata))


def cached_examples(
    pipeline: "DiffusionPipeline", dataset: "Dataset", folder: Path, *, write: bool = True, **options: Any
) -> Examples:
    """What :func:`encode_examples` gives, read from ``folder`` where it is there and put there where it is not.

    The tensors are mapped from the files: rows are read when they are used, and processes on one machine share their
    memory.

    Args:
        pipeline: See :func:`encode_examples`.
        dataset: See :func:`encode_examples`.
        folder: Belongs to one pipeline, dataset and choice of options. Other runs may share it.
        write: False in a process that must not write; it encodes for itself where the files are missing.
        options: See :func:`encode_examples`.
    """
    if (found := _read(folder)) is not None:
        return found
    if not write:
        return encode_examples(pipeline, dataset, **options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; choose another folder, then run it again") from error
    with leased(folder / ".lease", lambda: say(f"waiting for the run that encodes the data into {folder}")):
        return _read(folder) or encode_examples(pipeline, dataset, folder=folder, **options)


def _read(folder: Path) -> Examples | None:
    """The examples in a folder; None, after a warning, where they are damaged."""
    files = [folder / name for name in FILES]
    if not files[1].exists():
        return None
    try:
        (table, metadata), (rows, _) = map(read, files)
        return Examples(rows["latents"], rows["captions"], _unpacked(table, metadata))
    except (OSError, UserError, ValueError, KeyError) as error:
        warnings.warn(f"{files[1]} is damaged ({error}); encoding the examples again", RuntimeWarning, stacklevel=3)
        for file in files:
            file.unlink(missing_ok=True)
        return None


def _packed(conditions: Conditions, stop: int) -> Chunk:
    """Conditions as parts of a table."""
    rows = {f"rows.{name}": tensor for name, tensor in conditions.rows.items()}
    shared = conditions.shared
    fixed = {f"shared.{name}": value for name, value in shared.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in shared.items() if not isinstance(value, torch.Tensor)}
    return Chunk(rows, stop, fixed, {"shared": json.dumps(plain)})


def _unpacked(table: Rows, metadata: dict[str, str]) -> Conditions:
    parts: dict[str, dict[str, Any]] = {"rows": {}, "shared": json.loads(metadata["shared"])}
    for name, tensor in table.items():
        place, _, key = name.partition(".")
        parts[place][key] = tensor
    return Conditions(parts["rows"], parts["shared"])


def _captions(dataset: "Dataset", rows: Sequence[int]) -> list[str]:
    captions = dataset.select_columns("text").select(rows)[:]["text"]
    for row, text in zip(rows, captions, strict=True):
        if not isinstance(text, str):
            raise UserError(f"row {row} of the training data has no caption")
    return list(captions)


def training_size(
    pipeline: "DiffusionPipeline", side: int | None = None, framing: Framing | None = None
) -> tuple[int, int]:
    """Height and width of the training images in pixels; see :func:`encode_examples`."""
    framing = framing or Framing()
    sides = [found for found in (side, framing.resize) if found is not None]
    height, width = smaller(pipeline, min(sides)) if sides else own_size(pipeline)
    assert height is not None and width is not None
    return height, width


class _Images:
    """The latents of chosen images, and of them mirrored."""

    def __init__(
        self, pipeline: Any, dataset: "Dataset", rows: list[int], framing: Framing, height: int, width: int, seed: int
    ) -> None:
        self.pipeline, self.dataset, self.rows, self.framing = pipeline, dataset, rows, framing
        self.height, self.width, self.seed = height, width, seed

    def __len__(self) -> int:
        return len(self.rows) * (1 + self.framing.flip)

    def __call__(self, start: int) -> torch.Tensor:
        """The latents of the images from ``start`` on, as many as are encoded at once."""
        count = min(_CHUNK, max(1, _PIXELS // (self.height * self.width)))
        images = [self._image(index) for index in range(start, min(start + count, len(self)))]
        return encode_images(self.pipeline, images, self.height, self.width)

    def _image(self, index: int) -> "Image.Image":
        mirrored, place = divmod(index, len(self.rows))
        row = self.rows[place]
        try:
            image = on_white(self.dataset[row]["image"])
        except (OSError, AttributeError, ValueError) as error:
            raise UserError(f"the image of row {row} of the training data cannot be read: {error}") from error
        return framed(image, self.framing, self.height, self.width, bool(mirrored), self.seed, row)
