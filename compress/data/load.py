"""Images with captions: from a parquet file, a folder or the hub, by ``datasets``."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.assets import PREFIX, resolve
from compress.data.columns import ALL, NONE, find_columns, find_split, named_split
from compress.data.folder import Captioned, image_folder
from compress.data.framing import Framing
from compress.data.rows import rows
from compress.errors import UserError, bad_value
from compress.system.files import known_hash

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
IN_MEMORY = 2 * 1024**3  # bytes of parquet up to which tables are held in memory and nothing is cached on disk
ON_ERROR = ("stop", "skip")
TEXTS = (".txt", ".csv", ".jsonl")  # files of prompts without images


@dataclass(frozen=True)
class DataConfig:
    """Where images and captions are. What is None is found where it is unambiguous.

    Attributes:
        path: A parquet file, a folder of parquet files, a folder of images with ``metadata.csv``, ``.jsonl`` or
            ``.parquet`` (the ``imagefolder`` of ``datasets``) or with a ``.txt`` file beside each image, a ``.tar``
            file or a folder of them (WebDataset), or a hub id; prompts without images in a ``.txt`` (one a line),
            ``.csv`` or ``.jsonl`` file. ``embedded:`` means inside the package.
        revision: Branch, tag or commit of a hub id; None is the newest.
        image_column: Column of images; None: the one of that type; ``none``: the captions are used without images.
        text_column: Column of captions; None: ``text``, ``caption``, ``prompt`` or ``txt``, or the only column of text.
            A dot separates the keys of nested columns: ``json.caption``.
        split_column: Column that says which split a row belongs to; None: ``split`` where there is one.
        train_split: The split to train on, of ``split_column``, of the hub or by the folders' names; None: ``train``
            where there are splits; ``all``: all rows.
        reference: Safetensors file of the real images' Inception features, None to compute them from the training
            images, or ``auto``: the file that belongs to the embedded data, None for other data.
        on_error: What becomes of an image that cannot be read or has no caption: ``stop`` refuses the data, ``skip``
            leaves the image out and counts it.
        resize: See :class:`compress.data.framing.Framing`, as ``crop`` and ``flip``; they concern training alone.
        crop: See ``resize``.
        flip: See ``resize``.
        prompts: A ``.txt``, ``.csv`` or ``.jsonl`` file of prompts for methods that train on the teacher's own samples;
            None: the captions.
        styles: Each prompt for such samples is put into each of these, in the place of ``{}``: ``a {} in flat style``;
            empty: prompts as they are.
    """

    path: str
    revision: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    split_column: str | None = None
    train_split: str | None = None
    reference: str | None = "auto"
    on_error: str = "stop"
    resize: int | None = None
    crop: str = "center"
    flip: bool = False
    prompts: str | None = None
    styles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values without the data.

        Raises:
            UserError: Images and captions are to come from one column, or a value is unknown or out of range.
        """
        self.framing  # noqa: B018 - checks its values
        for style in self.styles:
            if "{}" not in style:
                raise bad_value("styles", style, "texts with {} in the place of the prompt")
        if self.text_column is not None and self.text_column == self.image_column:
            raise bad_value("text_column", self.text_column, "another column than image_column")
        if self.on_error not in ON_ERROR:
            raise bad_value("on_error", self.on_error, " or ".join(ON_ERROR))

    @property
    def reference_file(self) -> str | None:
        """The file that ``reference`` stands for."""
        if self.reference == "auto":
            return resolve(f"{PREFIX}emoji/inception.safetensors") if self.is_embedded else None
        return None if self.reference is None else resolve(self.reference)

    @property
    def framing(self) -> Framing:
        """How images are brought to the model's size for training."""
        return Framing(self.resize, self.crop, self.flip)

    @property
    def is_embedded(self) -> bool:
        """Whether the data is the package's."""
        return self.path.startswith(PREFIX)


@dataclass(frozen=True)
class Data:
    """Loaded data.

    Attributes:
        train: Rows to train on, with the columns ``image`` (decoded on access) and ``text``.
        text: The captions of ``train``, in its order.
        fingerprint: Hash of everything that decides the content of ``train``.
        reference: Path of the real images' Inception features, or None.
        skipped: How many rows were left out since they cannot be used.
        framing: How images are brought to the model's size for training.
        prompts: Prompts that a teacher may sample from; empty: the captions.
    """

    train: "datasets.Dataset"
    text: list[str]
    fingerprint: str
    reference: str | None
    skipped: int = 0
    framing: Framing = field(default_factory=Framing)
    prompts: list[str] = field(default_factory=list)

    @property
    def has_images(self) -> bool:
        """Whether there are images, not prompts alone."""
        return "image" in self.train.column_names


@dataclass(frozen=True)
class Verified:
    """The result of decoding every image.

    Attributes:
        examples: Images with captions that can be used.
        problems: Name of each one that cannot, and why.
    """

    examples: int
    problems: dict[str, str]


@dataclass(frozen=True)
class _Source:
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


def check(config: DataConfig) -> None:
    """Checks that the data exists and has its columns, without reading images; of a hub id only the form.

    Raises:
        UserError: Naming the key (``data.path``, ...), its value and what would be right.
    """
    if _local(config):
        _find(config)
    _prompts(config)
    if config.reference_file is not None and not Path(config.reference_file).is_file():
        raise bad_value("data.reference", config.reference, "an existing safetensors file, or null for none")


def has_images(config: DataConfig) -> bool:
    """Whether data has images, not prompts alone."""
    return config.image_column != NONE and not config.path.endswith(TEXTS)


def verify(config: DataConfig, cache: Path | None = None) -> Verified | None:
    """Decodes every image of local data, so that one that cannot be read is found before anything is computed.

    Args:
        config: The embedded data and data of the hub are not looked into.
        cache: Folder where the result is kept, so that the same files are not decoded twice; None keeps nothing.

    Returns:
        What was found; None for data that is not looked into.

    Raises:
        UserError: ``on_error`` is ``stop`` and an image cannot be used, or none can.
    """
    if config.is_embedded or not _local(config):
        return None
    with _quiet():
        rows, names = _rows(config, cache)
        if "image" not in rows.column_names:
            return None
        found = _verified(rows, names, config, None if cache is None else cache / f"{fingerprint(config)}.json")
    if found.problems and config.on_error == "stop":
        raise _unusable(config, found)
    return found


def fingerprint(config: DataConfig) -> str:
    """Hash of the training data's files and of the settings that choose rows and columns from them.

    A hub id counts with the commit it stands for, so this may ask the hub (or its cache, when offline).
    """
    if _local(config):
        source = _find(config)
        config, path = source.config, Path(resolve(config.path))
        if source.images:
            listed = [[found.name, found.text, _hash(found.file)] for found in source.images]
            content = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        else:
            content = content_hash(path, source.parquet or source.shards or [path])
    else:
        builder = _hub_builder(config)
        content = f"{config.path}@{builder.hash}"
        if builder.info.features:
            config = find_columns(config, builder.info.features)
    choice: list[Any] = [config.image_column, config.text_column, config.split_column, config.train_split]
    if (more := _more(config)) != _more(DataConfig(config.path)):
        choice.append(more)
    return hashlib.sha256(json.dumps([content, choice]).encode()).hexdigest()


def _more(config: DataConfig) -> dict[str, Any]:
    """What decides the training examples besides the rows."""
    prompts = None if config.prompts is None else known_hash(Path(config.prompts).expanduser())
    return {**asdict(config.framing), "prompts": prompts, "styles": list(config.styles)}


def load_data(config: DataConfig, cache: Path | None = None) -> Data:
    """Loads captions and still encoded images; nothing is decoded but to skip what cannot be, and nothing local cached.

    Args:
        config: See :class:`DataConfig`.
        cache: See :func:`verify`.

    Raises:
        UserError: The hub id cannot be loaded, columns are missing, or there is no row to train on.
    """
    import datasets

    key, skipped = fingerprint(config), 0
    with _quiet():
        rows, names = _rows(config, cache)
        text = list(rows.with_format(None)["text"])
        problems = _without_caption(names, text)
        if config.on_error == "skip" and not config.is_embedded and "image" in rows.column_names:
            problems = _verified(rows, names, config, None if cache is None else cache / f"{key}.json").problems
            kept = [index for index, name in enumerate(names) if name not in problems]
            rows, text, skipped = rows.select(kept, keep_in_memory=True), [text[index] for index in kept], len(problems)
        elif problems:
            raise _unusable(config, Verified(len(text) - len(problems), problems))
        if "image" in rows.column_names:
            rows = rows.cast_column("image", datasets.Image())
    return Data(
        train=rows, text=text, fingerprint=key, reference=config.reference_file, skipped=skipped,
        framing=config.framing, prompts=_prompts(config, text),
    )  # fmt: skip


def _prompts(config: DataConfig, captions: Iterable[str] = ()) -> list[str]:
    """The prompts to sample from, each in each style; empty where they are the captions themselves.

    Raises:
        UserError: The file cannot be read or is empty.
    """
    if config.prompts is None:
        found = list(dict.fromkeys(captions)) if config.styles else []
    else:
        found = _read_texts(Path(config.prompts).expanduser(), "data.prompts", config.prompts)
    return [style.replace("{}", text) for text in found for style in config.styles or ("{}",)]


def _read_texts(file: Path, key: str, value: str, column: str = "text") -> list[str]:
    """The lines of a .txt file, or a column of a csv or jsonl file."""
    try:
        if file.suffix.lower() == ".txt":
            found = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        else:
            found = [text for _, (text,) in rows(file, [column])]
    except (OSError, ValueError) as error:
        expected = f"a .txt file with a prompt in each line, or a .csv or .jsonl file with the column {column}"
        raise bad_value(key, value, f"{expected} ({error})") from error
    if not found:
        raise bad_value(key, value, "a file with at least one prompt")
    return found


def content_hash(path: Path, files: list[Path] | None = None) -> str:
    """SHA-256 over the names and contents of a folder's files (or of some of them), or over one file."""
    if path.is_file():
        return known_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if files is None else files
    hashes = [[file.relative_to(path).as_posix(), known_hash(file)] for file in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _hash(file: Path) -> str | None:
    return known_hash(file) if file.is_file() else None


def _local(config: DataConfig) -> bool:
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


def _find(config: DataConfig) -> _Source:
    """Finds the columns and the split of local data without reading an image."""
    import datasets

    path = Path(resolve(config.path)).expanduser()
    if path.suffix in TEXTS and path.is_file():
        column = config.text_column or "text"
        found = replace(config, image_column=NONE, text_column=column, split_column=None, train_split=ALL)
        return _Source(found, texts=_read_texts(path, "data.path", config.path, column))
    files = [path] if path.is_file() else [f for f in sorted(path.rglob("*.parquet")) if f.stem != "metadata"]
    shards = [file for file in files if file.suffix == ".tar"] or ([] if files else sorted(path.rglob("*.tar")))
    if shards:
        return _shards(config, path, shards)
    if not files:
        images = image_folder(path, config)
        if not images:
            raise bad_value("data.path", config.path, "at least one image to train on")
        found = replace(config, image_column="image", text_column="text", split_column=None, train_split=ALL)
        return _Source(found, images=images)
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
            there |= set(_table(file, [config.split_column], config)[0].unique().to_pylist())
    return _Source(replace(config, train_split=find_split(config, there) or ALL), files)


def _shards(config: DataConfig, path: Path, files: list[Path]) -> _Source:
    """Tar files, those of the wanted split where folders or names say which they belong to."""
    splits = [named_split(file.relative_to(path).parts, config) for file in files] if path.is_dir() else [None]
    if any(splits):
        split = find_split(config, splits)
        files = [file for file, name in zip(files, splits, strict=True) if split in (None, name)]
    return _Source(replace(config, train_split=ALL), shards=files)


def _schema(file: Path, config: DataConfig) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"data.path={config.path}: {file} cannot be read as parquet ({error})") from error


def _table(file: Path, columns: list[str], config: DataConfig) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file, columns=columns)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"data.path={config.path}: {file} cannot be read as parquet ({error})") from error


def _rows(config: DataConfig, cache: Path | None) -> tuple["datasets.Dataset", list[str]]:
    """The rows to train on, with the columns ``image`` (encoded) and ``text``, and what messages call each of them.

    Of prompts without images there is the column ``text`` alone.
    """
    import datasets

    if not _local(config):
        rows, config = _from_hub(config, _hub_builder(config))
    else:
        source = _find(config)
        config = source.config
        if source.texts:
            return datasets.Dataset.from_dict({"text": source.texts}), [f"row {i}" for i in range(len(source.texts))]
        if source.shards:
            rows, config = _from_hub(config, _shard_builder(config, source.shards, cache))
        if source.images:
            found = {"image": [str(i.file) for i in source.images], "text": [i.text for i in source.images]}
            features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
            return datasets.Dataset.from_dict(found, features), [image.name for image in source.images]
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
    tables = [datasets.table.InMemoryTable(_table(file, columns, config)) for file in files]
    return datasets.concatenate_datasets([datasets.Dataset(table) for table in tables])


def _hub_builder(config: DataConfig) -> "datasets.DatasetBuilder":
    import datasets

    try:
        with _quiet():
            return datasets.load_dataset_builder(config.path, revision=config.revision)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # the hub's errors are OSErrors
        raise UserError(
            f"data.path={config.path}: neither a local file or folder nor a dataset of the hub ({error})"
        ) from error


def _shard_builder(config: DataConfig, files: list[Path], cache: Path | None) -> "datasets.DatasetBuilder":
    """Reads tar files into a cache that is mapped to memory: tar files have no index."""
    import datasets

    folder = None if cache is None else str(cache / "shards")
    names = {"train": [str(file) for file in files]}
    with _quiet():
        return datasets.load_dataset_builder("webdataset", data_files=names, cache_dir=folder)


def _from_hub(config: DataConfig, builder: "datasets.DatasetBuilder") -> tuple["datasets.Dataset", DataConfig]:
    import datasets

    try:
        builder.download_and_prepare()
        there = list(builder.info.splits or {})
        split = find_split(config, there) if len(there) > 1 else None
        rows = builder.as_dataset(split=split or ALL)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data.path={config.path}: {error}") from error
    nested = [name for name, feature in rows.features.items() if isinstance(feature, dict)]
    if any(name.partition(".")[0] in nested for name in (config.text_column, config.split_column) if name):
        rows = rows.flatten()
    config = find_columns(config if len(there) < 2 else replace(config, train_split=ALL), rows.features)
    found: list[Any] = []
    if config.split_column is not None and config.train_split != ALL:
        found = rows.with_format(None).unique(config.split_column)
    return rows, replace(config, train_split=find_split(config, found) or ALL)


def _verified(rows: "datasets.Dataset", names: list[str], config: DataConfig, cache: Path | None) -> Verified:
    """Decodes every image, or reads the cached result."""
    import PIL

    from compress.data.decode import unreadable
    from compress.system.files import replace_with

    of = {"pillow": PIL.__version__, "rows": len(rows)}
    if cache is not None and cache.is_file():
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known.pop("of", None) == of:
            return Verified(**known)
    problems = _without_caption(names, rows.with_format(None)["text"])
    problems |= {names[index]: why for index, why in unreadable(rows).items()}
    found = Verified(len(rows) - len(problems), problems)
    if not found.examples:
        raise _unusable(config, found)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replace_with(cache) as beside:
            beside.write_text(json.dumps({"of": of, **asdict(found)}), encoding="utf-8")
    return found


def _without_caption(names: Iterable[str], captions: Iterable[Any]) -> dict[str, str]:
    return {name: "no caption" for name, text in zip(names, captions, strict=True) if not isinstance(text, str)}


def _unusable(config: DataConfig, found: Verified) -> UserError:
    shown = "; ".join(f"{name}: {why}" for name, why in list(found.problems.items())[:3])
    more = "; ..." if len(found.problems) > 3 else ""
    remedy = "repair them or take them away" + (", or set data.on_error=skip" if found.examples else "")
    total = found.examples + len(found.problems)
    return UserError(
        f"data.path={config.path}: {len(found.problems)} of {total} images cannot be used ({shown}{more}): {remedy}"
    )


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
