"""Builds ``emoji.parquet``: images at 64 px with captions, from four npm packages.

Run again with ``python -m tools.emoji images``, which fetches the packages with ``npm pack``.
"""

import io
import json
import random
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from compress.assets import resolve

STYLES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
LABELS = "emojibase-data@17.0.0"

# Unicode's emoji groups that stay: smileys, people, animals and nature, food, travel, activities, objects.
# Components, symbols (mostly letters in boxes) and flags go.
GROUPS = (0, 1, 3, 4, 5, 6, 7)
# Images of Microsoft products or persons whose licence to reuse is not plain.
NOT_FLUENT = ("technologist", "paperclip", "linked paperclips", "video game")


@dataclass(frozen=True)
class ImagesConfig:
    """What goes into the parquet file.

    Attributes:
        packages: Folder where the npm packages are, or are put.
        size: Height and width of the images in pixels.
        held_out_pairs: Number of (style, concept) pairs kept from training; the concept is seen in other styles.
        held_out_concepts: Number of concepts kept from training in every style.
        seed: Seed of both choices.
    """

    packages: str = "build/npm"
    size: int = 64
    held_out_pairs: int = 200
    held_out_concepts: int = 40
    seed: int = 0


def caption(label: str, style: str) -> str:
    """The one form captions have: ``"hot dog, noto emoji"``."""
    return f"{label}, {style} emoji"


def build_images(config: ImagesConfig, out: Path) -> dict[str, int]:
    """Writes ``out / "emoji.parquet"`` and returns the number of images of every split.

    Columns: ``image`` (WebP bytes as ``datasets.Image`` stores them), ``text`` (the caption), ``concept``,
    ``style`` and ``split``, which is ``train``, ``held_out_pair`` or ``held_out_concept``.

    Args:
        config: See :class:`ImagesConfig`.
        out: The folder to write to.
    """
    import datasets

    folder = Path(config.packages)
    concepts = _concepts(_unpack(folder, LABELS))
    images = {
        (style, label): data
        for style, package in STYLES.items()
        for label, data in _images(style, _unpack(folder, package), concepts, config.size).items()
    }
    splits = _splits(sorted(images), config)
    rows = [
        {"image": {"bytes": images[key], "path": None}, "text": caption(key[1], key[0]),
         "concept": key[1], "style": key[0], "split": splits[key]}
        for key in sorted(images, key=lambda k: (k[1], k[0]))
    ]  # fmt: skip
    features = datasets.Features(
        {"image": datasets.Image(), **{n: datasets.Value("string") for n in ("text", "concept", "style", "split")}}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(out / "emoji.parquet"))
    return {name: sum(r["split"] == name for r in rows) for name in ("train", "held_out_pair", "held_out_concept")}


def _unpack(folder: Path, package: str) -> Path:
    name = package.removeprefix("@").replace("/", "-").replace("@", "-")
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True)
        with tarfile.open(folder / f"{name}.tgz") as tar:
            tar.extractall(target, filter="data")
    inner = target / "package"
    return inner if inner.exists() else target


def _concepts(package: Path) -> dict[str, str]:
    """Labels by lower-case code points, one entry a concept: no gendered or hair variant of a person, no clock."""
    entries = json.loads((package / "en" / "data.json").read_text())
    chosen = {}
    for entry in entries:
        label, code = entry["label"].lower().replace("“", "").replace("”", ""), entry["hexcode"].lower()
        person_variant = entry.get("group") == 1 and ("200d" in code or "gender" in entry)
        clock = label.endswith(("o’clock", "-thirty", "o'clock"))
        if entry.get("group") in GROUPS and not person_variant and not clock:
            chosen[code.replace("-fe0f", "")] = label
    return chosen


def _images(style: str, package: Path, concepts: dict[str, str], size: int) -> dict[str, bytes]:
    folder = (
        package / "assets" if style == "fluent" else package / "img" / {"noto": "google"}.get(style, "twitter") / "64"
    )
    files = {f.stem.lower().replace("-fe0f", ""): f for f in sorted(folder.iterdir())}
    return {
        label: _on_white(files[code], size, lossless=style != "fluent")
        for code, label in concepts.items()
        if code in files and not (style == "fluent" and label in NOT_FLUENT)
    }


def _on_white(path: Path, size: int, lossless: bool) -> bytes:
    """WebP bytes; Fluent's sources are lossy already and twice as large without loss."""
    from PIL import Image

    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    if flat.size != (size, size):
        flat = flat.resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    flat.save(buffer, "WEBP", lossless=lossless, quality=80 if lossless else 95, use_sharp_yuv=True, method=6)
    return buffer.getvalue()


def _splits(keys: list[tuple[str, str]], config: ImagesConfig) -> dict[tuple[str, str], str]:
    rng = random.Random(config.seed)
    complete = sorted({label for _, label in keys if all((s, label) in keys for s in STYLES)})
    held = rng.sample(complete, config.held_out_pairs + config.held_out_concepts)
    unseen = set(held[: config.held_out_concepts])
    styles = sorted(STYLES)
    pairs = {(styles[i % 3], label) for i, label in enumerate(held[config.held_out_concepts :])}
    return {
        key: "held_out_concept" if key[1] in unseen else "held_out_pair" if key in pairs else "train" for key in keys
    }


def load_images(path: str):
    """Reads the parquet file whole.

    Returns:
        A uint8 tensor ``(n, 3, size, size)`` and a list of the other columns as dictionaries.
    """
    import datasets
    import numpy as np
    import torch

    datasets.disable_progress_bars()
    table = datasets.load_dataset("parquet", data_files=resolve(path), split="train")
    images = np.stack([np.asarray(image.convert("RGB")) for image in table["image"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), table.remove_columns("image").to_list()
