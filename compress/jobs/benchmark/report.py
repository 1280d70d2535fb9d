"""Writes the files of a benchmark."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.jobs.benchmark.figures import draw_plots
from compress.jobs.benchmark.table import markdown, verdict
from compress.report import plain
from compress.system.environment import environment
from compress.system.files import write_text

if TYPE_CHECKING:
    import torch

SHOWN = 6  # images per row in the sheet


def write_report(folder: Path, result: Mapping[str, Any], images: Mapping[str, "torch.Tensor"]) -> None:
    """Writes ``benchmark.json``, ``report.md`` and ``images/`` with both plots and a sheet of the rows' images.

    Args:
        folder: An existing folder.
        result: Result of :func:`compress.jobs.benchmark.benchmark`.
        images: Images of each measured row, uint8, ``(n, 3, height, width)``.
    """
    place = folder / "images"
    place.mkdir(exist_ok=True)
    full = {**result, "environment": environment()}
    plots = draw_plots(result, place)
    _draw_sheet(images, result["prompts"], place / "images.png")
    titles = {**plots, "images.png": f"The first {SHOWN} prompts and seeds in every row"}
    parts = [f"# Benchmark of {result['model']['path']}\n", f"**{verdict(result)}**\n", markdown(result)]
    if result["code"]:
        parts.append(f"## The best row in diffusers\n\n```python\n{result['code']}```\n")
    parts += [f"## {title}\n\n![{title}](images/{name})\n" for name, title in titles.items()]
    machine = ", ".join(f"{key} {value}" for key, value in full["environment"].items() if value is not None)
    parts.append(f"## Run\n\n- wall time: {result['seconds']:.0f} s\n- machine: {machine}\n")
    write_text(folder / "report.md", "\n".join(parts))
    text = json.dumps(plain(full), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(folder / "benchmark.json", text + "\n")


def _draw_sheet(images: Mapping[str, "torch.Tensor"], prompts: Sequence[str], file: Path) -> None:
    from compress.report.figures import draw_grid

    grids = {
        name: [{"prompt": prompt, "image": image} for prompt, image in zip(prompts, found[:SHOWN], strict=False)]
        for name, found in images.items()
    }
    draw_grid(grids, file)
