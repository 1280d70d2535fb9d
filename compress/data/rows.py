"""Rows of a csv file with a heading or of a jsonl file."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and texts of every row; lines end where a file's lines end, not at other breaks in a text.

    Args:
        file: csv by its ending, anything else jsonl; UTF-8, with a byte order mark or without.
        columns: The columns of a csv file, or keys of each line, that are wanted.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not what its ending says, lacks a column, or a row has no text in one.
    """
    for line, row in dictionaries(file, columns):
        values = [row.get(column) if isinstance(row, dict) else None for column in columns]
        for column, value in zip(columns, values, strict=True):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"line {line} has no {column}")
        yield line, [str(value) for value in values]


def dictionaries(file: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, Any]]:
    """Line number and content of every row: a dictionary, in a jsonl file possibly another value of JSON.

    Args:
        file: See :func:`rows`.
        columns: Those that a csv file must have.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not what its ending says, or lacks a column.
    """
    with file.open(encoding="utf-8-sig", newline="") as stream:
        yield from _csv(stream, columns) if file.suffix.lower() == ".csv" else _json(stream)


def _csv(stream: Any, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(stream)
    try:
        lacking = [column for column in columns if column not in (reader.fieldnames or ())]
        if lacking:
            there = ", ".join(reader.fieldnames or ["nothing"])
            raise ValueError(f"no column {' and no column '.join(lacking)}, but {there}")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def _json(stream: Any) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(stream, 1):
        if text.strip():
            try:
                yield line, json.loads(text)
            except ValueError as error:
                raise ValueError(f"line {line}: {error}") from error
