"""Bytes of a denoiser's weights, on disk and in memory."""

import json
from pathlib import Path

import torch

from compress.errors import UserError
from compress.models.folder import weight_files


def weight_bytes(folder: Path, variant: str | None = None) -> tuple[int, dict[str, int]]:
    """Bytes on disk of a model's safetensors files, in one or several shards, and of their tensors by data type.

    Raises:
        UserError: There are no such files.
    """
    files = weight_files(folder, variant)
    if not files:
        raise UserError(f"{folder}: no safetensors files; the checkpoint is incomplete")
    by_dtype: dict[str, int] = {}
    for file in files:
        # Only the header: 8 bytes with its length, then JSON.
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                by_dtype[entry["dtype"]] = by_dtype.get(entry["dtype"], 0) + end - start
    return sum(file.stat().st_size for file in files), by_dtype


def memory_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers in memory; quantized ones with their scales and offsets."""
    return sum(_tensor_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _tensor_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass made of plain tensors, such as torchao's
        names, _ = tensor.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
