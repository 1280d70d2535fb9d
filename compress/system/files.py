"""Files that appear whole or not at all, and their hashes."""

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError

if TYPE_CHECKING:
    import torch


@contextmanager
def replace_with(file: Path) -> Iterator[Path]:
    """Gives a path beside ``file``; what was written there takes its place when the block ends well.

    The path begins with a dot and ends as ``file`` does, since writers choose a format by the ending.
    """
    beside = file.with_name(f".{uuid.uuid4().hex}-{file.name}")
    try:
        yield beside
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_tensors(file: Path, tensors: "Mapping[str, torch.Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, and its folder where it is missing, so that it appears whole or not at all.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_with(file) as beside:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata)
            flush(beside)
        flush(file.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {file}: {error}; make room or choose another folder, then run it again"
        ) from error


def flush(path: Path) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(file: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
