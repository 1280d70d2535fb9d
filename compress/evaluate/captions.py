"""Captions of images on disk, from a csv or jsonl file with ``file_name`` and ``text``."""

from collections.abc import Sequence
from pathlib import Path

from compress.data.rows import rows
from compress.errors import UserError, bad_value

COLUMNS = ("file_name", "text")
FORMATS = "a csv file with the columns file_name and text, or a jsonl file with these keys in every line"


def read_captions(path: str, names: Sequence[str], key: str = "captions") -> list[str]:
    """The caption of every image, in the order of the images.

    Args:
        path: The file. It may also hold captions of other images.
        names: Image files relative to their folder, with ``/`` as separator.
        key: The config key of ``path``, for messages.

    Raises:
        UserError: The file is missing or unreadable, lacks a column, or has no caption or two for an image.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise bad_value(key, path, f"an existing file: {FORMATS}")
    found: dict[str, str] = {}
    try:
        for line, (name, text) in rows(file, COLUMNS):
            name = name.removeprefix("./")
            if found.get(name, text) != text:
                raise UserError(f"{key}={path}: line {line} gives a second caption for {name}; one is expected")
            found[name] = text
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={file}: cannot be read ({error}); expected {FORMATS}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{key}={path}: {len(missing)} of {len(names)} images have no caption: {some(missing)}; "
            f"file_name is relative to the folder of images, and the file has {some(list(found)) or 'none'}"
        )
    return [found[name] for name in names]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, with ``...`` if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
