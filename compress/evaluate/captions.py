"""Captions of pictures on disk, from a csv or jsonl file with ``file_name`` and ``text``."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compress.errors import UserError, bad_value

COLUMNS = ("file_name", "text")
FORMATS = "a csv file with the columns file_name and text, or a jsonl file with these keys in every line"


def read_captions(path: str, names: Sequence[str], key: str = "captions") -> list[str]:
    """The caption of every picture, in the order of the pictures.

    Args:
        path: The file. It may hold captions of further pictures.
        names: The pictures' files, relative to their folder, with ``/`` between folders.
        key: The config key of ``path``, for messages.

    Raises:
        UserError: The file is missing, cannot be read, lacks a column, or says nothing or two things of a picture.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise bad_value(key, path, f"an existing file: {FORMATS}")
    found: dict[str, str] = {}
    for line, name, text in _rows(file, key):
        if found.get(name, text) != text:
            raise UserError(f"{key}={path}: line {line} gives a second caption of {name}; one is expected")
        found[name] = text
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{key}={path}: {len(missing)} of {len(names)} pictures have no caption there: {some(missing)}; "
            f"file_name is relative to the folder of pictures, and the file has {some(list(found)) or 'none'}"
        )
    return [found[name] for name in names]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and that there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _rows(file: Path, key: str) -> Iterator[tuple[int, str, str]]:
    """Line number, file name and caption."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = _csv(stream) if file.suffix.lower() == ".csv" else _json(stream)
            for line, row in rows:
                values = [row.get(column) if isinstance(row, dict) else None for column in COLUMNS]
                for column, value in zip(COLUMNS, values, strict=True):
                    if not isinstance(value, str) or not value.strip():
                        raise UserError(f"{key}={file}: line {line} has no {column}; expected {FORMATS}")
                yield line, str(values[0]).removeprefix("./"), str(values[1])
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{key}={file}: cannot be read ({error}); expected {FORMATS}") from error


def _csv(stream: Any) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(stream)
    lacking = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(
            f"no column {' and no column '.join(lacking)}, but {', '.join(reader.fieldnames or ['nothing'])}"
        )
    for row in reader:
        yield reader.line_num, row


def _json(stream: Any) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(stream, 1):
        if text.strip():
            try:
                yield line, json.loads(text)
            except ValueError as error:
                raise ValueError(f"line {line}: {error}") from error
