"""Draws PSNR over bits a weight: mixed assignments, and one number of bits for all layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

APPLE_SDXL = [(3.08, 69.6), (4.41, 75.5), (6.55, 79.9), (8.0, 66.0)]
"""Bits and PSNR (dB, its own definition) that Apple published for palettes of SDXL: mixed, and 8 bits as written there,
https://huggingface.co/blog/stable-diffusion-xl-coreml."""


def draw_sizes(details: Mapping[str, Any], file: Path) -> None:
    """Draws a PNG.

    Args:
        details: Of a stage of method ``mixed_bits``.
        file: Where to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curve = sorted((row["bits"], row["psnr"]) for row in [*details["curve"], details])
    uniform = sorted((row["bits"], row["psnr"]) for row in details["uniform"])
    axes.plot(*zip(*curve, strict=True), "o-", label="bits by layer")
    axes.plot(*zip(*uniform, strict=True), "s--", label="the same bits for all")
    axes.plot(details["bits"], details["psnr"], "*", markersize=16, color="black", label="chosen")
    axes.plot(*zip(*APPLE_SDXL, strict=True), "x:", color="grey", label="Apple's SDXL (palettes; another PSNR)")
    axes.set(xlabel="bits a weight, with scales", ylabel="PSNR of the prediction (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png", dpi=120)
