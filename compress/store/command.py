"""``python -m compress store``: lists, prunes and verifies a store."""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.errors import UserError, bad_value
from compress.store.contents import CACHES, Entry, disk_bytes, entries, open_store
from compress.store.prune import prune, verify

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SHOWN = 2  # users of an entry that are named


def main(arguments: list[str]) -> int:
    """Runs ``store`` with its arguments; returns the exit code.

    Raises:
        UserError: The arguments or the folder are wrong.
    """
    words = [word for word in arguments if not word.startswith("store=")]
    folders = [word.partition("=")[2] for word in arguments if word.startswith("store=")]
    given = _parser().parse_args(words)
    if given.action != "prune" and (given.older is not None or given.dry_run):
        raise UserError(f"store {given.action}: --older and --dry-run are of prune: python -m compress store prune ...")
    if given.action == "verify" and given.json:
        raise UserError("store verify: --json is of list and prune")
    store = open_store(Path(folders[-1] if folders else "runs/store").expanduser())
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 200  # in a file nothing is cut off
    if given.action == "verify":
        whole, damaged = verify(store)
        for text in damaged:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        console.print(f"{whole} of {whole + len(damaged)} checkpoints and evaluations are whole", highlight=False)
        return 1 if damaged else 0
    if given.action == "prune":
        if given.older is None:
            raise UserError("store prune: --older is missing: give an age such as --older 30d")
        found, size = prune(store, _seconds(given.older), keep_used=given.keep_used, dry_run=given.dry_run)
    else:
        found = entries(store)
        size = disk_bytes(found)
    if given.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found], default=str, indent=2))
        return 0
    if found:
        console.print(_table(found))
    verb = {"list": "in", "prune": "would be removed from" if given.dry_run else "removed from"}[given.action]
    console.print(f"{_size(size)} {verb} {store.root}: {_counted(found)}", highlight=False, soft_wrap=True)
    return 0


def usage() -> str:
    """The help text."""
    return _parser().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compress store",
        usage="%(prog)s [list | prune --older AGE | verify] [store=DIR] [options]",
        description="Lists what a store holds, removes what is old and not in use, or checks every hash.",
        epilog="Never removed: what a running process uses, and what the kept checkpoints were made from.",
        allow_abbrev=False,
    )
    parser.add_argument("action", nargs="?", choices=("list", "prune", "verify"), default="list", metavar="action")
    parser.add_argument("--older", metavar="AGE", help="prune: only entries of at least this age, such as 12h, 30d, 8w")
    parser.add_argument(
        "--keep-used",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prune: keep what the report of a finished run names; this is the default",
    )
    parser.add_argument("--dry-run", action="store_true", help="prune: only show what would be removed")
    parser.add_argument("--json", action="store_true", help="list and prune: print the entries as JSON")

    def refuse(message: str) -> NoReturn:
        raise UserError(f"store: {message}; python -m compress store --help")

    parser.error = refuse  # type: ignore[method-assign]
    return parser


def _seconds(age: str) -> float:
    try:
        seconds = float(age[:-1]) * SECONDS[age[-1:]]
    except (ValueError, KeyError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise bad_value("--older", age, f"a number and one of {', '.join(SECONDS)}, such as 30d")
    return seconds


def _table(found: list[Entry]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("kind", "key", "size", "age", "recipe", "what", "used by"):
        table.add_column(name, justify="right" if name in ("size", "age") else "left", no_wrap=name != "used by")
    for entry in found:
        if entry.kind not in CACHES:
            users = ["a running process"] * entry.active + [_short(user) for user in entry.used_by]
            more = [f"{len(users) - SHOWN} more"] * (len(users) > SHOWN)
            cells = (entry.kind, entry.key, _size(entry.bytes), _age(entry), entry.recipe, entry.what)
            table.add_row(*map(Text, (*cells, ", ".join(users[:SHOWN] + more) or "-")))
    for kind in CACHES:  # hundreds of files that nobody looks at one by one
        if files := [entry for entry in found if entry.kind == kind]:
            number = f"{len(files)}, the newest of"
            table.add_row(kind, number, _size(sum(file.bytes for file in files)), _age(files[-1]), "", "", "-")
    return table


def _short(user: str) -> str:
    """A folder seen from here if that is shorter; a key as it is."""
    return min(user, os.path.relpath(user), key=len) if os.sep in user else user


def _counted(found: list[Entry]) -> str:
    kinds = list(dict.fromkeys(entry.kind for entry in found))
    count = {kind: sum(entry.kind == kind for entry in found) for kind in kinds}
    plural = {kind: f"{kind}s" for kind in ("checkpoint", "evaluation") if count.get(kind, 0) > 1}
    return ", ".join(f"{count[kind]} {plural.get(kind, kind)}" for kind in kinds) or "nothing"


def _size(size: float) -> str:
    if size < 1000:
        return f"{size:.0f} B"
    power = next((power for power in (1, 2, 3) if size < 999.5 * 1000**power), 4)
    return f"{size / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _age(entry: Entry) -> str:
    seconds = time.time() - entry.made
    for unit in ("w", "d", "h", "m"):
        if seconds >= 2 * SECONDS[unit]:
            return f"{seconds / SECONDS[unit]:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
