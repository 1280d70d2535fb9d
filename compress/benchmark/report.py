"""The files that a benchmark leaves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.benchmark.figures import draw_plots
from compress.benchmark.table import markdown, verdict
from compress.files import replace_with
from compress.report import environment, plain

if TYPE_CHECKING:
    import torch

SHOWN = 6  # pictures of each row in the sheet


def write_report(folder: Path, result: Mapping[str, Any], pictures: Mapping[str, "torch.Tensor"]) -> None:
    """Writes ``benchmark.json``, ``report.md`` and ``images/`` with both plots and a sheet of the rows' pictures.

    Args:
        folder: An existing folder.
        result: What :func:`compress.benchmark.benchmark` returns.
        pictures: Each measured row's, uint8, ``(n, 3, height, width)``.
    """
    images = folder / "images"
    images.mkdir(exist_ok=True)
    full = {**result, "environment": environment()}
    plots = draw_plots(result, images)
    _draw_sheet(pictures, result["prompts"], images / "pictures.png")
    titles = {**plots, "pictures.png": f"The first {SHOWN} prompts and seeds in every row"}
    parts = [f"# Benchmark of {result['model']['path']}\n", f"**{verdict(result)}**\n", markdown(result)]
    if result["code"]:
        parts.append(f"## The best row in diffusers\n\n```python\n{result['code']}```\n")
    parts += [f"## {title}\n\n![{title}](images/{name})\n" for name, title in titles.items()]
    machine = ", ".join(f"{key} {value}" for key, value in full["environment"].items() if value is not None)
    parts.append(f"## Run\n\n- wall time: {result['seconds']:.0f} s\n- machine: {machine}\n")
    with replace_with(folder / "report.md") as file:
        file.write_text("\n".join(parts), encoding="utf-8")
    with replace_with(folder / "benchmark.json") as file:
        file.write_text(json.dumps(plain(full), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def _draw_sheet(pictures: Mapping[str, "torch.Tensor"], prompts: Sequence[str], file: Path) -> None:
    from compress.report.figures import draw_grid

    grids = {
        name: [{"prompt": prompt, "image": picture} for prompt, picture in zip(prompts, found[:SHOWN], strict=False)]
        for name, found in pictures.items()
    }
    draw_grid(grids, file)
