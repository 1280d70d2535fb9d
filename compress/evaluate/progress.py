"""The progress bar of an evaluation."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Goes through ``items`` under a bar with an estimate of the time left, on the standard error."""
    return rich_track(items, description=description, console=Console(stderr=True), transient=False)
