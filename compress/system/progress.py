"""The progress bars: what is being done, how far it is, how long it will still take."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compress.system import processes

Item = TypeVar("Item")


def bar(*columns: TextColumn, disable: bool = False) -> Progress:
    """A bar with a count, further columns and an estimate of the time left, on the standard error.

    Of several processes only the first shows one.
    """
    text, count = TextColumn("{task.description}"), MofNCompleteColumn()
    console = Console(stderr=True)
    off = disable or not processes.is_main()
    return Progress(text, BarColumn(), count, *columns, TimeRemainingColumn(), console=console, disable=off)


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Goes through ``items`` under such a bar."""
    with bar() as progress:
        yield from progress.track(items, description=description)
