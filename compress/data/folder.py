"""A folder of images with their captions: in a metadata file, as ``imagefolder`` has it, or in a text file each."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.columns import find_columns, find_split, named_split
from compress.data.config import DataConfig
from compress.data.rows import dictionaries
from compress.errors import UserError, bad_value

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Captioned:
    """An image file.

    Attributes:
        file: Where it is, or where the metadata says that it is.
        name: Its path below the folder.
        text: Its caption, or None.
        split: What it belongs to, or None.
    """

    file: Path
    name: str
    text: str | None
    split: str | None


def image_folder(root: Path, config: DataConfig) -> list[Captioned]:
    """The images to train on, in the order of their names.

    Raises:
        UserError: There is no image or no caption at all, a metadata file cannot be read, or its columns or the splits
            cannot be told.
    """
    files = [file for file in _visible(root) if file.suffix.lower() in IMAGES]
    if not files:
        raise bad_value("data.path", config.path, "a folder of images, parquet files or tar files (webdataset)")
    tables = [file for file in _visible(root) if file.name.lower() in METADATA]
    found = _from_metadata(root, tables, config) if tables else _from_text_files(root, files, config)
    if tables:
        named = {entry.file for entry in found}
        rest = [file for file in files if file not in named]
        found += [Captioned(file, _name(root, file), None, _split(root, file, config)) for file in rest]
    elif not any(entry.text for entry in found):
        expected = (
            "captions beside the images: metadata.csv, .jsonl or .parquet with file_name and text, or a .txt file"
        )
        raise bad_value("data.path", config.path, expected)
    split = find_split(config, {entry.split for entry in found})
    chosen = found if split is None else [entry for entry in found if entry.split == split]
    return sorted(chosen, key=lambda entry: entry.name)


def _visible(root: Path) -> list[Path]:
    """All files except hidden ones and files in hidden folders."""
    every = (file for file in root.rglob("*") if not any(part.startswith(".") for part in file.relative_to(root).parts))
    return sorted(file for file in every if file.is_file())


def _from_text_files(root: Path, files: list[Path], config: DataConfig) -> list[Captioned]:
    found = []
    for file in files:
        beside = file.with_suffix(".txt")
        try:
            text = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.path={config.path}: {beside} cannot be read as UTF-8 text ({error})") from error
        found.append(Captioned(file, _name(root, file), text, _split(root, file, config)))
    return found


def _from_metadata(root: Path, tables: list[Path], config: DataConfig) -> list[Captioned]:
    found = []
    for table in tables:
        try:
            rows = list(_rows(table))
        except (OSError, ValueError) as error:
            raise UserError(f"data.path={config.path}: {table} cannot be read ({error})") from error
        if not rows or not isinstance(rows[0].get("file_name"), str):
            raise UserError(f"data.path={config.path}: {table}: expected a column file_name with the images' names")
        columns = _columns(rows, config)
        for row in rows:
            file = table.parent / str(row["file_name"])
            split = row.get(columns.split_column) if columns.split_column else _split(root, file, config)
            text = row.get(str(columns.text_column))
            found.append(Captioned(file, _name(root, file), text if isinstance(text, str) else None, split))
    return found


def _columns(rows: list[dict[str, Any]], config: DataConfig) -> DataConfig:
    """The config with the columns of a metadata file filled in; its image column is none of the file's."""
    import datasets

    text = [name for name in rows[0] if name != "file_name" and any(isinstance(row.get(name), str) for row in rows)]
    features = {"image": datasets.Image(), **{name: datasets.Value("string") for name in text}}
    return find_columns(config, features)


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    if table.suffix.lower() == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(table).to_pylist()
        return
    for line, row in dictionaries(table):
        if not isinstance(row, dict):
            raise ValueError(f"line {line} is no JSON object")
        yield row


def _name(root: Path, file: Path) -> str:
    return Path(os.path.relpath(file, root)).as_posix()  # a metadata file may name images elsewhere


def _split(root: Path, file: Path, config: DataConfig) -> str | None:
    return named_split(_name(root, file).split("/"), config)
