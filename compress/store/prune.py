"""Removes what is old and not in use from a store, and verifies what is in it."""

import os
import shutil
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from compress.errors import UserError
from compress.store import Store, verify_manifest
from compress.store.contents import CACHES, Entry, disk_bytes, entries, folder_links
from compress.store.uses import GATE, forget, records, unless_held

TRASH = ".trash-"


def prune(store: Store, older: float, *, keep_used: bool = True, dry_run: bool = False) -> tuple[list[Entry], int]:
    """Removes entries that are older than a time and that nothing uses.

    Never removed: what a running process uses, what the kept checkpoints and evaluations were made from, and caches
    while any run goes on. Runs may start and go on meanwhile.

    Args:
        store: Of any number of runs.
        older: Seconds; younger entries are kept.
        keep_used: Whether what the report of a finished run names is kept, too.
        dry_run: Only say what would be removed.

    Returns:
        The removed entries and the bytes that this freed.
    """
    moved: list[tuple[Entry, Path]] = []
    while True:
        seen = records(store)
        found = removable(entries(store), time.time() - older, keep_used)
        if dry_run:
            return found, disk_bytes(found, all_links=True)
        with store.lock(GATE):  # no run begins meanwhile
            if records(store) == seen:  # else one has begun, which may use what was found
                moved = [(entry, aside) for entry in found if (aside := _put_aside(store, entry)) is not None]
                break
    freed = disk_bytes([replace(entry, path=aside) for entry, aside in moved], all_links=True)
    for path in store.root.glob(f"{TRASH}*"):  # an interrupted one's, too
        shutil.rmtree(path, ignore_errors=True)
    forget(store)
    return [entry for entry, _ in moved], freed


def removable(found: list[Entry], before: float, keep_used: bool) -> list[Entry]:
    """The entries made before a time that nothing kept needs; what a finished one left behind counts as unused."""
    by_key = {entry.key: entry for entry in found if entry.kind in ("checkpoint", "evaluation")}
    left_over = {id(entry) for entry in found if entry.kind in ("work", "partial") and entry.key in by_key}
    others = [entry for entry in found if id(entry) not in left_over]
    used = {id(entry) for entry in others if keep_used and any(user not in by_key for user in entry.used_by)}
    kept = [entry for entry in others if entry.active or entry.made >= before or id(entry) in used]
    keys: set[str] = set()
    while kept:  # what they were made from, and what that was made from
        entry = kept.pop()
        if entry.key not in keys:
            keys.add(entry.key)
            kept += [by_key[key] for key in entry.needs if key in by_key]
    return [entry for entry in found if (entry.made < before if id(entry) in left_over else entry.key not in keys)]


def verify(store: Store) -> tuple[int, list[str]]:
    """Hashes every file of all checkpoints and evaluations.

    Returns:
        How many entries are whole, and what is wrong with each of the others.
    """
    from compress.store.checkpoint import verify_checkpoint

    whole, damaged = 0, []
    for entry in entries(store):
        if entry.kind not in ("checkpoint", "evaluation"):
            continue
        try:
            if links := folder_links(entry.path):
                raise UserError(f"{links[0]} is a link; a store has none: delete {entry.path}")
            (verify_checkpoint if entry.kind == "checkpoint" else verify_manifest)(entry.path)
            whole += 1
        except UserError as error:
            if entry.path.exists():  # else another process has just removed it
                damaged.append(str(error))
    return whole, damaged


def _put_aside(store: Store, entry: Entry) -> Path | None:
    """Renames an entry to where no run finds it, unless a process holds its lock; returns its new path."""
    with ExitStack() as stack:
        if entry.kind not in CACHES and not stack.enter_context(unless_held(store, entry.key)):
            return None
        aside = store.root / f"{TRASH}{uuid.uuid4().hex}"
        try:
            os.mkdir(aside)
            os.rename(entry.path, aside / entry.path.name)
        except OSError:  # another process has just removed it, or it is not ours
            shutil.rmtree(aside, ignore_errors=True)
            return None
        return aside
