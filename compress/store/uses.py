"""Which entries of a store are in use: by runs going on, and by the reports of finished ones.

A run writes its folder, its machine and its keys to ``runs/<id>.json`` of its store and holds the lock of that file
until it ends. What a finished run used stands in its ``report.json``, or a benchmark's ``benchmark.json``.
"""

import json
import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.config.folders import REPORT
from compress.store import Store
from compress.system.files import write_text
from compress.system.leases import LEASE, leased

GATE = "uses"  # the lock under which runs enter their keys and entries are removed
REPORTS = (REPORT, "benchmark.json")
DEPTH = 4  # folders between the store's parent and a report
KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")


@dataclass(frozen=True)
class Run:
    """A run that used a store.

    Attributes:
        out: Its folder.
        recipe: Its recipe's name, empty if unknown.
        keys: Of the store's entries that it uses.
        active: Whether a process is still at it.
    """

    out: Path
    recipe: str
    keys: frozenset[str]
    active: bool


def key_inside(store: Store, model: str) -> list[str]:
    """The key of a model's folder, where that is a checkpoint of the store."""
    place, root = Path(model).expanduser().resolve(), store.root.resolve()
    return [place.relative_to(root).parts[0]] if root in place.parents else []


@contextmanager
def using(store: Store, out: Path, recipe: str, keys: Iterable[str]) -> Iterator[None]:
    """Keeps entries, existing or not, from being removed while the block runs, and remembers the run's folder.

    Args:
        store: Of the run.
        out: Folder of the run, where it writes its report.
        recipe: The recipe's name.
        keys: Of checkpoints and evaluations.
    """
    name = uuid.uuid4().hex
    record = store.root / "runs" / f"{name}.json"
    content: dict[str, Any] = {
        "out": os.path.abspath(out), "recipe": recipe, "keys": sorted(keys), "machine": platform.node()
    }  # fmt: skip
    with store.lock(f"run-{name}"):
        with store.lock(GATE):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_text(record, json.dumps(content))
        try:
            yield
        finally:
            if not _reports(Path(content["out"])):
                record.unlink(missing_ok=True)


@contextmanager
def unless_held(store: Store, key: str) -> Iterator[bool]:
    """Holds the lock of ``key`` if it is free; yields whether it was."""

    def held() -> None:
        raise BlockingIOError

    with ExitStack() as stack:
        try:
            stack.enter_context(leased(store.lock_file(key), held))
            free = True
        except BlockingIOError:
            free = False
        yield free


def _is_held(store: Store, key: str) -> bool:
    """Whether a living process holds the lock of ``key``: on another machine, one that has touched the file of late."""
    with unless_held(store, key) as free:
        if free:
            return False
    file = store.lock_file(key)
    now = file.with_name(f".{uuid.uuid4().hex}.now")
    try:
        now.touch()
        silent = now.stat().st_mtime - file.stat().st_mtime  # both by the clock of the file system
        return silent < 2 * LEASE
    except OSError:
        return True
    finally:
        now.unlink(missing_ok=True)


def _is_out_of_sight(content: dict[str, Any]) -> bool:
    """Whether a run's folder is on another machine's disk, so that nobody here can say whether its report is there."""
    return content.get("machine", platform.node()) != platform.node() and not Path(content["out"]).parent.is_dir()


def runs(store: Store) -> list[Run]:
    """The runs going on, and the finished ones whose report is still there.

    Reports are looked for where runs of this store said that they are, and in the folders beside the store. What a run
    of another machine used, whose folder cannot be seen from here, counts as used.
    """
    found, reports = [], dict.fromkeys(_reports_beside(store.root))
    for record in sorted((store.root / "runs").glob("*.json")):
        content = _read(record)
        if content is None:
            continue
        out = Path(content["out"])
        active = _is_held(store, f"run-{record.stem}")
        if active or _is_out_of_sight(content):
            found.append(Run(out, content["recipe"], frozenset(content["keys"]), active))
        reports |= dict.fromkeys(_reports(out))
    return found + [run for run in map(_reported, reports) if run is not None]


def records(store: Store) -> set[str]:
    """Names of the records of runs: of those going on, and of finished ones."""
    return {file.name for file in (store.root / "runs").glob("*.json")}


def forget(store: Store) -> None:
    """Removes the records of runs that have ended and left no report."""
    for record in (store.root / "runs").glob("*.json"):
        content = _read(record)
        if _is_held(store, f"run-{record.stem}"):
            continue
        if content is None or not (_reports(Path(content["out"])) or _is_out_of_sight(content)):
            record.unlink(missing_ok=True)


def _reports(out: Path) -> list[Path]:
    return [out / name for name in REPORTS if (out / name).is_file()]


def _reported(report: Path) -> Run | None:
    """The run of a report: whatever in it looks like a key counts as one."""
    try:
        text = report.read_text(encoding="utf-8")
        recipe = json.loads(text).get("recipe", "")
    except (OSError, ValueError, AttributeError):
        return None
    return Run(report.parent, str(recipe), frozenset(KEY.findall(text)), False)


def _reports_beside(root: Path) -> Iterator[Path]:
    """Every report some folders below the store's parent, without links and other file systems."""
    root = root.resolve()
    top = root.parent
    for place, folders, files in os.walk(top):
        yield from (Path(place) / name for name in REPORTS if name in files)
        deep = len(Path(place).relative_to(top).parts) >= DEPTH
        keep = [] if deep or "model_index.json" in files else folders
        folders[:] = [name for name in keep if not name.startswith(".") and _here(Path(place) / name, root)]


def _here(folder: Path, root: Path) -> bool:
    try:
        return folder != root and folder.lstat().st_dev == root.stat().st_dev
    except OSError:
        return False


def _read(record: Path) -> dict[str, Any] | None:
    for again in range(3):  # a run that ends removes its record; on a network file system a new one may come late
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
            return content if {"out", "recipe", "keys"} <= content.keys() else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError):
            time.sleep(0.01 * again)
    return None
