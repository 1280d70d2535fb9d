"""Images with captions: from a parquet file, a folder or the hub, by ``datasets``."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.assets import resolve
from compress.errors import UserError, bad_value
from compress.system.files import file_hash

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
IN_MEMORY = 2 * 1024**3  # bytes of parquet up to which tables are held in memory and nothing is cached on disk


@dataclass(frozen=True)
class DataConfig:
    """Where images and captions are.

    Attributes:
        path: A parquet file, a folder of parquet files, a folder of images with ``metadata.csv``, ``.jsonl`` or
            ``.parquet`` (the ``imagefolder`` of ``datasets``), or a hub id; ``embedded:`` means inside the package.
        revision: Branch, tag or commit of a hub id; ``None`` is the newest.
        image_column: Column of images.
        text_column: Column of captions.
        split_column: Column that says which split a row belongs to; ``None`` where there is none.
        train_split: The rows to train on (``split_column``), else the split of a hub id or folder of images.
        reference: Safetensors file of the real images' Inception features, or ``None``.
    """

    path: str
    revision: str | None = None
    image_column: str = "image"
    text_column: str = "text"
    split_column: str | None = None
    train_split: str = "train"
    reference: str | None = None

    def __post_init__(self) -> None:
        """Checks what can be told without the data.

        Raises:
            UserError: Images and captions are to come from one column.
        """
        if self.text_column == self.image_column:
            raise bad_value("text_column", self.text_column, "another column than image_column")


@dataclass(frozen=True)
class Data:
    """Loaded data.

    Attributes:
        train: Rows to train on, with the columns ``image`` (decoded on access) and ``text``.
        text: The captions of ``train``, in its order.
        fingerprint: Hash of everything that decides the content of ``train``.
        reference: Path of the real images' Inception features, or ``None``.
    """

    train: "datasets.Dataset"
    text: list[str]
    fingerprint: str
    reference: str | None


def check(config: DataConfig) -> None:
    """Checks that the data is there and has its columns, without reading rows; a hub id is checked by form alone.

    Raises:
        UserError: Naming the key (``data.path``, ...), its value and what would be right.
    """
    path = Path(resolve(config.path))
    files = _parquet_files(path)
    if files:
        for file in files:
            _check_columns(file, config)
    elif path.is_dir():
        if not any(file.suffix.lower() in IMAGES for file in path.rglob("*")):
            raise bad_value("data.path", config.path, "a folder that holds parquet files or images")
        if not any(path.rglob("metadata.*")):
            raise bad_value("data.path", config.path, "a metadata.csv or metadata.jsonl with the captions beside them")
    elif path.exists() or not HUB_ID.fullmatch(config.path):
        raise bad_value("data.path", config.path, "an existing parquet file, a folder, or a hub id (owner/name)")
    if config.reference is not None and not Path(resolve(config.reference)).is_file():
        raise bad_value("data.reference", config.reference, "an existing safetensors file, or null for none")


def fingerprint(config: DataConfig) -> str:
    """Hash of the training data's files and of the settings that choose rows and columns from them.

    A hub id counts with the commit it stands for, so this may ask the hub (or its cache, when offline).
    """
    path = Path(resolve(config.path))
    content = content_hash(path) if path.exists() else f"{config.path}@{_hub_builder(config).hash}"
    choice = [config.image_column, config.text_column, config.split_column, config.train_split]
    return hashlib.sha256(json.dumps([content, choice]).encode()).hexdigest()


def load_data(config: DataConfig) -> Data:
    """Loads captions and still encoded images; nothing is decoded and local data is cached nowhere.

    Raises:
        UserError: A hub id that cannot be had, columns that are missing, or no row to train on.
    """
    import datasets

    with _quiet():
        path = Path(resolve(config.path))
        files = _parquet_files(path)
        if files:
            rows = _from_parquet(files, config)
        elif path.exists():
            rows = _from_folder(path, config)
        else:
            rows = _from_hub(config)
        rows = _select(rows, config)
        if not isinstance(rows.features["image"], datasets.Image):
            rows = rows.cast_column("image", datasets.Image())
        try:
            rows[0]["image"].load()  # the first alone: whether the column holds images at all
        except (OSError, TypeError, ValueError, AttributeError) as error:
            raise bad_value("data.image_column", config.image_column, f"a column of images ({error})") from error
    text = list(rows.with_format(None)["text"])
    empty = sum(not isinstance(caption, str) for caption in text)
    if empty:
        raise bad_value("data.text_column", config.text_column, f"text in every row, but {empty} rows have none")
    reference = None if config.reference is None else resolve(config.reference)
    return Data(train=rows, text=text, fingerprint=fingerprint(config), reference=reference)


def content_hash(path: Path) -> str:
    """SHA-256 over the names and contents of a folder's files, or over one file."""
    if path.is_file():
        return file_hash(path)
    hashes = [[file.relative_to(path).as_posix(), file_hash(file)] for file in _files(path)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _parquet_files(path: Path) -> list[Path]:
    """The parquet file or the folder's parquet files; ``metadata.parquet`` belongs to a folder of images."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return [file for file in sorted(path.rglob("*.parquet")) if file.stem != "metadata"] if path.is_dir() else []


def _wanted(config: DataConfig) -> dict[str, str]:
    """Config key to column name, of the columns that have to be there."""
    keys = ("image_column", "text_column", "split_column")
    return {key: column for key in keys if (column := getattr(config, key)) is not None}


def _check_columns(file: Path, config: DataConfig) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(file).names
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"data.path={config.path}: {file} cannot be read as parquet ({error})") from error
    for key, column in _wanted(config).items():
        if column not in columns:
            raise bad_value(f"data.{key}", column, f"one of the columns of {file.name}: {', '.join(columns)}")


def _from_parquet(files: list[Path], config: DataConfig) -> "datasets.Dataset":
    import datasets
    import pyarrow
    import pyarrow.parquet

    columns = list(dict.fromkeys(_wanted(config).values()))
    try:
        if sum(file.stat().st_size for file in files) > IN_MEMORY:
            return datasets.Dataset.from_parquet([str(file) for file in files], columns=columns)
        tables = [pyarrow.parquet.read_table(file, columns=columns) for file in files]
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"data.path={config.path}: cannot be read as parquet ({error})") from error
    return datasets.concatenate_datasets([datasets.Dataset(datasets.table.InMemoryTable(table)) for table in tables])


def _from_folder(path: Path, config: DataConfig) -> "datasets.Dataset":
    import datasets

    split = "all" if config.split_column else config.train_split
    with tempfile.TemporaryDirectory() as cache:  # only names and captions; the images stay where they are
        try:
            return datasets.load_dataset(
                "imagefolder", data_dir=str(path), split=split, cache_dir=cache, keep_in_memory=True
            )
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"data.path={config.path}: {error}") from error


def _hub_builder(config: DataConfig) -> "datasets.DatasetBuilder":
    import datasets

    try:
        with _quiet():
            return datasets.load_dataset_builder(config.path, revision=config.revision)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # the hub's errors are OSErrors
        raise UserError(
            f"data.path={config.path}: neither a local file or folder nor a dataset of the hub ({error})"
        ) from error


def _from_hub(config: DataConfig) -> "datasets.Dataset":
    import datasets

    builder = _hub_builder(config)
    try:
        builder.download_and_prepare()
        return builder.as_dataset(split="all" if config.split_column else config.train_split)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data.path={config.path}: {error}") from error


def _select(rows: "datasets.Dataset", config: DataConfig) -> "datasets.Dataset":
    """The rows to train on, with the columns ``image`` and ``text``."""
    for key, column in _wanted(config).items():
        if column not in rows.column_names:
            raise bad_value(f"data.{key}", column, f"one of the columns {', '.join(rows.column_names)}")
    if config.split_column is not None:
        splits = list(rows.with_format(None)[config.split_column])
        kept = [index for index, split in enumerate(splits) if split == config.train_split]
        if not kept:
            known = ", ".join(sorted({str(split) for split in splits}))
            raise bad_value("data.train_split", config.train_split, f"a split that has rows: {known}")
        rows = rows.select(kept, keep_in_memory=True)
    if not len(rows):
        raise bad_value("data.path", config.path, "at least one row to train on")
    rows = rows.select_columns([config.image_column, config.text_column])
    names = {config.image_column: "image", config.text_column: "text"}
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns the progress bars of ``datasets`` off; ours say what they are for."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
