"""Progress and time estimates: one line for a whole run, bars for the details.

On a terminal the line stays at the bottom with the active bars below it. In a log file there are no bars, and each
finished part is a line. Of several processes only the first shows anything.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from compress.system import processes

Item = TypeVar("Item")


@dataclass
class Part:
    """A part of a run.

    Attributes:
        name: What it works on, such as a stage's name.
        doing: What it does, such as ``"evaluating"``.
        seconds: Expected time; 0 if nothing is computed, None if unknown.
        like: Parts with the same word take about the same time.
        key: Of its result in the store; empty if it has none.
    """

    name: str
    doing: str
    seconds: float | None = None
    like: str = ""
    key: str = ""


class Overall:
    """The progress of a whole run, as a context; the parts begin and finish in order inside it.

    Args:
        parts: All parts of the run.
        console: Standard error by default.
    """

    def __init__(self, parts: Sequence[Part], console: Console | None = None) -> None:
        self.parts = list(parts)
        self.done = 0
        self.details: list[Progress] = []  # visible bars, outermost first
        self._begun = self._part_begun = time.monotonic()
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        if self._console.is_interactive:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )

    def __enter__(self) -> "Overall":
        _running.append(self)
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        _running.remove(self)
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line above the progress."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self) -> None:
        """Begins the next part."""
        self._part_begun = time.monotonic()

    def finish(self, text: str, measured: bool = True) -> None:
        """Finishes the current part and prints a line.

        Args:
            text: What was done.
            measured: Whether its time estimates that of similar parts.
        """
        part = self.parts[self.done]
        if measured and part.like:
            for other in self.parts[self.done + 1 :]:
                if other.like == part.like and other.seconds != 0:
                    other.seconds = time.monotonic() - self._part_begun
        self.done += 1
        self._part_begun = time.monotonic()
        left = self.left()
        # On a terminal the line at the bottom shows the remaining time.
        after = f"; {left}" if left and self._live is None else ""
        self.say(f"[{self.done}/{len(self.parts)}] {part.name}: {text}{after}")

    def left(self) -> str:
        """The remaining time, such as ``about 4 min left``; empty if unknown.

        ``over 4 min left`` if the time of some part is unknown.
        """
        if self.done >= len(self.parts):
            return ""
        now, *later = [part.seconds for part in self.parts[self.done :]]
        shown = [task.time_remaining for progress in self.details for task in progress.tasks]
        bars = max((seconds for seconds in shown if seconds is not None), default=0.0)
        seconds = max((now or 0.0) - (time.monotonic() - self._part_begun), bars, 0.0)
        seconds += sum(part or 0.0 for part in later)
        sure = None not in (now, *later)
        return f"{'about' if sure else 'over'} {roughly(seconds)} left" if sure or seconds > 10 else ""

    def _render(self) -> RenderableType:
        part = self.parts[min(self.done, len(self.parts) - 1)]
        elapsed = int(time.monotonic() - self._begun)
        row = Table.grid(padding=(0, 1))
        row.add_column(no_wrap=True, overflow="ellipsis")
        # Text, not markup, which a line printed above with markup=False would show literally.
        place = f"[{min(self.done + 1, len(self.parts))}/{len(self.parts)}] "
        row.add_row(
            Text.assemble(place, (part.name, "bold"), f": {part.doing}"),
            ProgressBar(total=len(self.parts), completed=self.done, width=16),
            f"{elapsed // 60}:{elapsed % 60:02}",
            self.left().replace("about ", "~").replace("over ", ">"),
        )
        return Group(row, *(progress.get_renderable() for progress in self.details))


_running: list[Overall] = []  # the run on the screen, if any


def say(text: str) -> None:
    """Prints a line above the progress of the run, or alone on standard error; in the first process."""
    if not processes.is_main():
        return
    if _running:
        _running[-1].say(text)
    else:
        print(text, file=sys.stderr)


@contextmanager
def bar(*columns: TextColumn, disable: bool = False) -> Iterator[Progress]:
    """A bar with a count, further columns and the time left; it disappears when done.

    It is shown under the progress of the run, or alone on standard error.
    """
    text, count = TextColumn("{task.description}"), MofNCompleteColumn()
    console = Console(stderr=True)
    off = disable or not processes.is_main() or not (console.is_interactive or console.is_jupyter)
    progress = Progress(
        text, BarColumn(), count, *columns, TimeRemainingColumn(),
        console=console, transient=True, disable=off or bool(_running),
    )  # fmt: skip
    over = _running[-1] if _running and not disable else None
    if over:
        over.details.append(progress)
    try:
        with progress:
            yield progress
    finally:
        if over:
            over.details.remove(progress)


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Iterates over ``items`` with a bar."""
    with bar() as progress:
        yield from progress.track(items, description=description)


def duration(seconds: float) -> str:
    """A measured time: ``92 s``, ``8 min 37 s``, ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def roughly(seconds: float) -> str:
    """An estimated time, rounded: ``40 s``, ``4 min``, ``2 h 10 min``."""
    if seconds <= 50:
        return f"{max(math.ceil(seconds / 10), 1) * 10} s"
    minutes = math.ceil(seconds / 60)
    if minutes >= 60:
        minutes = math.ceil(minutes / 10) * 10
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours >= 48:
        return f"{round(hours / 24)} days"
    return f"{hours} h {rest} min" if rest else f"{hours} h"
