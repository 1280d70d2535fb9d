"""Images with captions: from a parquet file, a folder or the hub, by ``datasets``."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.assets import resolve
from compress.data.columns import NONE, find_columns, looks_inside
from compress.data.config import DataConfig
from compress.data.dataset import hub_builder, quiet, rows_of
from compress.data.framing import Framing
from compress.data.source import TEXTS, find, is_local, read_texts
from compress.errors import UserError, bad_value
from compress.system.files import known_hash

if TYPE_CHECKING:
    import datasets


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


def check(config: DataConfig) -> None:
    """Checks that the data exists and has its columns, without reading images; of a hub id only the form.

    Raises:
        UserError: Naming the key (``data.path``, ...), its value and what would be right.
    """
    if is_local(config):
        find(config)
    _prompts(config)
    if config.reference_file is not None and not Path(config.reference_file).is_file():
        raise bad_value("data.reference", config.reference, "an existing safetensors file, or null for none")


def has_images(config: DataConfig) -> bool:
    """Whether data has images, not prompts alone."""
    return config.image_column != NONE and not config.path.endswith(TEXTS)


def verify(config: DataConfig, cache: Path | None = None) -> Verified | None:
    """Decodes every image of local data and looks for its caption, so that what is missing is found at once.

    Args:
        config: The embedded data and data of the hub are not looked into.
        cache: Folder where the result is kept, so that the same files are not decoded twice; None keeps nothing.

    Returns:
        What was found; None for data that is not looked into, and for captions without images.

    Raises:
        UserError: ``on_error`` is ``stop`` and an image cannot be used, or none can.
    """
    if config.is_embedded or not is_local(config):
        return None
    with quiet():
        rows, names = rows_of(config, cache)
        found = _verified(rows, names, config, None if cache is None else cache / f"{fingerprint(config)}.json")
    if found.problems and config.on_error == "stop":
        raise _unusable(config, found)
    return found if "image" in rows.column_names else None


def fingerprint(config: DataConfig) -> str:
    """Hash of the training data's files and of the settings that choose rows and columns from them.

    A hub id counts with the commit it stands for, so this may ask the hub (or its cache, when offline).
    """
    if is_local(config):
        source = find(config)
        config, path = source.config, Path(resolve(config.path)).expanduser()
        if source.images:
            listed = [[found.name, found.text, _hash(found.file)] for found in source.images]
            content = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        else:
            content = content_hash(path, source.parquet or source.shards or [path])
    else:
        builder = hub_builder(config)
        content = f"{config.path}@{builder.hash}"
        if builder.info.features:
            features = builder.info.features
            config = find_columns(config, features.flatten() if looks_inside(config, features) else features)
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
    with quiet():
        rows, names = rows_of(config, cache)
        text = list(rows.with_format(None)["text"])
        problems = _without_caption(names, text)
        if config.on_error == "skip" and not config.is_embedded:
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
        found = read_texts(Path(config.prompts).expanduser(), "data.prompts", config.prompts)
    return [style.replace("{}", text) for text in found for style in config.styles or ("{}",)]


def content_hash(path: Path, files: list[Path] | None = None) -> str:
    """SHA-256 over the names and contents of a folder's files (or of some of them), or over one file."""
    if path.is_file():
        return known_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if files is None else files
    hashes = [[file.relative_to(path).as_posix(), known_hash(file)] for file in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _hash(file: Path) -> str | None:
    return known_hash(file) if file.is_file() else None


def _verified(rows: "datasets.Dataset", names: list[str], config: DataConfig, cache: Path | None) -> Verified:
    """Looks for every caption and decodes every image, or reads the cached result."""
    import PIL

    from compress.data.decode import unreadable
    from compress.system.files import replace_with

    of = {"pillow": PIL.__version__, "rows": len(rows)}
    if cache is not None and cache.is_file():
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known.pop("of", None) == of:
            return Verified(**known)
    problems = _without_caption(names, rows.with_format(None)["text"])
    if "image" in rows.column_names:
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
