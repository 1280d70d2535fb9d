"""One report of many runs: every run, means over seeds, fronts, pictures, stages, and what differs."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.config.folders import POINTS
from compress.report.best import Beyond, beyond_noise, with_best
from compress.report.figures import losses
from compress.report.footer import MARKS, NO_NEARER, NOISE, NOISE_FLOOR, PAIRED
from compress.report.formats import Cell, Table, csv_text, latex, markdown
from compress.report.page import Content, render
from compress.report.pareto import fronts
from compress.report.pictures import gather
from compress.report.runs import SEED, FailedRun, RunFolder, Student, aligned, differences, students
from compress.report.seeds import Seeds, Series, all_series, difference, difference_table, unmarked
from compress.report.table import Entry, Line, columns_of, notes_of, plain_lines, tables
from compress.system.files import write_text
from compress.system.progress import duration

WIDE = 8  # differing keys that are columns; more are rows, unless the runs are even more


def write_many(
    out: Path, title: str, runs: Sequence[RunFolder], failed: Sequence[FailedRun]
) -> tuple[tuple[list[str], list[list[Any]]], Content]:
    """Writes ``report.html``, ``report.md``, ``report.csv``, ``report.tex`` and ``points.json``.

    Args:
        out: The folder; made if absent.
        title: Of the page.
        runs: Those that finished.
        failed: Those that did not.

    Returns:
        Headings and rows of the CSV, and what the page shows.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = students(runs)
    series = all_series(found)
    content = many_content(title, runs, failed, found, series)
    headings, rows = _plain(found)
    write_text(out / "report.html", render(content))
    write_text(out / "report.md", _markdown(content))
    write_text(out / "report.csv", csv_text(headings, rows))
    write_text(out / "report.tex", latex(content.all_tables(), f"{title}, {out}", content.notes))
    write_text(out / POINTS, json.dumps(_points(content, runs, failed, found, series), indent=1) + "\n")
    return (headings, rows), content


def many_content(
    title: str,
    runs: Sequence[RunFolder],
    failed: Sequence[FailedRun],
    found: Sequence[Student],
    series: Sequence[Series],
) -> Content:
    """What the page of many runs shows."""
    repeated = any(len(one.students) > 1 for one in series)
    each, means = _of_each(found), _of_means(series)
    one_teacher = len({_measured_as(student.run, None) for student in found}) < 2
    beyond: Beyond = Seeds(series).beyond if repeated else beyond_noise
    if not one_teacher:
        beyond = _but_paired(beyond)
    shown = [with_best(table, means, beyond) for table in tables(means, "point")]
    if repeated:
        shown = [_renamed(unmarked(table), f"{table.title}, mean over seeds", _of_seeds(series)) for table in shown]
        shown += _paired(series, one_teacher)
    first = _one_seed(series)
    return Content(
        title=title,
        lead=_lead(runs, failed, series, repeated),
        facts=_facts(runs),
        tables=[table for table in shown if len(table.headings) > 1],
        each=[_renamed(table, f"{table.title} of every run", EACH) for table in tables(each, "run")]
        if repeated
        else (),
        failures=_failures(failed),
        fronts=fronts(means, paired=one_teacher),
        pictures=gather(*_pictures(first)),
        curves=_curves(first),
        stages=_stages(runs),
        differences=_differences(runs),
        notes=[
            *[TEACHERS] * (not one_teacher),
            *_notes(runs, means, marked=not repeated),
            *_seed_note(first, repeated),
        ],
    )


MIXED = "The runs were not all measured by one protocol: compare rows of the same evaluate.protocol alone."
TEACHERS = (
    "The runs have several teachers, or one that was sampled in several ways; each row is held against its own. "
    "What is measured from a teacher's images, such as PSNR and SSIM, cannot be compared between such rows."
)
MEANS = (
    "[low, high] is the 95 % interval of the mean over seeds, by Student's t (of times on a logarithmic scale); of a "
    "single seed, its own."
)
EACH = f"[low, high] of a metric: the 95 % interval over images. {MARKS[NOISE]}; {MARKS[NO_NEARER]}."


def _but_paired(beyond: Beyond) -> Beyond:
    """The same, but no difference counts in what is measured from a teacher's images."""
    return lambda column, ours, theirs: not column.paired and beyond(column, ours, theirs)


def _of_seeds(series: Sequence[Series]) -> str:
    """What the intervals of means are, and which means are of fewer seeds."""
    most = max(len(one.students) for one in series)
    fewer = [f"{one.line.name}: {len(one.students)}" for one in series if len(one.students) < most]
    return MEANS + f" Of fewer than {most} seeds: {'; '.join(fewer)}." * bool(fewer)


def _notes(runs: Sequence[RunFolder], means: Sequence[Line], marked: bool) -> list[str]:
    manifests = [manifest for run in runs if (manifest := run.report.get("manifest"))]
    if len({(manifest["protocol"], manifest["version"]) for manifest in manifests}) > 1:
        return [MIXED, *notes_of(means, None, marked)]
    changed = list(dict.fromkeys(key for manifest in manifests for key in manifest.get("changed") or ()))
    return notes_of(means, {**manifests[0], "changed": changed} if manifests else None, marked)


def _renamed(table: Table, title: str, note: str = "") -> Table:
    return Table(title, table.headings, table.rows, table.text, note)


def _with_teachers(found: Sequence[tuple[Line, RunFolder, Any]]) -> list[Line]:
    """The lines below those of their teachers and noise floors.

    Args:
        found: Lines, the run that says how their teacher was measured, and its seed, or None for a mean over seeds.
    """
    above: dict[str, list[Line]] = {}
    several = len({_measured_as(run, None) for _, run, _ in found}) > 1
    repeated = len({seed for *_, seed in found}) > 1
    for line, run, seed in found:
        key = _measured_as(run, seed)
        if key in above or not line.teacher:
            continue
        of = f" of {line.name}" if several else f", {SEED}={seed}" if repeated and seed is not None else ""
        above[key] = [Line(f"teacher{of}", line.teacher, line.teacher, line.floor)]
        if any((line.floor.get("metrics") or {}).values()):
            above[key].append(Line(f"{NOISE_FLOOR}{of}", line.floor, line.teacher, line.floor))
    return [line for lines in above.values() for line in lines] + [line for line, *_ in found]


def _measured_as(run: RunFolder, seed: Any) -> str:
    """The same for runs whose teacher is the same model, measured in the same way with the same seed."""
    settings = {key: value for key, value in (run.report.get("settings") or {}).items() if key != SEED}
    return json.dumps([(run.report.get("teacher") or {}).get("fingerprint"), settings, seed], default=str)


def _of_each(found: Sequence[Student]) -> list[Line]:
    return _with_teachers([(student.line, student.run, student.run.seed) for student in found])


def _of_means(series: Sequence[Series]) -> list[Line]:
    most = max((len(one.students) for one in series), default=0)
    runs = {id(one.line): next(iter(one.students.values())).run for one in series}
    whole = sorted(series, key=lambda one: len(one.students) < most)  # their teacher is the mean over all seeds
    lines = _with_teachers([(one.line, runs[id(one.line)], None) for one in whole])
    return [line for line in lines if not line.is_student] + [one.line for one in series]


def _paired(series: Sequence[Series], one_teacher: bool) -> list[Table]:
    """Differences from the teacher and from the first row, paired by seed.

    Args:
        series: The rows.
        one_teacher: Whether rows can be compared in what is measured from their teacher's images.
    """
    teachers = [{seed: student.line.teacher for seed, student in one.students.items()} for one in series]
    found = [difference_table("Difference from the teacher", series, teachers, "point")]
    if len(series) > 1:
        first = {seed: student.line.entry for seed, student in series[0].students.items()}
        if not one_teacher:
            first = {seed: _without_paired(entry) for seed, entry in first.items()}
        title = f"Difference from {series[0].line.name}"
        found.append(difference_table(title, series[1:], [first] * (len(series) - 1), "point"))
    return found


def _without_paired(entry: Entry) -> Entry:
    metrics = entry.get("metrics") or {}
    return {**entry, "metrics": {key: value for key, value in metrics.items() if key not in PAIRED}}


def _one_seed(series: Sequence[Series]) -> list[tuple[str, Student]]:
    """One run of each series, with the name of the series: of the seed that most of them have."""
    common = Counter(seed for one in series for seed in one.students).most_common(1)
    chosen = [(one.line.name, one.students.get(common[0][0])) for one in series]
    rest = [next(iter(one.students.values())) for one in series]
    return [(name, found or other) for (name, found), other in zip(chosen, rest, strict=True)]


def _seed_note(found: Sequence[tuple[str, Student]], repeated: bool) -> list[str]:
    """Which seed's pictures and curves are shown."""
    seeds = list(dict.fromkeys(str(student.run.seed) for _, student in found))
    return [f"Pictures and curves are those of seed {', '.join(seeds)}."] * repeated


def _pictures(found: Sequence[tuple[str, Student]]) -> tuple[list[tuple[str, Path, str]], list[str]]:
    """Rows of the grid of pictures, each teacher above its rows, and the prompts."""
    if not found:
        return [], []
    first = max((s.run for _, s in found), key=lambda run: sum(_grid(run) == _grid(s.run) for _, s in found))
    alike = [(name, s) for name, s in found if _grid(s.run) == _grid(first)]
    of_teacher: dict[str, list[tuple[str, Student]]] = {}
    for name, student in alike:
        of_teacher.setdefault(_measured_as(student.run, None), []).append((name, student))
    rows: list[tuple[str, Path, str]] = []
    for below in of_teacher.values():
        name = f"teacher of {below[0][0]}" if len(of_teacher) > 1 else "teacher"
        rows += [(name, below[0][1].run.folder, "teacher"), *((name, s.run.folder, s.row) for name, s in below)]
    return rows, [str(cell["prompt"]) for cell in _grid(first)]


def _grid(run: RunFolder) -> list[dict[str, Any]]:
    """Prompts and seeds of a run's pictures."""
    return run.report.get("grid") or []


def _curves(found: Sequence[tuple[str, Student]]) -> dict[str, dict[str, Any]]:
    """Title to the loss of each training; of several losses the first, which is the whole one."""
    made: dict[str, dict[str, tuple[list[str], Any]]] = {}
    for (name, student), stages in zip(found, aligned([s.run.report for _, s in found]), strict=True):
        for title, stage in stages.items():
            curves = losses(stage)
            if curves and student.part in ("0", stage["name"]):
                key = "loss" if "loss" in curves else next(iter(curves))
                of = made.setdefault(f"{title}: {key}", {})
                of.setdefault(stage.get("key") or name, ([], curves[key]))[0].append(name)
    return {title: {_and_more(names): curve for names, curve in of.values()} for title, of in made.items()}


def _and_more(names: Sequence[str]) -> str:
    """The first of the points that share a training, and how many others do."""
    return names[0] + (f" and {len(names) - 1} more of the same training" if names[1:] else "")


def _lead(runs: Sequence[RunFolder], failed: Sequence[FailedRun], series: Sequence[Series], repeated: bool) -> str:
    seeds = {run.seed for run in runs}
    parts = [f"{len(runs)} run{'s' * (len(runs) != 1)}"]
    if repeated:
        parts.append(f"{len(seeds)} seeds")
        parts.append(f"{len(series)} point{'s' * (len(series) != 1)}")
    broken = sum(run.exit_code != 0 for run in failed)
    others = {"failed": broken, "ended early": len(failed) - broken}
    return ", ".join([*parts, *(f"{count} {what}" for what, count in others.items() if count)]) + "."


def _facts(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """What was computed, each stage once, and what that took; what the machine was."""
    stages = [stage for stages in aligned([run.report for run in runs]) for stage in stages.values()]
    once = {stage.get("key", id(stage)): stage for stage in stages}
    total, unique = (sum(s.get("seconds") or 0 for s in of) for of in (stages, once.values()))
    facts = [
        ("Stages", f"{len(stages)}, {len(once)} of them distinct"),
        ("Time of the distinct stages", f"{duration(unique)}; without sharing {duration(total)}"),
    ]
    machines = dict.fromkeys(
        ", ".join(f"{k} {v}" for k, v in (run.report.get("environment") or {}).items() if v is not None) for run in runs
    )
    return facts * bool(stages) + [("Machine", machine) for machine in machines if machine]


def _failures(failed: Sequence[FailedRun]) -> Table | None:
    rows = tuple(
        (
            run.name.replace(",", ", "),
            (Cell(run.message), Cell(str(run.exit_code), number=run.exit_code), Cell(" ".join(run.overrides))),
        )
        for run in failed
    )
    title = "Failed" if all(run.exit_code for run in failed) else "Failed or ended early"
    return Table(title, ("point", "why", "exit code", "overrides"), rows, text=True) if rows else None


def _stages(runs: Sequence[RunFolder]) -> Table | None:
    """Seconds of each stage by run, and whether it was computed there."""
    found = aligned([run.report for run in runs])
    names = list(dict.fromkeys(title for stages in found for title in stages))
    rows = []
    for run, stages in zip(runs, found, strict=True):
        seconds = run.report.get("seconds")
        whole = Cell(duration(seconds), number=seconds) if seconds is not None else Cell()
        rows.append((run.name, (*(_time(stages.get(name)) for name in names), whole)))
    note = "How long a stage took where it was computed; the last column is the run itself, with its evaluations"
    return Table("Stages", ("run", *names, "whole run"), tuple(rows), text=True, note=note) if names else None


def _time(stage: Mapping[str, Any] | None) -> Cell:
    if stage is None or stage.get("seconds") is None:
        return Cell()
    text = duration(stage["seconds"])
    return Cell(f"{text}, from the store" if stage.get("cached") else text, number=stage["seconds"])


def _differences(runs: Sequence[RunFolder]) -> Table | None:
    """Runs by keys, or keys by runs where there are many."""
    title, keys = "What differs between the configs", differences([run.config for run in runs])
    values = {run.name: {key: Cell(_text(run.config.get(key, "–"))) for key in keys} for run in runs}
    if not keys:
        return None
    if len(keys) <= max(WIDE, len(runs)):
        rows = tuple((name, tuple(by_key.values())) for name, by_key in values.items())
        return Table(title, ("run", *keys), rows, text=True)
    return Table(title, ("key", *values), tuple((k, tuple(v[k] for v in values.values())) for k in keys), text=True)


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _markdown(content: Content) -> str:
    parts = [f"# {content.title}\n", f"{content.lead}\n"]
    parts += [f"{name}: {text}\n" for name, text in content.facts]
    for table in content.all_tables():
        parts += [f"## {table.title}\n", *([f"{table.note}\n"] if table.note else []), markdown(table)]
    for front in content.fronts:
        kept = [spot.name for spot in front.spots if not spot.dominated]
        parts += [f"## Pareto front of {front.title}\n", f"{'; '.join(kept)}.\n"]
    if content.notes:
        parts += ["## What the numbers mean\n", "".join(f"- {note}\n" for note in content.notes)]
    return "\n".join(parts)


def _plain(found: Sequence[Student]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of bare numbers: every run's row and its teacher's, with folder and seed."""
    headings, rows = plain_lines(_of_each(found))
    runs = {student.line.name: student.run for student in found}
    first = ["point", "folder", SEED]
    body = []
    for name, *numbers in rows:
        run = runs.get(name)
        body.append([name, str(run.folder) if run else None, run.seed if run else None, *numbers])
    return [*first, *headings[1:]], body


def _points(
    content: Content,
    runs: Sequence[RunFolder],
    failed: Sequence[FailedRun],
    found: Sequence[Student],
    series: Sequence[Series],
) -> dict[str, Any]:
    """What stands in ``points.json``: runs, means over seeds, fronts and failures."""

    def numbers(entry: Entry) -> dict[str, Any]:
        cost = {key: value for key, value in (entry.get("cost") or {}).items() if isinstance(value, int | float)}
        metrics = {
            key: {part: value[part] for part in ("value", "low", "high", "n") if part in value}
            for key, value in (entry.get("metrics") or {}).items()
            if isinstance(value, Mapping)
        }
        return {"cost": cost, "metrics": metrics}

    def by_teacher(one: Series) -> dict[str, Any]:
        ours = {seed: student.line.entry for seed, student in one.students.items()}
        theirs = {seed: student.line.teacher for seed, student in one.students.items()}
        every = {c.key: difference(c, ours, theirs) for c in columns_of([one.line.entry]) if c.group == "metrics"}
        return {key: {"value": at[0], "low": at[0] - at[1], "high": at[0] + at[1]} for key, at in every.items() if at}

    varying = differences([run.config for run in runs])
    return {
        "title": content.title,
        "runs": [
            {
                "name": student.line.name,
                "folder": str(student.run.folder),
                "seed": student.run.seed,
                "config": {key: student.run.config.get(key) for key in varying},
                **numbers(student.line.entry),
            }
            for student in found
        ],
        "points": [
            {
                "name": one.line.name,
                "seeds": list(one.students),
                **numbers(one.line.entry),
                "from_teacher": by_teacher(one),
            }
            for one in series
        ],
        "fronts": {f.title: [spot.name for spot in f.spots if not spot.dominated] for f in content.fronts},
        "failed": [
            {"name": run.name, "overrides": run.overrides, "message": run.message, "exit_code": run.exit_code}
            for run in failed
        ],
    }
