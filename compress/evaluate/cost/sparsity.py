"""Counts a denoiser's zero weights and the bytes that the others would take."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compress.evaluate.cost.size import weight_bytes
from compress.models.folder import weight_files
from compress.models.sparsity import holds

WORTH = 1 / 32
"""Share of zeros up to which one bit per weight costs as much as it saves, even in float32."""


def count_zeros(model: torch.nn.Module, folder: Path, variant: str | None = None) -> dict[str, Any]:
    """Zeros among a denoiser's Conv2d and Linear weights, in float or in torchao's int8.

    Args:
        model: The denoiser.
        folder: Its weight files.
        variant: Variant of these files, such as ``fp16``.

    Returns:
        ``sparsity``: share of zeros, in [0, 1]. ``sparsity_2_4``: share of weights in layers with at most two nonzero
        numbers in every group of four (see :func:`compress.models.sparsity.holds`). ``sparse_bytes``: bytes of the
        files with every tensor packed (:func:`packed_bytes`); None if ``sparsity`` is at most :data:`WORTH`.
    """
    total = zeros = grouped = 0
    for weight in _weights(model):
        total += weight.numel()
        zeros += weight.numel() - int(weight.count_nonzero())
        grouped += weight.numel() if holds(weight, 2, 4) else 0
    share = zeros / total if total else 0.0
    stored = sparse_bytes(folder, variant) if share > WORTH else None
    return {"sparsity": share, "sparsity_2_4": grouped / total if total else 0.0, "sparse_bytes": stored}


def sparse_bytes(folder: Path, variant: str | None = None) -> int:
    """Bytes of a model's safetensors files, headers included, if every tensor were packed; see :func:`packed_bytes`.

    Raises:
        UserError: There are no files.
    """
    size, by_dtype = weight_bytes(folder, variant)
    headers = size - sum(by_dtype.values())
    packed = 0
    for file in weight_files(folder, variant):
        with safe_open(file, "pt") as opened:
            packed += sum(packed_bytes(opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 (no mapping)
    return headers + packed


def packed_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor with one bit per number and only the nonzero values, or of the plain tensor if that is less.

    For 2:4 this equals the format of sparse tensor cores: half of the values, with two bits each for their position.
    """
    kept = int(tensor.count_nonzero()) * tensor.element_size()
    return min(tensor.numel() * tensor.element_size(), -(-tensor.numel() // 8) + kept)


def _weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            yield getattr(module.weight, "qdata", module.weight)  # torchao's integers: symmetric, so 0 is zero
