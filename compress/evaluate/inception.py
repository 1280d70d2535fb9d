"""Inception features of generated and of real pictures, for FID and KID."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compress.assets import resolve
from compress.errors import UserError
from compress.evaluate.config import EvaluateConfig
from compress.evaluate.networks.inception_file import INCEPTION_SHA256, find_inception
from compress.progress import track

if TYPE_CHECKING:
    from compress.data import Data

SIDE = 299
NAME = "pt_inception-2015-12-05"


def resize_like_tensorflow1(pictures: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Bilinear resize with TensorFlow 1's coordinates, which every published FID uses.

    Output pixel ``i`` lies at ``i * size / side`` of the input: no half-pixel shift, no antialiasing, and what would
    be read past the last row or column is that row or column again.

    Args:
        pictures: Float, ``(n, channels, height, width)``.
        side: Height and width of the result in pixels.

    Returns:
        Float, ``(n, channels, side, side)``.
    """
    rows = _weights(pictures.shape[2], side, pictures)
    columns = _weights(pictures.shape[3], side, pictures)
    return rows @ pictures @ columns.T


def _weights(size: int, side: int, like: torch.Tensor) -> torch.Tensor:
    """The ``(side, size)`` matrix of the interpolation along one axis."""
    index = torch.arange(side)
    position = index.double() * size / side
    low = position.floor().long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    share = position - low
    weights = torch.zeros(side, size, dtype=torch.float64)
    weights[index, low] += 1 - share
    weights[index, high] += share
    return weights.to(like)


class Inception(torch.nn.Module):
    """The network of FID (Heusel et al. 2017), https://arxiv.org/abs/1706.08500.

    uint8 RGB ``(n, 3, height, width)`` of any size in, ``(n, 2048)`` float32 features out. Fits torchmetrics'
    ``FrechetInceptionDistance(feature=...)`` and ``KernelInceptionDistance(feature=...)``.

    Args:
        path: See :func:`compress.evaluate.networks.inception_file.find_inception`.
        device: Where to compute.

    Raises:
        UserError: The file is missing or another one.
    """

    num_features = 2048

    def __init__(self, path: str = "auto", device: torch.device | str = "cpu") -> None:
        super().__init__()
        network = torch.jit.load(str(find_inception(path)), map_location="cpu").eval().to(device)
        self.network = torch.jit.freeze(network)
        self.device = torch.device(device)

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of a batch; see the class."""
        large = resize_like_tensorflow1(pictures.to(self.device, torch.float32))
        # Optimizing costs two slow passes for every new batch size and gains nothing.
        with torch.jit.optimized_execution(False):
            return self.network((large - 128) / 128)


def features(pictures: torch.Tensor, network: torch.nn.Module, batch_size: int) -> torch.Tensor:
    """Features of all pictures.

    Args:
        pictures: uint8 RGB, ``(n, 3, height, width)``.
        network: From such a batch to ``(batch, d)``, for instance :class:`Inception`.
        batch_size: Pictures at once.

    Returns:
        float32, ``(n, d)``, on the CPU.
    """
    starts = range(0, len(pictures), batch_size)
    batches = track(starts, f"Inception features of {len(pictures)} pictures")
    return torch.cat([network(pictures[start : start + batch_size]).float().cpu() for start in batches])


def real_pictures(data: "Data", indices: Sequence[int], size: tuple[int, int]) -> torch.Tensor:
    """Training pictures, center-cropped and resized (Lanczos) where they are of another size.

    Args:
        data: The data set.
        indices: n rows of ``data.train``.
        size: Height and width in pixels.

    Returns:
        uint8 RGB, ``(n, 3, height, width)``.
    """
    import numpy as np
    from PIL import Image, ImageOps

    pictures = [
        np.asarray(ImageOps.fit(data.train[index]["image"].convert("RGB"), size[::-1], Image.Resampling.LANCZOS))
        for index in indices
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def write_reference(
    data: "Data",
    path: Path,
    n: int,
    size: tuple[int, int],
    seed: int = 0,
    network: torch.nn.Module | None = None,
    batch_size: int = 32,
) -> None:
    """Writes the features of real pictures that FID and KID compare with.

    A safetensors file with ``features`` ``(n, 2048)`` float16 and ``indices`` ``(n,)`` int64, rows of ``data.train`` in
    random order, so that the first k are a random choice too; its metadata names network, picture size and captions.

    Args:
        data: The data set.
        path: The file; appears whole or not at all.
        n: Number of pictures; all of them where there are fewer.
        size: Height and width to which the pictures are brought first, those of the generated ones.
        seed: Seed of the choice.
        network: Other than the default :class:`Inception` only in tests.
        batch_size: Pictures at once.
    """
    network = Inception() if network is None else network
    order = torch.randperm(len(data.text), generator=torch.Generator().manual_seed(seed))[:n]
    found = features(real_pictures(data, order.tolist(), size), network, batch_size)
    metadata = {
        "network": NAME,
        "network_sha256": INCEPTION_SHA256,
        "size": json.dumps(list(size)),
        "captions_sha256": _captions_hash(data, order),
        "seed": str(seed),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({"features": found.half(), "indices": order}, beside, metadata)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def reference_features(
    data: "Data",
    config: EvaluateConfig,
    size: tuple[int, int],
    cache: Path | None = None,
    network: torch.nn.Module | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Features of real pictures: from the file of ``data.reference`` where it fits, else computed.

    The file fits if it holds enough pictures of the generated ones' size. What is computed is kept in ``cache``.

    Args:
        data: The data set; ``data.reference`` is a safetensors file of :func:`write_reference` or None.
        config: ``reference_images`` and ``batch_size``.
        size: Height and width of the generated pictures.
        cache: Folder for computed features; None keeps nothing.
        network: See :func:`write_reference`.

    Returns:
        float32 ``(n, 2048)`` and ``{"reference", "n_reference"}`` for the report.

    Raises:
        UserError: ``data.reference`` is missing, damaged, or made from other pictures or by another network.
    """
    wanted = min(config.reference_images, len(data.text))
    if data.reference is not None:
        stored, metadata = _read(Path(resolve(data.reference)), data, f"data.reference={data.reference}")
        if len(stored) >= wanted and json.loads(metadata["size"]) == list(size):
            return stored[:wanted].float(), {"reference": Path(data.reference).name, "n_reference": wanted}
    info = {"reference": "training pictures", "n_reference": wanted}
    parts = [data.fingerprint, str(wanted), json.dumps(list(size)), INCEPTION_SHA256]
    name = f"inception-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.safetensors"
    if cache is not None and (cache / name).exists():
        return _read(cache / name, data, str(cache / name))[0].float(), info
    if cache is not None:
        write_reference(data, cache / name, wanted, size, network=network, batch_size=config.batch_size)
        return _read(cache / name, data, str(cache / name))[0].float(), info
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return reference_features(data, config, size, Path(folder), network)


def _captions_hash(data: "Data", indices: torch.Tensor) -> str:
    return hashlib.sha256("\n".join(data.text[index] for index in indices.tolist()).encode()).hexdigest()


def _read(path: Path, data: "Data", shown: str) -> tuple[torch.Tensor, dict[str, str]]:
    remedy = "set data.reference=null to compute the features from the data"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored, indices = file.get_tensor("features"), file.get_tensor("indices")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{shown}: no readable file of reference features ({error}); {remedy}") from None
    if metadata.get("network_sha256") != INCEPTION_SHA256:
        raise UserError(f"{shown}: made by another network than {NAME}; {remedy}")
    fits = not len(indices) or int(indices.max()) < len(data.text)
    if not fits or metadata.get("captions_sha256") != _captions_hash(data, indices):
        raise UserError(f"{shown}: made from other pictures than the training data; {remedy}")
    return stored, metadata
