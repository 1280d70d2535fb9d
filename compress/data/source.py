"""The files, columns and rows of local data, found without reading an image."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.assets import resolve
from compress.data.columns import ALL, NONE, find_columns, find_split, named_split
from compress.data.config import DataConfig
from compress.data.folder import Captioned, image_folder
from compress.data.rows import rows
from compress.errors import UserError, bad_value

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TEXTS = (".txt", ".csv", ".jsonl")  # files of prompts without images


@dataclass(frozen=True)
class Source:
    """Local data with its columns and rows found.

    Attributes:
        config: With its columns and its split filled in; ``train_split`` is ``all`` where all rows count.
        parquet: Files of rows.
        images: Image files with their captions.
        shards: Tar files.
        texts: Prompts without images.
    """

    config: DataConfig
    parquet: list[Path] = field(default_factory=list)
    images: list[Captioned] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def is_local(config: DataConfig) -> bool:
    """Whether the data is on this machine.

    Raises:
        UserError: The path does not exist and is not a hub id.
    """
    path = Path(resolve(config.path)).expanduser()
    if path.is_dir() or path.suffix in (".parquet", ".tar", *TEXTS) and path.is_file():
        return True
    if path.exists() or not HUB_ID.fullmatch(config.path):
        expected = "an existing folder, a .parquet, .tar, .txt, .csv or .jsonl file, or a hub id (owner/name)"
        raise bad_value("data.path", config.path, expected)
    return False


def find(config: DataConfig) -> Source:
    """Finds the columns and the split of local data without reading an image."""
    import datasets

    path = Path(resolve(config.path)).expanduser()
    if path.suffix in TEXTS and path.is_file():
        column = config.text_column or "text"
        found = replace(config, image_column=NONE, text_column=column, split_column=None, train_split=ALL)
        return Source(found, texts=read_texts(path, "data.path", config.path, column))
    files = [path] if path.is_file() else [f for f in sorted(path.rglob("*.parquet")) if f.stem != "metadata"]
    shards = [file for file in files if file.suffix == ".tar"] or ([] if files else sorted(path.rglob("*.tar")))
    if shards:
        return _shards(config, path, shards)
    if not files:
        images = image_folder(path, config)
        if not images:
            raise bad_value("data.path", config.path, "at least one image to train on")
        column = NONE if config.image_column == NONE else "image"
        found = replace(config, image_column=column, text_column="text", split_column=None, train_split=ALL)
        return Source(found, images=images)
    splits = [named_split(file.relative_to(path).parts, config) for file in files] if path.is_dir() else [None]
    if any(splits):
        split = find_split(config, splits)
        files = [file for file, name in zip(files, splits, strict=True) if split in (None, name)]
        config = replace(config, train_split=ALL)
    try:
        features = datasets.Features.from_arrow_schema(_schema(files[0], config))
    except ValueError as error:
        raise UserError(f"data.path={config.path}: datasets cannot read the columns of {files[0]} ({error})") from error
    config = find_columns(config, features)
    named = (config.image_column, config.text_column, config.split_column)
    wanted = [name for name in named if name not in (None, NONE)]
    for file in files[1:]:
        if missing := [name for name in wanted if name not in (columns := _schema(file, config).names)]:
            raise UserError(
                f"data.path={config.path}: {file} has no column {' and no column '.join(missing)}, as {files[0].name} "
                f"has, but {', '.join(columns)}"
            )
    there: set[str | None] = set()
    if config.split_column is not None and config.train_split != ALL:
        for file in files:
            there |= set(read_table(file, [config.split_column], config)[0].unique().to_pylist())
    return Source(replace(config, train_split=find_split(config, there) or ALL), files)


def _shards(config: DataConfig, path: Path, files: list[Path]) -> Source:
    """Tar files, those of the wanted split where folders or names say which they belong to."""
    splits = [named_split(file.relative_to(path).parts, config) for file in files] if path.is_dir() else [None]
    if any(splits):
        split = find_split(config, splits)
        files = [file for file, name in zip(files, splits, strict=True) if split in (None, name)]
    return Source(replace(config, train_split=ALL), shards=files)


def _schema(file: Path, config: DataConfig) -> Any:
    return _parquet("read_schema", file, config)


def read_table(file: Path, columns: list[str], config: DataConfig) -> Any:
    """Columns of a parquet file as a table of ``pyarrow``.

    Raises:
        UserError: The file cannot be read.
    """
    return _parquet("read_table", file, config, columns=columns)


def _parquet(function: str, file: Path, config: DataConfig, **keys: Any) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return getattr(pyarrow.parquet, function)(file, **keys)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"data.path={config.path}: {file} cannot be read as parquet ({error})") from error


def read_texts(file: Path, key: str, value: str, column: str = "text") -> list[str]:
    """The lines of a .txt file, or a column of a csv or jsonl file."""
    expected = f"a .txt file with a prompt in each line, or a .csv or .jsonl file with the column {column}"
    if not file.is_file():
        raise bad_value(key, value, f"an existing file: {expected}")
    try:
        if file.suffix.lower() == ".txt":
            found = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        else:
            found = [text for _, (text,) in rows(file, [column])]
    except (OSError, ValueError) as error:
        raise bad_value(key, value, f"{expected} ({error})") from error
    if not found:
        raise bad_value(key, value, "a file with at least one prompt")
    return found
