"""Atomic writes of files and folders, hard links, and hashes."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError

if TYPE_CHECKING:
    import torch


_PARTIAL = ".partial"
_STALE_SECONDS = 24 * 3600


@contextmanager
def replace_with(file: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces ``file`` if the block succeeds.

    The path begins with a dot and keeps the ending of ``file``, by which writers choose a format.
    """
    beside = file.with_name(f".{uuid.uuid4().hex}-{file.name}")
    try:
        yield beside
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replace_folder_with(folder: Path) -> Iterator[Path]:
    """Yields a temporary path for a new folder, which replaces ``folder`` if the block succeeds.

    On an error the old folder stays. The path begins with a dot; leftovers of killed processes are removed after a day.
    """
    for path in folder.parent.glob(f".{folder.name}.*{_PARTIAL}"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    beside, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{_PARTIAL}") for _ in range(2))
    try:
        yield beside
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(beside, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Hard-links a file, or copies it if the file system has no hard links. Neither path may be written to."""
    try:
        os.link(source, target)
    except OSError:
        with replace_with(target) as beside:
            shutil.copy2(source, beside)


def write_text(file: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with replace_with(file) as beside:
        beside.write_text(text, encoding="utf-8")
        flush(beside)


def write_tensors(file: Path, tensors: "Mapping[str, torch.Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically and creates its folder if missing.

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


def sort_header(file: Path) -> None:
    """Sorts the metadata in the header of a safetensors file, which its writer leaves in random order.

    The same weights then give the same bytes.
    """
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # spaces at the end are part of the format
            stream.seek(8)
            stream.write(text.ljust(size))


def flush(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
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


def known_hash(file: Path) -> str:
    """:func:`file_hash`, computed once in this process as long as the file stays as it is."""
    about = file.stat()
    return _hash_once(file.absolute(), about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@lru_cache(maxsize=100_000)
def _hash_once(file: Path, *_: int) -> str:
    return file_hash(file)
