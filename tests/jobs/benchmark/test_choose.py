"""Dominated rows and the best row, on random numbers."""

import pytest
from random_inputs import refused, row

from compress.jobs.benchmark.choose import best, dominating, most_images
from compress.jobs.benchmark.config import Limits

REFERENCE = row("reference", psnr=None)


def test_a_row_that_is_worse_in_one_thing_and_better_in_none_is_dominated():
    for worse in (row("b", latency=2.0), row("b", memory=1.2), row("b", psnr=30.0)):
        assert dominating(worse, [row("a"), worse, refused("c")]) == "a"


def test_a_row_that_is_better_in_anything_is_not():
    a = row("a")
    for other in (
        row("b", latency=2.0, memory=0.85),
        row("b", latency=2.0, psnr=45.0),
        row("b", memory=2.0, latency=0.9),
        row("b", latency=2.0, batch=4),  # slower, but more images a second
    ):
        assert dominating(other, [a, other]) is None


def test_a_little_more_memory_does_not_save_a_row_from_being_dominated():
    slow = row("b", latency=2.0, memory=0.95)
    assert dominating(slow, [row("a"), slow]) == "a"


def test_differences_within_the_noise_dominate_nothing():
    a = row("a")
    for other in (row("b", latency=1.08), row("b", memory=1.05), row("b", psnr=39.5)):
        assert dominating(other, [a, other]) is None


def test_a_single_call_has_no_spread_to_be_outside_of():
    slow = row("b", latency=2.0)
    assert dominating(slow, [row("a", calls=1), slow]) is None
    once = row("b", latency=2.0, calls=1)
    assert dominating(once, [row("a"), once]) is None


def test_a_row_that_loses_score_dominates_only_those_that_lose_it_too():
    bad, good = row("bad", latency=0.5, score=-5.0), row("good", psnr=40.0)
    assert dominating(good, [bad, good]) is None
    other = row("other", score=-5.0)
    assert dominating(other, [bad, other]) == "bad"


def test_the_fastest_of_those_that_dominate_is_named():
    slow = row("slow", latency=3.0)
    assert dominating(slow, [row("a", latency=2.0), row("b"), slow]) == "b"


def test_two_equal_rows_do_not_dominate_each_other():
    a, b = row("a"), row("b")
    assert dominating(a, [a, b]) is dominating(b, [a, b]) is None


ROWS = [
    REFERENCE,
    row("bf16", latency=0.6, memory=0.5, psnr=35.0),
    row("20 steps", latency=0.4, psnr=20.0),
    row("4 steps", latency=0.1, psnr=10.0, score=-5.0),
    refused("offload"),
]


@pytest.mark.parametrize(
    ("limits", "name", "why"),
    [
        (Limits(), "20 steps", "fastest for one image at a time without a clear loss of CLIP score"),
        (
            Limits(memory_gb=0.7),
            "bf16",
            "fastest for one image at a time with at most 0.7 GB without a clear loss of CLIP score",
        ),
        (Limits(psnr_db=30), "bf16", "fastest for one image at a time with at least 30 dB"),
        (Limits(psnr_db=5), "4 steps", "fastest for one image at a time with at least 5 dB"),
        (Limits(psnr_db=60), "reference", "fastest for one image at a time with at least 60 dB"),
        (Limits(latency_s=0.7), "bf16", "most like the reference with at most 0.7 s"),
        (
            Limits(latency_s=0.7, psnr_db=15),
            "20 steps",
            "fastest for one image at a time with at least 15 dB and at most 0.7 s",
        ),
        (
            Limits(latency_s=0.2),
            None,
            "no row with at most 0.2 s: the lowest latency is 0.4 s (20 steps); 4 steps would keep to it, but is left "
            "out for a clear loss of CLIP score",
        ),
        (Limits(memory_gb=0.1), None, "no row with at most 0.1 GB: the least memory is 0.5 GB (bf16)"),
        (
            Limits(psnr_db=120),
            None,
            "no row with at least 120 dB: the highest PSNR is 100 dB (reference, as much as PSNR can be)",
        ),
        (
            Limits(psnr_db=30, latency_s=0.5),
            None,
            "with at most 0.5 s, the highest PSNR is 20 dB (20 steps); "
            "with at least 30 dB, the lowest latency is 0.6 s (bf16)",
        ),
        (
            Limits(psnr_db=120, memory_gb=0.1, latency_s=0.5),
            None,
            "no row with at least 120 dB and at most 0.5 s, whatever its memory",
        ),
    ],
)
def test_the_best_row_within_limits(limits, name, why):
    chosen, reason = best(ROWS, limits)
    assert chosen == name
    assert why in reason


def test_without_any_row_there_is_no_best():
    assert best([refused("a")], Limits()) == (None, "no row could be measured")


def test_most_images_a_second_are_named_apart_from_the_fastest_call():
    rows = [*ROWS, row("batch 4", latency=1.2, batch=4), row("batch 8", latency=1.6, memory=4.0, batch=8)]
    for limits, most in ((Limits(), "batch 8"), (Limits(memory_gb=2), "batch 4"), (Limits(latency_s=0.5), "20 steps")):
        assert most_images(rows, limits) == most
    assert most_images(rows, Limits(memory_gb=0.1)) is None


def test_a_call_of_several_images_is_called_one():
    rows = [row("reference", psnr=None, batch=8), row("bf16", latency=0.5, batch=8)]
    assert best(rows, Limits(psnr_db=30)) == ("bf16", "fastest call, of 8 images with at least 30 dB")
