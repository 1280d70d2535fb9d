"""The notes below the table, on made-up rows."""

from typing import Any

from made_up import row

from compress.benchmark.table import notes


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark returns, as far as the table needs it."""
    settings = {"n": 8, "resolution": "16x16", "guidance": 4.0, "repeats": 9, "device": "a CPU", "threads": 1}
    return {"rows": [row("reference", psnr=None), *rows], "best": None, "settings": settings}


def test_the_notes_say_how_many_calls_were_timed():
    assert "median of 4 " in "".join(notes(result(row("a"))))
    assert "median of 3 (the slowest rows) to 9 calls " in "".join(notes(result(row("a", calls=3), row("b", calls=9))))
