"""Measures how good the embedded default is, and makes a sheet of its images to look at."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.assets import resolve
from compress.evaluate.config import EvaluateConfig
from compress.evaluate.networks.clip import Clip, load_clip
from compress.evaluate.sample import sample, to_pil
from tools.emoji.autoencoder import held_out_psnr
from tools.emoji.clip import embed_images, embed_text, found_among
from tools.emoji.images import load_images

CURVES = {
    "autoencoder": "build/emoji/autoencoder/curve.json",
    "emoji-clip, captions": "build/emoji/clip/text_training/curve.json",
    "emoji-clip, images": "build/emoji/clip/vision_training/curve.json",
    "teacher": "build/emoji/teacher/curve.json",
}


@dataclass(frozen=True)
class BarsConfig:
    """What is measured.

    Attributes:
        images: The parquet file of images.
        pipeline: The teacher.
        clip: ``emoji-clip``.
        samples: Captions of each split that the teacher draws.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale.
        seed: Of the choice of captions, and of the first image's noise.
        curves: Names and files of the trainings' curves, drawn where they are there.
    """

    images: str = "embedded:emoji/emoji.parquet"
    pipeline: str = "embedded:emoji/pipeline"
    clip: str = "embedded:emoji/clip"
    samples: int = 200
    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    curves: dict[str, str] = field(default_factory=lambda: dict(CURVES))


def measure_bars(config: BarsConfig, out: Path) -> dict[str, Any]:
    """Returns all figures and writes ``out / "sheet.png"``: 64 samples of training captions, and of held-out pairs.

    Retrieval figures are shares of images that are nearest to their own caption among 200 of the same style.
    """
    from diffusers import StableDiffusionPipeline

    out.mkdir(parents=True, exist_ok=True)
    images, rows = load_images(config.images)
    pipeline = StableDiffusionPipeline.from_pretrained(resolve(config.pipeline), torch_dtype=torch.float32)
    clip = load_clip(config.clip)
    held = torch.tensor([row["split"] != "train" for row in rows])
    figures: dict[str, Any] = {"autoencoder_held_out_psnr": held_out_psnr(pipeline.vae, images[held])}
    texts = _texts(clip, [row["text"] for row in rows])
    real = _images(clip, images)
    for split in ("train", "held_out_pair", "held_out_concept"):
        figures[f"emoji_clip_{split}"] = found_among(real, texts, rows, split)
    settings = EvaluateConfig(steps=config.steps, guidance=config.guidance)
    for split in ("train", "held_out_pair"):
        asked = _choice(rows, split, config)
        seeds = [config.seed + i for i in range(len(asked))]
        drawn = sample(pipeline, [rows[i]["text"] for i in asked], seeds, settings)
        generated = real.clone()
        generated[asked] = _images(clip, drawn)
        mine = [{**row, "split": "asked" if i in set(asked) else "other"} for i, row in enumerate(rows)]
        figures[f"real_found_{split}"] = found_among(real, texts, mine, "asked")
        figures[f"teacher_found_{split}"] = found_among(generated, texts, mine, "asked")
        _sheet(drawn[:64], [rows[i]["text"] for i in asked[:64]], out / f"sheet_{split}.png")
    _draw_curves({name: Path(file) for name, file in config.curves.items() if Path(file).exists()}, out / "curves.png")
    return figures


def _choice(rows: list[dict[str, Any]], split: str, config: BarsConfig) -> list[int]:
    there = [i for i, row in enumerate(rows) if row["split"] == split]
    order = torch.randperm(len(there), generator=torch.Generator().manual_seed(config.seed))
    return [there[i] for i in order[: config.samples].tolist()]


@torch.no_grad()
def _images(clip: Clip, images: torch.Tensor) -> torch.Tensor:
    parts = []
    for batch in images.split(256):
        seen = clip.processor(images=list(batch.numpy()), return_tensors="pt", input_data_format="channels_first")
        parts.append(embed_images(clip.model, seen["pixel_values"]))
    return torch.cat(parts)


@torch.no_grad()
def _texts(clip: Clip, captions: list[str]) -> torch.Tensor:
    tokens = clip.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return embed_text(clip.model, tokens.input_ids)


def _draw_curves(files: dict[str, Path], target: Path) -> None:
    """One panel a training: loss over steps on a logarithmic scale."""
    from matplotlib.figure import Figure

    if not files:
        return
    figure = Figure(figsize=(4 * len(files), 3))
    for place, (name, file) in enumerate(files.items()):
        points = json.loads(file.read_text())["curves"]["loss"]
        axes = figure.add_subplot(1, len(files), place + 1)
        axes.plot(*zip(*points, strict=True))
        axes.set(title=name, xlabel="step", yscale="log")
        if place == 0:
            axes.set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(target, dpi=70)


def _sheet(images: torch.Tensor, captions: list[str], file: Path) -> None:
    """Images in rows of eight with their captions below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 2.15 * -(-len(captions) // 8)))
    for place, (image, text) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(-(-len(captions) // 8), 8, place + 1)
        axes.imshow(to_pil(image))
        axes.set_title(text.removesuffix(" emoji"), fontsize=7)
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(file, dpi=80)
