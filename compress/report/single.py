"""The page, the CSV and the LaTeX of one run, from its ``report.json`` and images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.report.best import with_best
from compress.report.figures import losses
from compress.report.formats import Cell, Table, csv_text, latex
from compress.report.page import Content, render
from compress.report.pareto import fronts
from compress.report.pictures import gather
from compress.report.stages import change
from compress.report.table import lines, notes, plain_rows, rows, tables
from compress.report.verdict import verdict
from compress.system.files import write_text
from compress.system.progress import duration


def write_page(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes ``report.html``, ``report.csv`` and ``report.tex`` beside ``report.json``.

    Args:
        folder: The run's folder, with ``images/`` and perhaps ``config.yaml``.
        report: What stands in ``report.json``.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    content = page_content(folder, report)
    write_text(folder / "report.html", render(content))
    write_text(folder / "report.csv", csv_text(*plain_rows(report)))
    write_text(folder / "report.tex", latex(content.all_tables(), f"{content.title}, {folder}", content.notes))


def page_content(folder: Path, report: Mapping[str, Any]) -> Content:
    """What the page of a run shows."""
    found = lines(report)
    config = folder / "config.yaml"
    grid = report.get("grid") or []
    return Content(
        title=str(report.get("recipe", "Report")),
        lead=verdict(report),
        facts=_facts(folder, report),
        tables=[with_best(table, found) for table in tables(found)],
        fronts=fronts(found),
        pictures=gather([(name, folder, name) for name, _ in rows(report)], [str(cell["prompt"]) for cell in grid]),
        curves={f"Losses of {stage['name']}": c for stage in report.get("stages", []) if (c := losses(stage))},
        failures=refusals(report),
        stages=_stages(report),
        notes=notes(report),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def _facts(folder: Path, report: Mapping[str, Any]) -> list[tuple[str, str]]:
    stages = report.get("stages", [])
    machine = {name: value for name, value in (report.get("environment") or {}).items() if value is not None}
    cached = sum(bool(stage.get("cached")) for stage in stages)
    facts = {
        "Seed": report.get("seed"),
        "Time": duration(report["seconds"]) if report.get("seconds") else None,
        "Stages": f"{len(stages)}, {cached} from the store" if stages else None,
        "Folder": str(folder),
        "Machine": ", ".join(f"{name} {value}" for name, value in machine.items()),
        "Versions": ", ".join(f"{name} {value}" for name, value in (report.get("versions") or {}).items()),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def refusals(report: Mapping[str, Any]) -> Table | None:
    """The alternatives that could not run, and why."""
    found = tuple((name, (Cell(why),)) for name, why in (report.get("refused") or {}).items())
    return Table("Not run", ("alternative", "why"), found, text=True) if found else None


def _stages(report: Mapping[str, Any]) -> Table | None:
    body = []
    for stage in report.get("stages", []):
        seconds = stage.get("seconds")
        took = duration(seconds) if seconds is not None else "time unknown"
        text = f"{took}, from the store" if stage.get("cached") else took
        texts = (f"{stage.get('kind')}={stage.get('method')}", change(stage))
        body.append((stage["name"], (Cell(text, number=seconds), *(Cell(t) for t in texts))))
    headings = ("stage", "time", "method", "what it changed")
    return Table("Stages", headings, tuple(body), text=True) if body else None
