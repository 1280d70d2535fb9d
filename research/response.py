"""How each metric answers to damage of growing strength: ``python research/response.py``.

Takes real emoji that are not in the reference and blurs them, adds noise, turns their hue, gives them each other's
captions, or keeps fewer and fewer kinds of them. Prints a Markdown table for each: a row for every metric, its value
with the 95 % interval at every strength, and whether it moved the right way. Exits 1 where one did not. About five
minutes on two cores; ``--images`` takes fewer or more.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from compress.data import Data, DataConfig, load_data
from compress.evaluate.config import EvaluateConfig
from compress.evaluate.intervals import difference
from compress.evaluate.networks import Network, Networks
from compress.evaluate.quality import score_images
from compress.evaluate.reference import DataImages, data_reference
from compress.jobs.score.report import described

SIZE = (64, 64)
FURTHER = ("fid", "fid_teacher", "kid", "cmmd")  # rise as images get worse; all others fall
STYLES = ("noto", "fluent", "twemoji")


class Remembering:
    """A network that looks at each image once in its life."""

    def __init__(self, network: Network) -> None:
        self.network, self.known = network, dict[bytes, Tensor]()
        self.name, self.sha256, self.preprocessing = network.name, network.sha256, network.preprocessing

    def __call__(self, images: Tensor) -> Tensor:
        """See :class:`compress.evaluate.networks.Network`."""
        keys = [image.numpy().tobytes() for image in images]
        new = [index for index, key in enumerate(keys) if key not in self.known]
        if new:
            self.known |= dict(zip([keys[index] for index in new], self.network(images[new]), strict=True))
        return torch.stack([self.known[key] for key in keys])


def edited(images: Tensor, edit: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Images after an edit of Pillow's."""
    shown = [edit(Image.fromarray(image.permute(1, 2, 0).numpy())).convert("RGB") for image in images]
    return torch.from_numpy(np.stack([np.asarray(one) for one in shown])).permute(0, 3, 1, 2).contiguous()


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; sigma in pixels."""
    return edited(images, lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))


def noisy(images: Tensor, sigma: float) -> Tensor:
    """Gaussian noise; sigma in levels of 255."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * noise).round().clamp(0, 255).byte()


def turned(images: Tensor, degrees: float) -> Tensor:
    """Hue turned on the color circle."""

    def turn(image: Image.Image) -> Image.Image:
        hue, saturation, value = image.convert("HSV").split()
        return Image.merge("HSV", (hue.point(lambda h: (h + round(degrees / 360 * 256)) % 256), saturation, value))

    return edited(images, turn)


def rows_without(data: Data, reference: Sequence[int], wanted: Callable[[str], bool], n: int) -> list[int]:
    """Some rows in random order whose captions are wanted, outside the reference."""
    used = set(reference)
    order = torch.randperm(len(data.text), generator=torch.Generator().manual_seed(1)).tolist()
    return [index for index in order if index not in used and wanted(data.text[index])][:n]


def table(
    title: str, strengths: Sequence[str], results: Sequence[dict[str, Any]], still: Sequence[str] = ()
) -> tuple[str, bool]:
    """A Markdown table of results at growing strengths, and whether all metrics moved the right way.

    Args:
        title: What was done.
        strengths: How much, ``results`` belonging to each.
        results: Of :func:`compress.evaluate.quality.score_images`; the first of undamaged images.
        still: Metrics that must not move.
    """
    lines = [
        f"**{title}**",
        "",
        f"| metric | {' | '.join(strengths)} | moved |",
        "|---|" + "---:|" * len(strengths) + "---|",
    ]
    right = True
    for name in results[0]:
        found = [result[name] for result in results]
        if any(metric is None for metric in found[1:]):
            continue
        heading, digits, better = described(name, found[-1]["network"])
        cells = ["–" if metric is None else _cell(metric, digits) for metric in found]
        word, ok = _moved([metric for metric in found if metric is not None], name, name in still)
        right = right and ok
        lines.append(f"| {heading} {better} | {' | '.join(cells)} | {word} |")
    return "\n".join(lines) + "\n", right


def _cell(metric: dict[str, Any], digits: int) -> str:
    ends = "" if metric["low"] is None else f" [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"
    return f"{metric['value']:.{digits}f}{ends}"


def _moved(found: Sequence[dict[str, Any]], name: str, still: bool) -> tuple[str, bool]:
    """How a metric moved from the first to the last strength, in words, and whether that is right."""
    sign = 1 if name in FURTHER else -1
    values = [sign * metric["value"] for metric in found]
    if still:
        same = max(values) - min(values) <= 1e-9
        return ("not at all, rightly" if same else "**wrongly**"), same
    steady = all(b > a for a, b in zip(values, values[1:], strict=False))
    known = all(metric["low"] is not None for metric in (found[0], found[-1]))
    beyond = not known or values[-1] - values[0] > difference(found[0], found[-1])
    way = "up" if sign > 0 else "down"
    if values[-1] <= values[0]:
        return "**the wrong way**", False
    return f"{way}{' at every step' if steady else ''}{'' if beyond else ', within the noise'}", True


def main() -> int:
    """Prints all tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=128, help="images scored at each strength")
    n = parser.parse_args().images
    embedded = "embedded:emoji/emoji.parquet"
    data = load_data(DataConfig(embedded, split_column="split", reference="embedded:emoji/inception.safetensors"))
    config = EvaluateConfig()
    networks = Networks(config)
    networks.inception = Remembering(networks.inception)
    reference = data_reference(data, config, SIZE, networks)
    indices = _reference_rows(data)

    def scored(images: Tensor, rows: list[int], captions: list[int] | None = None, **more: Any) -> dict[str, Any]:
        texts = [data.text[index] for index in captions or rows]
        return score_images(images, config, networks, reference=reference, captions=texts, **more)

    rows = rows_without(data, indices, lambda text: True, n)
    clean = DataImages(data, rows, SIZE)[:]
    features: dict[str, Tensor] = {}
    start = scored(clean, rows, keep=features)
    pairs = {"teacher": clean, "teacher_features": features}
    ok = []
    for title, damage, strengths, unit in (
        ("Blur", blurred, (0.5, 1, 2), "{} px"),
        ("Noise", noisy, (8, 16, 32), "{} levels"),
        ("Color: hue turned", turned, (20, 60, 120), "{}°"),
    ):
        results = [scored(damage(clean, strength), rows, **pairs) for strength in strengths]
        ok.append(_print(table(title, ["none", *(unit.format(one) for one in strengths)], [start, *results])))

    results = []
    for share in (0.25, 0.5, 1.0):
        moved = round(share * n)
        results.append(scored(clean, rows, [*rows[1:moved], rows[0], *rows[moved:]] if moved else rows))
    still = [name for name in start if name not in ("clip_score", "r_at_1", "r_at_5")]
    ok.append(_print(table("Captions exchanged", ["none", "25 %", "50 %", "all"], [start, *results], still)))
    ok.append(_print(_modes(data, indices, start, scored, n)))
    return 0 if all(ok) else 1


def _modes(
    data: Data, reference: Sequence[int], start: dict[str, Any], scored: Callable[..., dict[str, Any]], n: int
) -> tuple[str, bool]:
    """Fewer and fewer kinds of images: two styles of three, one, and eight images again and again."""
    results = []
    for styles, distinct in ((2, n), (1, n), (1, 8)):
        endings = tuple(f"{style} emoji" for style in STYLES[:styles])
        rows = rows_without(data, reference, partial(_ends_with, endings), distinct)
        rows = (rows * (n // len(rows) + 1))[:n]
        found = scored(DataImages(data, rows, SIZE)[:], rows)
        # Captions and each image's own realism have nothing to do with what is missing.
        results.append({name: found[name] for name in ("fid", "kid", "cmmd", "recall")})
    begun = {name: start[name] for name in results[0]}
    return table("Kinds dropped", ["none", "one style of three", "two styles", "all but 8 images"], [begun, *results])


def _ends_with(endings: tuple[str, ...], text: str) -> bool:
    return text.endswith(endings)


def _reference_rows(data: Data) -> list[int]:
    """The rows behind the embedded reference."""
    from safetensors import safe_open

    assert data.reference is not None
    with safe_open(Path(data.reference), "pt") as file:
        return file.get_tensor("indices").tolist()


def _print(made: tuple[str, bool]) -> bool:
    print(made[0], flush=True)
    return made[1]


if __name__ == "__main__":
    sys.exit(main())
