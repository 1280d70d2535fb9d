"""The notes below the table, on made-up rows."""

from typing import Any

from made_up import row

from compress.benchmark.table import notes


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark returns, as far as the table needs it."""
    settings = {"n": 8, "resolution": "16x16", "guidance": 4.0, "repeats": 9, "device": "a CPU", "threads": 1}
    rows = (row("reference", psnr=None), *rows)
    return {"rows": rows, "best": None, "settings": settings, "truncated": False}


def test_truncated_prompts_are_told_of_once():
    words = "longer than the text encoder reads"
    assert words not in "".join(notes(result()))
    assert "".join(notes(result() | {"truncated": True})).count(words) == 1


def test_the_notes_say_how_many_calls_were_timed():
    assert "median of 4 " in "".join(notes(result(row("a"))))
    assert "median of 3 (the slowest rows) to 9 calls " in "".join(notes(result(row("a", calls=3), row("b", calls=9))))
