"""The report of a run: table, images and numbers for people and for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.config.folders import REPORT
from compress.report.card import coverage_line, model_card, usage
from compress.report.footer import MARKS, counted, how_to_load
from compress.report.formats import markdown
from compress.report.single import refusals, write_page
from compress.report.stages import change, effort, layer_types
from compress.report.table import (
    markdown_notes,
    markdown_table,
    plain_rows,
    print_summary,
    rows,
    summary_table,
    wide_tables,
)
from compress.report.verdict import verdict
from compress.system.environment import environment, versions
from compress.system.files import replace_folder_with, write_text

__all__ = [
    "how_to_load",
    "markdown_table",
    "model_card",
    "plain_rows",
    "print_summary",
    "usage",
    "verdict",
    "warnings",
    "write_page",
    "write_report",
]


def write_report(
    folder: Path, result: Mapping[str, Any], grids: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Writes ``report.json``, ``report.md`` and ``images/``; each is replaced as a whole, never half written.

    ``images/`` holds ``grid.png``, ``size_quality.png``, ``losses.png`` (those with something to draw) and every grid
    image as ``<row>/<i>.png``, unscaled and lossless.

    Args:
        folder: The run's folder; made if absent.
        result: ``{"recipe", "teacher": {"cost", "metrics"}, "stages": [{"name", "kind", ..., "curves"}]}``;
            ``versions``, ``environment`` and ``settings`` are added where absent, and ``grid`` with the prompts and
            seeds of the images.
        grids: Row name to ``{"prompt", "seed", "image"}``, images as :func:`compress.report.images.pixels` takes
            them.

    Returns:
        What stands in ``report.json``: strict JSON, numbers that are not finite are None.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    full = {**result}
    full.setdefault("wall_seconds", result.get("seconds"))
    full.setdefault("versions", versions())
    full.setdefault("environment", environment())
    full.setdefault("settings", _settings(result))
    if shown := next(filter(None, grids.values()), None):
        full["grid"] = [{key: cell[key] for key in ("prompt", "seed")} for cell in shown]
    report = plain(full)
    links = _write_images(folder / "images", report, grids)
    write_text(folder / "report.md", _markdown(report, links))
    write_text(folder / REPORT, json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return report


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What makes a row's numbers misleading, such as images of one color; one sentence each."""
    return counted(rows(result))


def plain(value: Any) -> Any:
    """The value as strict JSON has it: None for NaN and infinity, text for paths, numbers for scalar arrays."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    return str(value)


def _settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """How the images of the metrics were made, as the first metric says."""
    names = ("n", "resolution", "scheduler", "steps", "guidance", "dtype", "seed", "batch_size")
    for entry in (result.get("teacher") or {}, *result.get("stages", [])):
        for metric in (entry.get("metrics") or {}).values():
            if isinstance(metric, Mapping):
                return {name: metric[name] for name in names if name in metric}
    return {}


def _write_images(
    images: Path, result: Mapping[str, Any], grids: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[tuple[str, str]]:
    """Draws everything beside ``images`` and swaps it in; returns titles and file names for the links."""
    links = []
    with replace_folder_with(images) as beside:
        beside.mkdir()
        _write_grids(beside, grids)
        if any(grids.values()):
            from compress.report.figures import draw_grid

            draw_grid(grids, beside / "grid.png")
            links.append(("Samples: the same prompts and seeds in every row", "grid.png"))
        if _drawable(result):
            from compress.report.figures import draw_losses, draw_size_quality

            if draw_size_quality(result, beside / "size_quality.png"):
                links.append(("Size against quality", "size_quality.png"))
            if draw_losses(result, beside / "losses.png"):
                links.append(("Losses", "losses.png"))
    return links


def _drawable(result: Mapping[str, Any]) -> bool:
    """Whether there may be anything to plot; without, matplotlib is not loaded."""
    stages = result.get("stages", [])
    return any(entry.get("metrics") or entry.get("curves") for entry in (result.get("teacher") or {}, *stages))


def _write_grids(folder: Path, grids: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for name, grid in grids.items():
        if grid:
            from PIL import Image

            from compress.report.images import file_name, pixels

            (folder / file_name(name)).mkdir()
            for index, entry in enumerate(grid):
                Image.fromarray(pixels(entry["image"])).save(folder / file_name(name) / f"{index}.png")


def _markdown(result: Mapping[str, Any], links: Sequence[tuple[str, str]]) -> str:
    stages = result.get("stages", [])
    parts = [f"# {result.get('recipe', 'Report')}\n"]
    if stages:
        parts.append(f"{verdict(result)}\n")
    summary = summary_table(result)
    parts.append(summary)
    marks = [text for sign, text in MARKS.items() if sign in summary]
    parts += [f"{'; '.join(marks)}.\n"] * bool(marks)
    if refused := refusals(result):
        parts += [f"## {refused.title}\n", markdown(refused)]
    parts += [f"## {title}\n\n![{title}](images/{file})\n" for title, file in links]
    parts += ["## All numbers\n", wide_tables(result)]
    parts += ["## What they mean and how they were measured\n", markdown_notes(result)]
    if stages:
        parts.append("## Stages\n")
        lines = []
        for stage in stages:
            method = f"={stage['method']}" if stage.get("method") else ""
            took = effort(stage) or "time unknown"
            origin = f"from the store (made in {took})" if stage.get("cached") else f"computed in {took}"
            coverage = coverage_line(stage.get("coverage") or {})
            lines.append(
                f"- **{stage['name']}** ({stage.get('kind')}{method}), {origin}{f'; {coverage}' if coverage else ''}"
            )
            if changed := change(stage):
                lines.append(f"  - {changed}")
            if stage.get("checkpoint"):
                lines.append(f"  - checkpoint: `{stage['checkpoint']}`")
        parts.append("\n".join(lines) + "\n")
    if by_type := layer_types(result):
        parts += ["## Layers by type\n", by_type]
    parts.append("## Run\n")
    wall = result.get("wall_seconds")
    facts = [f"- wall time: {wall:.0f} s"] if wall is not None else []
    machine = result["environment"]
    facts.append(
        "- machine: "
        + ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None and key != "python")
    )
    facts.append(f"- python {machine.get('python')}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()))
    parts.append("\n".join(facts) + "\n")
    return "\n".join(parts)
