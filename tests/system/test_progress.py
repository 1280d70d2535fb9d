"""The line of a whole run and the bars below it, on a terminal and in a log file."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from compress.system import progress
from compress.system.progress import Overall, Part, bar, duration, roughly, track


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def parts() -> list[Part]:
    return [
        Part("teacher", "evaluating", None, "evaluation"),
        Part("prune", "pruning", 20.0),
        Part("prune", "evaluating", None, "evaluation"),
        Part("int8", "quantizing", None),
        Part("int8", "evaluating", 0.0, "evaluation"),
    ]


def test_a_log_file_gets_one_line_for_each_part(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    with Overall(parts(), Console(file=file, width=40)) as overall:
        for seconds, text in ((90, "evaluated in 90 s"), (35, "pruned in 35 s"), (80, "evaluated"), (3, "quantized")):
            overall.begin()
            assert list(track(range(4), "a detail")) == [0, 1, 2, 3]
            clock.now += seconds
            overall.finish(text)
        overall.begin()
        overall.finish("evaluation from the store", measured=False)
    assert file.getvalue().splitlines() == [
        "[1/5] teacher: evaluated in 90 s; over 2 min left",  # prune and one evaluation; int8 is not known
        "[2/5] prune: pruned in 35 s; over 2 min left",
        "[3/5] prune: evaluated",
        "[4/5] int8: quantized; about 10 s left",
        "[5/5] int8: evaluation from the store",
    ]
    assert capsys.readouterr() == ("", "")  # no bars
    assert progress._running == []


def test_a_part_takes_what_is_left_of_it(clock: Clock) -> None:
    overall = Overall([Part("a", "training", 300.0), Part("b", "evaluating", 60.0)], Console(file=io.StringIO()))
    assert overall.left() == "about 6 min left"
    clock.now += 250
    assert overall.left() == "about 2 min left"
    clock.now += 500  # longer than expected
    assert overall.left() == "about 1 min left"


def test_a_bar_says_what_is_left_of_a_part_nobody_timed() -> None:
    with Overall([Part("a", "training")], Console(file=io.StringIO())) as overall, bar() as shown:
        assert overall.left() == ""
        task = shown.add_task("training", total=1000)
        for _ in range(3):
            time.sleep(0.05)
            shown.advance(task)
        assert overall.left().startswith("over ")
    assert overall.details == []


def test_on_a_terminal_bars_appear_under_the_line_and_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    file: Any = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, _environ={"TERM": "xterm"})
    with Overall(parts(), console) as overall:
        with bar() as shown:
            shown.add_task("sampling 8 images", total=8)
            assert overall._live is not None
            overall._live.refresh()
        overall.finish("done")
    text = file.getvalue()
    assert "[1/5]" in text and "sampling 8 images" in text and "[1/5] teacher: done\n" in text.replace("\r", "")
    assert "bold]" not in text
    lines = Console(width=80, file=io.StringIO())
    lines.print(overall._render())
    rendered = lines.file.getvalue()  # type: ignore[attr-defined]
    assert rendered.startswith("[2/5] prune: pruning") and "sampling" not in rendered


def test_times_in_words() -> None:
    assert [duration(s) for s in (3.4, 92, 517, 12_000)] == ["3 s", "92 s", "8 min 37 s", "3 h 20 min"]
    estimates = [roughly(s) for s in (0, 12, 55, 200, 3590, 4000, 7200, 500_000)]
    assert estimates == ["10 s", "20 s", "1 min", "4 min", "1 h", "1 h 10 min", "2 h", "6 days"]
