"""Features of the real images that generated images are compared with: computed once and stored."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from compress.assets import resolve
from compress.data.white import on_white
from compress.errors import UserError
from compress.evaluate.config import EvaluateConfig
from compress.evaluate.images import ImageFiles, Images, image_files
from compress.evaluate.networks import Network, Networks
from compress.evaluate.networks.inception_file import INCEPTION_SHA256
from compress.system import processes
from compress.system.files import write_tensors
from compress.system.progress import track

if TYPE_CHECKING:
    from compress.data import Data


@dataclass(frozen=True)
class Reference:
    """Features of real images.

    Attributes:
        name: Their source, as in a sentence after "N of".
        features: float32 ``(m, d)`` by key of the network, see :class:`compress.evaluate.networks.Networks`.
        sha256: Hashes of these features, by the same keys.
    """

    name: str
    features: dict[str, Tensor]
    sha256: dict[str, str]

    @classmethod
    def of(cls, name: str, features: dict[str, Tensor]) -> "Reference":
        """A reference with the hashes of its features."""
        return cls(name, features, {key: features_hash(found) for key, found in features.items()})


class DataImages:
    """Rows of a data set as :class:`Images`, center-cropped and resized (Lanczos) if their size differs.

    Args:
        data: The data set.
        indices: Rows of ``data.train``.
        size: Height and width in pixels.
    """

    def __init__(self, data: "Data", indices: Sequence[int], size: tuple[int, int]) -> None:
        self.data, self.indices, self.size = data, list(indices), size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: slice, /) -> Tensor:
        """uint8 RGB, ``(b, 3, height, width)``."""
        import numpy as np
        from PIL import Image, ImageOps

        images = [
            ImageOps.fit(on_white(self.data.train[index]["image"]), self.size[::-1], Image.Resampling.LANCZOS)
            for index in self.indices[chosen]
        ]
        return torch.from_numpy(np.stack([np.asarray(one) for one in images])).permute(0, 3, 1, 2).contiguous()


def features(images: Images, network: Network, batch_size: int) -> Tensor:
    """Features of all images from one network, float32 ``(n, d)`` on the CPU."""
    starts = range(0, len(images), batch_size)
    batches = track(starts, f"{network.name}: {len(images)} images")
    return torch.cat([network(images[start : start + batch_size]) for start in batches])


def data_reference(
    data: "Data", config: EvaluateConfig, size: tuple[int, int], networks: Networks, cache: Path | None = None
) -> Reference:
    """A random choice of training images, resized to the size of generated images.

    Inception's features come from the file of ``data.reference`` if it has enough images of that size with the same
    resize. The other networks then use the same images.

    Args:
        data: The data set; ``data.reference`` is a safetensors file of :func:`write_reference` or None.
        config: ``reference_images``, ``score_batch_size`` and the choice of networks.
        size: Height and width of the generated images.
        networks: The evaluation's networks.
        cache: Folder for computed features; None to not store them.

    Raises:
        UserError: ``data.reference`` is missing, damaged, or made from other images or with another network.
    """
    if not data.has_images:
        return Reference("no images", {}, {})
    wanted = min(config.reference_images or len(data.text), len(data.text))
    order = torch.randperm(len(data.text), generator=torch.Generator().manual_seed(0))[:wanted]
    name, found = "the run's own training images", {}
    keys = networks.keys(sets=True, captions=False)
    if data.reference is not None:
        stored, indices, metadata = _read(Path(resolve(data.reference)), data, f"data.reference={data.reference}")
        fits = len(stored) >= wanted and json.loads(metadata["size"]) == list(size)
        if fits and "inception" in keys and config.fid_resize == "tensorflow1":
            name, order = f"the training images ({Path(data.reference).name})", indices[:wanted]
            found = {"inception": stored[:wanted].float()}
    content = json.dumps([data.fingerprint, features_hash(order), size])
    rest = [key for key in keys if key not in found]
    found |= _kept(lambda: DataImages(data, order.tolist(), size), content, rest, networks, cache)
    return Reference.of(name, {key: found[key] for key in keys})


def folder_reference(
    folder: str | Path,
    config: EvaluateConfig,
    networks: Networks,
    cache: Path | None = None,
    squeeze: tuple[int, int] | None = None,
    key: str = "evaluate.reference",
) -> Reference:
    """All images of a folder, or a random choice of them.

    Args:
        folder: The folder; subfolders are included.
        config: ``reference_images`` (None: all), ``score_batch_size`` and the choice of networks.
        networks: Those of the evaluation.
        cache: Folder for computed features; None keeps nothing.
        squeeze: Height and width to resize them to without cropping; None for no resize.
        key: The config key of ``folder``, for messages.

    Raises:
        UserError: The folder has no images, or one cannot be read.
    """
    files = image_files(folder, key)
    if config.reference_images is not None and config.reference_images < len(files):
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[: config.reference_images]
        files = [files[index] for index in sorted(order.tolist())]
    images = ImageFiles(files, key, squeeze, squeeze=squeeze is not None)
    return files_reference(images, f"the images of {Path(folder).name}", networks, cache)


def files_reference(images: ImageFiles, name: str, networks: Networks, cache: Path | None = None) -> Reference:
    """The features of images on disk, cached by the images' content."""
    content = json.dumps([images.sha256, images.fit, images.squeeze])
    keys = networks.keys(sets=True, captions=False)
    return Reference.of(name, _kept(lambda: images, content, keys, networks, cache))


def write_reference(
    data: "Data",
    path: Path,
    n: int,
    size: tuple[int, int],
    seed: int = 0,
    network: Network | None = None,
    batch_size: int = 32,
) -> None:
    """Writes the Inception features of training images as a file for ``data.reference``.

    A safetensors file with ``features`` ``(n, 2048)`` float16 and ``indices`` ``(n,)`` int64, rows of ``data.train`` in
    random order, so the first k are a random choice too. Its metadata names network, image size and captions.

    Args:
        data: The data set.
        path: The file, written atomically.
        n: Number of images; all if there are fewer.
        size: Height and width to which the images are resized first, those of generated images.
        seed: Seed of the choice.
        network: None for Inception; another network only in tests.
        batch_size: Images per batch.
    """
    network = Networks(EvaluateConfig()).inception if network is None else network
    order = torch.randperm(len(data.text), generator=torch.Generator().manual_seed(seed))[:n]
    found = features(DataImages(data, order.tolist(), size), network, batch_size)
    metadata = {
        "network": network.name,
        "network_sha256": INCEPTION_SHA256,
        "size": json.dumps(list(size)),
        "captions_sha256": _captions_hash(data, order),
        "seed": str(seed),
    }
    write_tensors(path, {"features": found.half(), "indices": order}, metadata)


def features_hash(values: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def _kept(
    images: Callable[[], Images], content: str, keys: Sequence[str], networks: Networks, cache: Path | None
) -> dict[str, Tensor]:
    """Features of some networks, from the cache if possible; with several processes the first one computes them."""
    found: dict[str, Tensor] = {}
    for key in keys:
        network = networks[key]
        parts = json.dumps([content, network.sha256, network.preprocessing])
        name = f"{key.replace('.', '-')}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.safetensors"
        path = None if cache is None else cache / name
        for first in (True, False):
            with processes.together():
                if processes.is_main() == first:
                    found[key] = _load_or_compute(images, network, path, networks.config.score_batch_size)
    return found


def _load_or_compute(images: Callable[[], Images], network: Network, path: Path | None, batch_size: int) -> Tensor:
    if path is not None and path.exists():
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path}: damaged ({error}); delete it and run the same command again") from error
    found = images()
    if isinstance(found, ImageFiles):
        found.verify()
    computed = features(found, network, batch_size)
    if path is not None:
        write_tensors(path, {"features": computed})
    return computed


def _captions_hash(data: "Data", indices: Tensor) -> str:
    return hashlib.sha256("\n".join(data.text[index] for index in indices.tolist()).encode()).hexdigest()


def _read(path: Path, data: "Data", shown: str) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Features, rows and metadata of a file written by :func:`write_reference` for this data."""
    remedy = "set data.reference=null to compute the features from the data"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored, indices = file.get_tensor("features"), file.get_tensor("indices")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{shown}: cannot read reference features ({error}); {remedy}") from None
    if metadata.get("network_sha256") != INCEPTION_SHA256:
        raise UserError(f"{shown}: made with another network than Inception; {remedy}")
    fits = not len(indices) or int(indices.max()) < len(data.text)
    if not fits or metadata.get("captions_sha256") != _captions_hash(data, indices):
        raise UserError(f"{shown}: made from other images than the training data; {remedy}")
    return stored, indices, metadata
