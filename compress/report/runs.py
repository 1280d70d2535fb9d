"""The folders of runs: their reports, what differs between their configs, and the runs that failed."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from compress.config.folders import FAILURE, POINTS, REPORT
from compress.config.values import flat
from compress.errors import UserError, bad_value
from compress.report.table import Entry, Line

NOT_COMPARED = ("out", "store", "track", "publish", "objective")  # keys of a config that change no result
SEED = "seed"
CONFIG = "config.yaml"  # the first file of a run
UNFINISHED = "it has not finished"


@dataclass(frozen=True)
class RunFolder:
    """A run that has finished.

    Attributes:
        name: What tells it from the others.
        folder: Where it is.
        report: What stands in its ``report.json``.
        config: Its config by full keys, without what changes no result; empty if unknown.
    """

    name: str
    folder: Path
    report: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def seed(self) -> Any:
        """Its seed; None if unknown."""
        return self.report.get(SEED)

    @property
    def series(self) -> str:
        """The same for all runs that differ in nothing but ``seed``."""
        kept = {key: value for key, value in self.config.items() if key != SEED}
        return json.dumps(kept, sort_keys=True, default=str) if kept else str(self.folder)


@dataclass(frozen=True)
class FailedRun:
    """A run that failed.

    Attributes:
        name: Of its folder.
        overrides: Of its command line.
        message: Why it failed.
        exit_code: 2 for a user's mistake, 0 for a run that was to end early, else 1.
    """

    name: str
    overrides: tuple[str, ...]
    message: str
    exit_code: int


@dataclass(frozen=True)
class Student:
    """One row of a run: what came of it.

    Attributes:
        line: The row, named after the run.
        run: The run.
        row: The row's name in the run.
        part: The same for the rows of one series that belong together.
    """

    line: Line
    run: RunFolder
    row: str
    part: str


def find_runs(pattern: str) -> list[Path]:
    """The folders of runs that a glob names: themselves, by their ``report.json``, or by the folder that holds them.

    Raises:
        UserError: There is none.
    """
    found: dict[Path, None] = {}
    for match in map(Path, glob(str(Path(pattern).expanduser()), recursive=True)):
        folder = match.parent if match.name in (REPORT, FAILURE) else match
        inside = [folder] if _is_run(folder) else list(filter(_is_run, folder.iterdir())) if folder.is_dir() else []
        found |= dict.fromkeys(inside)
    if not found:
        raise bad_value("runs", pattern, f"a glob of folders that hold a {REPORT}, or of folders of such folders")
    places = {grid: _places(grid) for grid in {folder.parent for folder in found}}
    last = len(found)
    return sorted(found, key=lambda run: (_natural(run.parent), places[run.parent].get(run.name, last), _natural(run)))


def _places(grid: Path) -> dict[str, int]:
    """The places of a grid's points by their folders' names, as its own report has them; empty for other folders."""
    try:
        runs = _json(grid / POINTS)["runs"]
        return {name: place for place, name in enumerate(dict.fromkeys(Path(run["folder"]).name for run in runs))}
    except (OSError, UserError, KeyError, TypeError):
        return {}


def _natural(path: Path) -> list[str | float]:
    """A key that sorts numbers in a path by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(path))
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (REPORT, FAILURE, CONFIG))


def has_ended(report: Mapping[str, Any]) -> bool:
    """Whether a run has written its report to the end, and not only what it had so far.

    At the end it has a checkpoint or the bound that it was stopped by; that of alternatives, what could not run.
    """
    return bool(report.get("checkpoint")) or "stopped" in report or "refused" in report


def read_runs(folders: Iterable[Path]) -> tuple[list[RunFolder], list[FailedRun]]:
    """Reads what runs left; folders without a file of either kind are left out.

    Raises:
        UserError: A file cannot be read.
    """
    done: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
    failed = []
    for folder in folders:
        if (folder / FAILURE).is_file():
            about = _json(folder / FAILURE)
            words = tuple(map(str, about.get("overrides") or ()))
            failed.append(FailedRun(folder.name, words, str(about.get("message")), int(about.get("exit_code") or 1)))
        elif (folder / REPORT).is_file():
            report = _json(folder / REPORT)
            if "stopped" in report:
                failed.append(FailedRun(folder.name, (), f"ended early: {report['stopped']}", 0))
            elif has_ended(report):
                done.append((folder, report, _config(folder / CONFIG)))
            else:
                failed.append(FailedRun(folder.name, (), UNFINISHED, 1))
        elif (folder / CONFIG).is_file():
            failed.append(FailedRun(folder.name, (), UNFINISHED, 1))
    for folder, report, _ in done:
        if not all({"name", "kind"} <= set(stage) for stage in report.get("stages") or [{}]):
            raise UserError(f"{folder / REPORT}: it does not hold what a run writes")
    titles = [{stage["name"]: title for title, stage in of.items()} for of in aligned([r for _, r, _ in done])]
    configs = [_with_order(_retitled(config, of), of) for (*_, config), of in zip(done, titles, strict=True)]
    names = _names([folder for folder, *_ in done], configs)
    found = zip(names, done, configs, strict=True)
    return [RunFolder(name, folder, report, config) for name, (folder, report, _), config in found], failed


def _retitled(config: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """The config with the stages' keys under other names."""
    found = {}
    for key, value in config.items():
        top, _, rest = key.partition(".")
        name, dot, last = rest.partition(".")
        found[f"stages.{titles.get(name, name)}{dot}{last}" if top == "stages" else key] = value
    return found


def _with_order(config: dict[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """The config with the order of its stages, which its keys do not tell; an unknown config stays empty."""
    return {**config, "order": ", ".join(titles.values())} if config else config


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: it is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: it does not hold what a run writes")
    return found


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{file}: it cannot be read ({str(error).splitlines()[0]})") from error
    return {key: value for key, value in flat(tree).items() if key.partition(".")[0] not in NOT_COMPARED}


def aligned(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """The stages of each report under the same titles: their names, or their kinds where the names differ."""
    placed: list[dict[tuple[str, int], Mapping[str, Any]]] = []
    for report in reports:
        seen: Counter[str] = Counter()
        placed.append({})
        for stage in report.get("stages") or []:
            kind = stage["kind"]
            if kind != "engine":  # a row of a stage above it
                seen[kind] += 1
                placed[-1][kind, seen[kind]] = stage
    names: dict[tuple[str, int], set[str]] = {}
    for stages in placed:
        for place, stage in stages.items():
            names.setdefault(place, set()).add(stage["name"])
    titles = {
        place: next(iter(of)) if len(of) == 1 else f"{place[0]} {place[1]}" if place[1] > 1 else place[0]
        for place, of in names.items()
    }
    return [{titles[place]: stage for place, stage in stages.items()} for stages in placed]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all configs that could have them."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key for key in keys if len({json.dumps(c.get(key, "-"), default=str) for c in _with_place(key, configs)}) > 1
    ]


def _with_place(key: str, configs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The configs that could have a key: one of a stage belongs to the methods that have it."""
    top, _, rest = key.partition(".")
    if top != "stages":
        return list(configs)
    method = f"stages.{rest.partition('.')[0]}.method"
    methods = {config.get(method) for config in configs if key in config}
    return [config for config in configs if config.get(method) in methods]


def _names(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells the runs apart: their folders' names, their values where those are time stamps, else their paths."""
    names = [folder.name.replace(",", ", ") for folder in folders]
    plain = [re.sub(r"-[0-9a-f]{8}$", "", name) for name in names]  # without the hash of a shortened name
    names = plain if len(set(plain)) == len(plain) else names
    if any(re.match(r"\d{4}-\d\d-\d\d_", name) for name in names):
        keys = differences(configs)
        last = [key.rpartition(".")[2] for key in keys]
        short = [end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)]
        if 0 < len(keys) <= 4:
            names = [
                ", ".join(f"{name}={c.get(key, '–')}" for name, key in zip(short, keys, strict=True)) for c in configs
            ]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def students(runs: Sequence[RunFolder]) -> list[Student]:
    """The rows that runs came to: each run's last stage and its engine; of alternatives, every stage."""
    found = []
    for run in runs:
        report = run.report
        teacher, floor = report.get("teacher") or {}, report.get("noise_floor") or {}
        stages = list(report.get("stages") or [])
        alternatives = "refused" in report
        rows: list[tuple[str, str, Entry]] = [
            (stage["name"], f"{run.name}: {stage['name']}" if alternatives else run.name, stage)
            for stage in (stages if alternatives else stages[-1:])
        ]
        if engine := report.get("accelerated"):
            rows.append((engine["name"], f"{run.name}, {engine.get('engine')}", engine))
        parts = [row if alternatives else str(place) for place, (row, *_) in enumerate(rows)]
        found += [
            Student(Line(name, entry, teacher, floor), run, row, part)
            for (row, name, entry), part in zip(rows, parts, strict=True)
        ]
    return found
