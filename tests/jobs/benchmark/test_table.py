"""The notes below the table, on random rows."""

from typing import Any

from random_inputs import floor, row

from compress.jobs.benchmark.table import cells, headings, notes, verdict


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark returns, as far as the table needs it."""
    settings = {"n": 8, "resolution": "16x16", "guidance": 4.0, "repeats": 9, "device": "a CPU", "threads": 1}
    rows = (row("reference", psnr=None), *rows)
    return {"rows": rows, "best": None, "settings": settings, "truncated": False, "noise_floor": floor()}


def test_truncated_prompts_are_told_of_once():
    words = "longer than the text encoder's input"
    assert words not in "".join(notes(result()))
    assert "".join(notes(result() | {"truncated": True})).count(words) == 1


def test_the_notes_say_how_many_calls_were_timed():
    assert "median of 4 " in "".join(notes(result(row("a"))))
    assert "median of 3 (the slowest rows) to 9 calls " in "".join(notes(result(row("a", calls=3), row("b", calls=9))))


def test_a_difference_of_scores_is_marked_as_noise_or_loss_or_neither():
    rows = [row("a", score=-0.5), row("b", score=-5.0), row("c", score=5.0), row("same")]
    rows[3]["metrics"]["clip_difference"] |= {"low": 0.0, "high": 0.0}
    told = result(*rows)
    assert [cells(told, row)[-1][0] for row in rows] == ["-0.5 ≈", "-5.0 ▼", "+5.0", "+0.0"]
    assert "its interval contains 0" in "".join(notes(told))
    assert "its interval contains 0" not in "".join(notes(result(*rows[1:])))


def test_the_noise_floor_says_what_other_noise_gets():
    expected = "PSNR 12.0 [11.0, 13.0] dB, SSIM 0.900 [-0.100, 1.900], a-clip score +0.5 [-0.5, +1.5] from its own"
    assert expected in "".join(notes(result()))
    told = result()
    for metrics in (told["rows"][0]["metrics"], told["noise_floor"]):
        metrics["clip_score"] = metrics["clip_difference"] = None
    assert "SSIM 0.900 [-0.100, 1.900]. Another image" in "".join(notes(told))


def test_latency_is_that_of_a_call_and_the_verdict_names_the_highest_throughput():
    told = result(row("a", latency=0.5), row("b", latency=1.6, batch=8)) | {"best": "a", "best_of": "fastest"}
    assert headings(told)[1] == "latency of a call (s)"
    assert verdict(told | {"most_images": "a"}) == "best: a (fastest)"
    assert verdict(told | {"most_images": "b"}).endswith("; most images a second within the same limits: b (5)")
