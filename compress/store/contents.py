"""What a store holds: its entries with size, age, recipe and what uses them."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.store import MANIFEST, Store
from compress.store.uses import Run, runs

CACHES = ("examples", "features", "graphs", "data")  # computed again where they are missing
NAME = {  # of an entry in each folder; whatever is named otherwise is not the store's
    "examples": r"[0-9a-f]{16}",
    "features": r"[\w.-]+-[0-9a-f]{16}\.safetensors",
    "graphs": r"[0-9a-f]{16}",
    "data": r"[0-9a-f]{64}\.json|shards",  # what was found out about data; rows of tar files
}
HEX = re.compile(r"[0-9a-f]{16}")


@dataclass
class Entry:
    """One thing in a store.

    Attributes:
        kind: ``checkpoint``, ``evaluation``, ``work`` (unfinished), ``partial`` (half-written), or one of
            :data:`CACHES`.
        key: Its key, or the name of a cache's file.
        path: Of its file or folder.
        bytes: Of its files; hard-linked ones count fully.
        made: When it was finished, or last written to, in seconds since the epoch.
        recipe: That made it; empty if unknown.
        what: The stages of a checkpoint, or what an evaluation measured.
        needs: Keys of the entries it was made from.
        used_by: Folders of finished runs whose report names it, and keys of entries made from it.
        active: Whether a process works with it.
    """

    kind: str
    key: str
    path: Path
    bytes: int
    made: float
    recipe: str = ""
    what: str = ""
    needs: tuple[str, ...] = ()
    used_by: list[str] = field(default_factory=list)
    active: bool = False


def open_store(root: Path) -> Store:
    """The store in an existing folder.

    Raises:
        UserError: The folder is missing, or no run has used it as its store.
    """
    if not root.is_dir():
        raise UserError(f"store={root}: no such folder; the default is runs/store in the current folder")
    if not (root / "locks").is_dir():
        raise UserError(f"store={root}: this is no store (it has no folder locks): give store= the folder of a store")
    return Store(root)


def entries(store: Store) -> list[Entry]:
    """All entries: checkpoints, evaluations, work and caches, each kind from the oldest to the newest.

    Links are left out and never followed.
    """
    found = [*_checkpoints(store.root), *_evaluations(store.root), *_work(store.root), *_caches(store.root)]
    _mark(found, runs(store))
    return found


def disk_bytes(found: list[Entry], all_links: bool = False) -> int:
    """Bytes on disk of entries, each file once however many of them link to it.

    Args:
        found: The entries.
        all_links: Count a file only if all links to it are in these entries: what removing them would free.
    """
    links: dict[tuple[int, int], list[int]] = {}
    for entry in found:
        for status in _statuses(entry.path):
            links.setdefault((status.st_dev, status.st_ino), [status.st_size, status.st_nlink, 0])[2] += 1
    return sum(size for size, total, here in links.values() if here == total or not all_links)


def folder_links(folder: Path) -> list[Path]:
    """Symbolic links anywhere in a folder."""
    return [Path(place) / name for place, dirs, files in os.walk(folder) for name in (*dirs, *files)
            if (Path(place) / name).is_symlink()]  # fmt: skip


def _checkpoints(root: Path) -> list[Entry]:
    found = []
    for folder in _named(root, HEX):
        info = _json(folder / "compress.json")
        stages = [stage for stage in info.get("stages", []) if isinstance(stage, dict)]
        found.append(
            _entry(
                "checkpoint",
                folder,
                made=_time(folder / "compress.json"),
                recipe=str(info.get("recipe", "")),
                what=" › ".join(str(stage.get("name")) for stage in stages),
                needs=tuple(str(stage["key"]) for stage in stages[:-1] if "key" in stage),
            )
        )
    return _by_age(found)


def _evaluations(root: Path) -> list[Entry]:
    found = []
    for folder in _named(root / "evaluations", HEX):
        of = _json(folder / "evaluation.json").get("of", {})
        needs = tuple(str(of[name]) for name in ("checkpoint", "teacher") if of.get(name))
        recipe, what = str(of.get("recipe", "")), str(of.get("what", ""))
        made = _time(folder / MANIFEST)
        found.append(_entry("evaluation", folder, made=made, recipe=recipe, what=what, needs=needs))
    return _by_age(found)


def _work(root: Path) -> list[Entry]:
    found = [_entry("work", folder) for folder in _named(root / "work", HEX)]
    half = _named(root, re.compile(rf"\.{HEX.pattern}\..*"))
    return _by_age([*found, *(_entry("partial", folder, key=folder.name[1:17]) for folder in half)])


def _caches(root: Path) -> list[Entry]:
    made = (_entry(kind, path) for kind in CACHES for path in _named(root / kind, re.compile(NAME[kind]), files=True))
    return _by_age(list(made))


def _mark(found: list[Entry], known: list[Run]) -> None:
    """Fills in what uses each entry; work gets its recipe from the runs."""
    children: dict[str, list[str]] = {}
    for entry in found:
        for key in entry.needs:
            children.setdefault(key, []).append(entry.key)
    here = {entry.key for entry in found}
    users = [run for run in known if run.keys & here]
    for entry in found:
        theirs = [run for run in users if entry.key in run.keys]
        entry.recipe = entry.recipe or next((run.recipe for run in theirs), "")
        entry.active |= any(run.active for run in theirs) or (entry.kind in CACHES and any(run.active for run in known))
        entry.used_by = [str(run.out) for run in theirs if not run.active] + children.get(entry.key, [])
        if entry.kind == "evaluation" and not entry.needs and not entry.recipe and users:
            entry.used_by.append("an unknown run")  # made before evaluations said what they are of


def _named(folder: Path, name: re.Pattern[str], files: bool = False) -> Iterator[Path]:
    """What is in a folder under such names: folders, or files too; never links."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if name.fullmatch(path.name) and not path.is_symlink() and (files or path.is_dir()):
            yield path


def _entry(kind: str, path: Path, made: float | None = None, key: str = "", **more: Any) -> Entry:
    statuses = list(_statuses(path))
    if made is None:
        made = max((status.st_mtime for status in statuses), default=_time(path)) or 0.0
    return Entry(kind, key or path.name, path, sum(status.st_size for status in statuses), made, **more)


def _statuses(path: Path) -> Iterator[os.stat_result]:
    """Of a file, or of all files in a folder; links are not followed, and what goes meanwhile is left out."""
    files = [path] if not path.is_dir() else [Path(at) / name for at, _, names in os.walk(path) for name in names]
    for file in files:
        try:
            yield file.lstat()
        except OSError:
            continue


def _time(path: Path) -> float | None:
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def _json(file: Path) -> dict[str, Any]:
    """The content of a file; nothing if it is missing or damaged, which ``verify`` reports."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _by_age(found: list[Entry]) -> list[Entry]:
    return sorted(found, key=lambda entry: (entry.made, entry.key))
