"""Which columns hold the images and the captions, and which rows are there to train on."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from compress.data.config import DataConfig
from compress.errors import UserError, bad_value

CAPTIONS = ("text", "caption", "prompt", "txt")  # names of columns that are taken before others, in this order
SPLIT = "split"
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")  # names of folders
ALL = "all"
NONE = "none"  # in place of a column of images


def is_image(feature: Any) -> bool:
    """Whether a column of this type may hold images: decoded by ``datasets``, or bytes with or without a path."""
    import datasets

    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def is_text(feature: Any) -> bool:
    """Whether a column of this type holds strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string", "string_view")


def find_columns(config: DataConfig, features: dict[str, Any]) -> DataConfig:
    """The config with its columns filled in: the named columns, or the only possible ones.

    Args:
        config: Its ``None`` columns are looked for.
        features: Name and type of every column, in ``datasets``' terms.

    Raises:
        UserError: Columns are missing or ambiguous; one message for all, with the existing columns.
    """
    features = {name: feature for name, feature in features.items() if not name.startswith("__")}  # of WebDataset
    split = config.split_column
    if split is None and config.train_split != ALL and is_text(features.get(SPLIT)):
        split = SPLIT
    images = [name for name, feature in features.items() if is_image(feature)]
    texts = [name for name, feature in features.items() if is_text(feature) and name != split]
    named = [name for name in CAPTIONS if name in texts]
    found = {
        "image_column": _one(config.image_column, images, ["image"] if "image" in images else []),
        "text_column": _one(config.text_column, texts, named),
    }
    wrong = []
    for key, possible, what in (("image_column", images, "images"), ("text_column", texts, "captions")):
        given, name = getattr(config, key), found[key]
        if name is None or name not in (*possible, *[NONE] * (key == "image_column")):
            shown = "null" if given is None else given
            wrong.append(f"data.{key}={shown}: expected the column of {what}{_choice(possible)}")
    if split is not None and split not in features:
        wrong.append(f"data.split_column={split}: expected a column, or null for none")
    if wrong:
        there = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
        raise UserError(f"data.path={config.path}: {'; '.join(wrong)}. Its columns: {there or 'none'}")
    return replace(config, image_column=found["image_column"], text_column=found["text_column"], split_column=split)


def looks_inside(config: DataConfig, features: dict[str, Any]) -> bool:
    """Whether columns of the columns count too, as ``json.caption``: one of them is named, or no other holds text."""
    nested = [name for name, feature in features.items() if isinstance(feature, dict) and not is_image(feature)]
    named = [name.partition(".")[0] for name in (config.text_column, config.split_column) if name]
    texts = [name for name, feature in features.items() if is_text(feature) and not name.startswith("__")]
    return any(name in nested for name in named) or bool(nested and not texts)


def find_split(config: DataConfig, there: Iterable[str | None]) -> str | None:
    """The split to train on: the one named, ``train`` where there is one, None for all rows.

    Args:
        config: ``train_split`` names one, or is None or ``all``.
        there: Splits of the rows, None of those that belong to none.

    Raises:
        UserError: There is no such split, or splits of which none is called ``train``.
    """
    names = {name for name in there if name is not None}
    wanted = config.train_split or "train"
    if wanted == ALL or (not names and wanted == "train"):
        return None
    if wanted not in names:
        shown = "null" if config.train_split is None else wanted
        known = f"a split that has rows: {', '.join(sorted(names))}, or all"
        raise bad_value("data.train_split", shown, known if names else "null or all: this data has no splits")
    return wanted


def named_split(parts: Sequence[str], config: DataConfig) -> str | None:
    """The split that the folders a file lies in, or the beginning of its name, stand for: as the hub names files.

    Args:
        parts: Of the file's path below the data's folder: ``["train", "0.png"]``, ``["data", "train-00000.parquet"]``.
        config: ``train_split`` may name a folder that has another name than the usual ones.
    """
    known = (*SPLITS, config.train_split)
    stem = parts[-1].partition(".")[0].partition("-")[0] if parts[-1].endswith(".parquet") else None
    return next((part for part in (*parts[:-1], stem) if part is not None and part in known), None)


def _one(given: str | None, possible: list[str], preferred: list[str]) -> str | None:
    if given is not None:
        return given
    return preferred[0] if preferred else possible[0] if len(possible) == 1 else None


def _choice(possible: list[str]) -> str:
    return f", one of {', '.join(possible)}" if possible else ", but there is none"


def _kind(feature: Any) -> str:
    return "image" if is_image(feature) else "text" if is_text(feature) else str(getattr(feature, "dtype", "nested"))
