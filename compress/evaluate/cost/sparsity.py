"""How many of a denoiser's weights are zero, and how many bytes the others would take."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compress.evaluate.cost.size import weight_bytes
from compress.models.folder import weight_files
from compress.models.sparsity import holds

WORTH = 1 / 32
"""Share of zeros up to which a bit for every weight costs as much as it saves, even in float32."""


def count_zeros(model: torch.nn.Module, folder: Path, variant: str | None = None) -> dict[str, Any]:
    """Zeros of a denoiser's weights, those of Conv2d and Linear, in float or in int8 of torchao.

    Args:
        model: The denoiser.
        folder: Its weight files.
        variant: Of these, such as ``fp16``.

    Returns:
        ``sparsity``: share of zeros, in [0, 1]. ``sparsity_2_4``: share of the weights that sit in layers with at most
        two numbers other than zero in every group of four (see :func:`compress.models.sparsity.holds`).
        ``sparse_bytes``: of the files with every tensor as :func:`packed_bytes` has it; None where ``sparsity`` is not
        above :data:`WORTH`.
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
    """Bytes of a tensor as a bit for every number, whether it is zero, and the values of the others; or as it is.

    Whichever is less. At 2:4 that is just what sparse tensor cores read: half of the values, and two bits for each
    that say which of its four neighbors it is.
    """
    kept = int(tensor.count_nonzero()) * tensor.element_size()
    return min(tensor.numel() * tensor.element_size(), -(-tensor.numel() // 8) + kept)


def _weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            yield getattr(module.weight, "qdata", module.weight)  # torchao's integers: zero stands for zero
