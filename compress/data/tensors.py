"""Tensors with many rows, computed in parts: in memory, or in a safetensors file that may be larger than memory."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from mmap import ACCESS_COPY, ACCESS_WRITE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.system.files import flush, write_text

Rows = dict[str, Tensor]

# Names of safetensors' types.
_TYPES = {
    torch.int64: "I64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.float64: "F64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip

_NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python's mmap does not name in every version


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows.

    Attributes:
        rows: Name to a tensor ``(b, ...)``.
        stop: The row after the last one.
        fixed: Name to a tensor of the whole table; those of the first part are kept.
        metadata: Texts about the table, as ``fixed``.
    """

    rows: Rows
    stop: int
    fixed: Rows
    metadata: dict[str, str]


def filled(
    count: int, part: Callable[[int], Chunk], file: Path | None = None, of: str = ""
) -> tuple[Rows, dict[str, str]]:
    """Computes a table of ``count`` rows part by part.

    With a file every part is written when it is done. A call after a kill continues after the last one, so it must get
    the same parts. The finished file appears at once, under its name.

    Args:
        count: Number of rows, at least 1.
        part: From the first row of a part to the part.
        file: A safetensors file; None: the tensors are in memory.
        of: What the table is made of; an unfinished file of something else is not continued.

    Returns:
        Name to tensor, the fixed ones included, and the metadata.

    Raises:
        UserError: The parts do not fit each other, the folder cannot be written or the disk is full.
    """
    try:
        return _filled(count, part, file, of)
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error}; make room or choose another folder, then run it again"
        ) from error


def cached(
    count: int, part: Callable[[int], Chunk], file: Path | None = None, of: str = ""
) -> tuple[Rows, dict[str, str]]:
    """As :func:`filled`, but a finished file is read; a damaged one is computed again, after a warning."""
    if file is not None and file.exists():
        try:
            return read(file)
        except (ValueError, OSError) as error:
            warnings.warn(f"{file} is damaged ({error}); computing it again", RuntimeWarning, stacklevel=2)
    return filled(count, part, file, of)


def read(file: Path) -> tuple[Rows, dict[str, str]]:
    """The tensors of a file, mapped: a row is read when it is used, and processes share the memory.

    Safetensors itself reserves memory for the whole file, which is refused for one larger than memory.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged.
    """
    return _mapped(file), _header(file)[1]


def _filled(count: int, part: Callable[[int], Chunk], file: Path | None, of: str) -> tuple[Rows, dict[str, str]]:
    tensors: Rows = {}
    metadata: dict[str, str] = {}
    start = 0
    partial, progress = (None, None) if file is None else _beside(file)
    if partial is not None and progress is not None and (found := _unfinished(partial, progress, of)) is not None:
        start, metadata = found
        tensors = _mapped(partial, shared=True)
    while start < count:
        new = part(start)
        if not tensors:
            metadata = new.metadata
            shapes = {name: ((count, *rows.shape[1:]), rows.dtype) for name, rows in new.rows.items()}
            shapes |= {name: (tuple(value.shape), value.dtype) for name, value in new.fixed.items()}
            if partial is None:
                tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
            else:
                partial.parent.mkdir(parents=True, exist_ok=True)
                _allocate(partial, shapes, metadata)
                tensors = _mapped(partial, shared=True)
            for name, value in new.fixed.items():
                tensors[name].copy_(value)
        for name, rows in new.rows.items():
            place = tensors[name][start : new.stop]
            if place.shape != rows.shape:
                raise UserError(
                    f"the pipeline pads prompts to different lengths ({name}: {tuple(place.shape[1:])} and "
                    f"{tuple(rows.shape[1:])})"
                )
            place.copy_(rows)
        start = new.stop
        if partial is not None and progress is not None:
            flush(partial)
            write_text(progress, json.dumps({"of": of, "rows": start, "metadata": metadata}))
    if file is None or partial is None or progress is None:
        return tensors, metadata
    del tensors
    os.replace(partial, file)
    progress.unlink()
    flush(file.parent)
    return read(file)


def _beside(file: Path) -> tuple[Path, Path]:
    """The unfinished file, and what says how much of it is there."""
    return file.with_name(f".{file.name}.partial"), file.with_name(f".{file.name}.json")


def _unfinished(partial: Path, progress: Path, of: str) -> tuple[int, dict[str, str]] | None:
    """Finished rows and metadata of an earlier call; None if there are none."""
    try:
        found = json.loads(progress.read_text(encoding="utf-8"))
        read(partial)
        return (int(found["rows"]), dict(found["metadata"])) if found["of"] == of else None
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it is computed again
        return None


def _allocate(file: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str]) -> None:
    """Writes a safetensors file of zeros and takes its whole room on the disk, so that no later write lacks it.

    Raises:
        OSError: The disk is full.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    # Wide types first, so that each tensor starts at a multiple of its type's size.
    for name, (shape, dtype) in sorted(shapes.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    size = 8 + len(text) + end
    try:
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(size)
            stream.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OSError(f"{error} ({size / 2**30:.3g} GiB)") from error


def _header(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """The entries of a safetensors file, its metadata, and where its tensors begin.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        total = file.stat().st_size
        if 8 + size > total:
            raise ValueError("its header is cut off")
        entries = json.loads(stream.read(size))
    metadata = entries.pop("__metadata__", {})
    if max((entry["data_offsets"][1] for entry in entries.values()), default=0) + 8 + size != total:
        raise ValueError("its length is wrong")
    return entries, metadata, 8 + size


def _mapped(file: Path, shared: bool = False) -> Rows:
    """The tensors of a file; what is written to them is written to the file where they are shared."""
    entries, _, begin = _header(file)
    with file.open("r+b" if shared else "rb") as stream:
        pages = mmap(stream.fileno(), 0, access=ACCESS_WRITE) if shared else _private(stream.fileno())
    bytes_ = torch.frombuffer(pages, dtype=torch.uint8)
    dtypes = {name: dtype for dtype, name in _TYPES.items()}
    found = {}
    for name, entry in entries.items():
        start, stop = (begin + offset for offset in entry["data_offsets"])
        found[name] = bytes_[start:stop].view(dtypes[entry["dtype"]]).view(entry["shape"])
    return found


def _private(descriptor: int) -> mmap:
    """A file's pages, copied when they are written to; on Linux without reserving memory for the copies."""
    if not sys.platform.startswith("linux"):
        return mmap(descriptor, 0, access=ACCESS_COPY)
    return mmap(descriptor, 0, flags=MAP_PRIVATE | _NO_RESERVE, prot=PROT_READ | PROT_WRITE)
