"""The rows of data as a ``datasets.Dataset``: of local files or of the hub."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.columns import ALL, NONE, find_columns, find_split, looks_inside
from compress.data.config import DataConfig
from compress.data.source import find, is_local, read_table
from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    import datasets

IN_MEMORY = 2 * 1024**3  # bytes of parquet up to which tables are held in memory and nothing is cached on disk


def rows_of(config: DataConfig, cache: Path | None) -> tuple["datasets.Dataset", list[str]]:
    """The rows to train on, with the columns ``image`` (encoded) and ``text``, and what messages call each of them.

    Of prompts without images there is the column ``text`` alone.
    """
    import datasets

    if not is_local(config):
        rows, config = _from_hub(config, hub_builder(config))
    else:
        source = find(config)
        config = source.config
        if source.texts:
            return datasets.Dataset.from_dict({"text": source.texts}), [f"row {i}" for i in range(len(source.texts))]
        if source.shards:
            rows, config = _from_shards(config, source.shards, cache)
        if source.images:
            found = {"image": [str(i.file) for i in source.images], "text": [i.text for i in source.images]}
            features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
            rows = datasets.Dataset.from_dict(found, features)
            rows = rows.select_columns("text") if config.image_column == NONE else rows
            return rows, [image.name for image in source.images]
        if source.parquet:
            rows = _from_parquet(source.parquet, config)
    places: list[int] = list(range(len(rows)))
    if config.split_column is not None and config.train_split != ALL:
        splits = list(rows.with_format(None)[config.split_column])
        places = [index for index, split in enumerate(splits) if split == config.train_split]
        rows = rows.select(places, keep_in_memory=True)
    if not len(rows):
        raise bad_value("data.path", config.path, "at least one row to train on")
    names = {config.image_column: "image", config.text_column: "text"}
    names.pop(NONE, None)
    rows = rows.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})
    if "image" not in rows.column_names:
        return rows, [f"row {index}" for index in places]
    return rows.cast_column("image", datasets.Image(decode=False)), [f"row {index}" for index in places]


def _from_parquet(files: list[Path], config: DataConfig) -> "datasets.Dataset":
    import datasets

    named = (config.image_column, config.text_column, config.split_column)
    columns = [name for name in named if name not in (None, NONE)]
    if sum(file.stat().st_size for file in files) > IN_MEMORY:
        return datasets.Dataset.from_parquet([str(file) for file in files], columns=columns)
    tables = [datasets.table.InMemoryTable(read_table(file, columns, config)) for file in files]
    return datasets.concatenate_datasets([datasets.Dataset(table) for table in tables])


def hub_builder(config: DataConfig) -> "datasets.DatasetBuilder":
    """What knows a data set of the hub, of which nothing is downloaded yet.

    Raises:
        UserError: There is no such data set.
    """
    import datasets

    try:
        with quiet():
            return datasets.load_dataset_builder(config.path, revision=config.revision)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # the hub's errors are OSErrors
        raise UserError(
            f"data.path={config.path}: neither a local file or folder nor a dataset of the hub ({error})"
        ) from error


def _from_shards(config: DataConfig, files: list[Path], cache: Path | None) -> tuple["datasets.Dataset", DataConfig]:
    """Reads tar files into a cache that is mapped to memory: tar files have no index."""
    import datasets

    folder = None if cache is None else str(cache / "shards")
    names = {"train": [str(file) for file in files]}
    try:
        with quiet():
            builder = datasets.load_dataset_builder("webdataset", data_files=names, cache_dir=folder)
        return _from_hub(config, builder)
    except (UserError, tarfile.TarError):
        for file in files:
            _check_tar(file, config)
        raise


def _check_tar(file: Path, config: DataConfig) -> None:
    """Reads the headers of a tar file, to its end.

    Raises:
        UserError: It is damaged.
    """
    try:
        with tarfile.open(file) as opened:
            opened.getmembers()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"data.path={config.path}: {file} cannot be read as a tar file ({error})") from error


def _from_hub(config: DataConfig, builder: "datasets.DatasetBuilder") -> tuple["datasets.Dataset", DataConfig]:
    import datasets

    try:
        builder.download_and_prepare()
        there = list(builder.info.splits or {})
        split = find_split(config, there) if len(there) > 1 else None
        rows = builder.as_dataset(split=split or ALL)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data.path={config.path}: {error}") from error
    if looks_inside(config, rows.features):
        rows = rows.flatten()
    config = find_columns(config if len(there) < 2 else replace(config, train_split=ALL), rows.features)
    found: list[Any] = []
    if config.split_column is not None and config.train_split != ALL:
        found = rows.with_format(None).unique(config.split_column)
    return rows, replace(config, train_split=find_split(config, found) or ALL)


@contextmanager
def quiet() -> Iterator[None]:
    """Turns the progress bars of ``datasets`` off; ours say what they are for."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
