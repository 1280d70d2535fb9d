"""Bits by layer: the assignment is the best one, it is packed, and it can be used again."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.config.compose import compose
from compress.errors import UserError
from compress.jobs import run_job
from compress.models.inputs import example_inputs, predict
from compress.quantize.mixed.solve import assign
from compress.quantize.mixed_bits import BitsTarget, Config
from tests.tiny import tiny_pipeline

QUICK: dict[str, Any] = {"choices": [2, 4, 8], "search": "absmax"}


def packings(pipeline: Any) -> dict[str, Any]:
    """Of each packed layer of the denoiser, by name."""
    return {name: layer.packing for name, layer in pipeline.unet.named_modules() if hasattr(layer, "packing")}


def test_the_assignment_is_the_best_of_all() -> None:
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        names = "abcde"
        sizes = {name: {2: 2.0 * (i + 1), 4: 4.0 * (i + 1), 8: 8.0 * (i + 1)} for i, name in enumerate(names)}
        errors = {n: {2: float(torch.rand(1, generator=source)), 4: 0.1, 8: 0.001} for n in names}
        every = [dict(zip(names, bits, strict=True)) for bits in itertools.product((2, 4, 8), repeat=5)]

        def total(table: dict[str, dict[int, float]], chosen: dict[str, int]) -> float:
            return sum(table[name][bits] for name, bits in chosen.items())

        found = assign(sizes, errors, size=60)
        least = min(total(errors, chosen) for chosen in every if total(sizes, chosen) <= 60)
        assert total(sizes, found) <= 60 and total(errors, found) == pytest.approx(least, rel=1e-3)
        found = assign(sizes, errors, error=0.35)
        smallest = min(total(sizes, chosen) for chosen in every if total(errors, chosen) <= 0.35)
        assert total(errors, found) <= 0.35 * (1 + 1e-6) and total(sizes, found) == smallest
    with pytest.raises(ValueError, match="no assignment"):
        assign(sizes, errors, size=1)


def test_mixed_bits_beat_the_same_bits_for_all(tiny_parquet: Path) -> None:
    keys: dict[str, Any] = {"data": tiny_parquet, "group_size": 16, "calibration": {"examples": 1, "steps": 2}, **QUICK}
    student, report = compress.quantize(tiny_pipeline(), "mixed_bits", target={"bits": 5.5}, **keys)
    details = report.details
    assert details["bits"] <= 5.5 and len({entry["bits"] for entry in details["layers"].values()}) > 1
    worse = [row for row in details["uniform"] if row["bits"] <= details["bits"]]
    assert worse and all(row["psnr"] < details["psnr"] for row in worse)
    assert all(row[8] > row[2] for row in details["sensitivity"].values())
    assert {
        name: layer.packing for name, layer in student.unet.named_modules() if hasattr(layer, "packing")
    } == details["layers"]


def test_an_assignment_is_a_file_that_the_same_architecture_takes(tmp_path: Path, tiny_overrides: list[str]) -> None:
    out = tmp_path / "out"
    short = ["stages.quantize.calibration.examples=1", "stages.quantize.calibration.steps=1"]
    quick = ("target.bits=6.5", "group_size=16", "choices=[4,8]", "search=absmax")
    wanted = [f"stages.quantize.{key}" for key in quick]
    folders = [f"out={out}", f"store={tmp_path}/store"]
    run_job(compose(["recipe=mixed_bits", *tiny_overrides, *short, *wanted, *folders]))
    layers = json.loads((out / "layers.json").read_text())
    assert (out / "mixed_bits.png").stat().st_size > 5000
    assert "curve" in json.loads((out / "sensitivity.json").read_text())
    again, _ = compress.quantize(tiny_pipeline(), "int4", layers=str(out / "layers.json"))
    found = packings(again)
    assert found == layers
    first = compress.load(out / "checkpoint")
    assert len({packing["bits"] for packing in found.values()}) > 1
    inputs = example_inputs(first.unet, batch=1, seed=0)
    assert predict(first.unet, inputs).isfinite().all()
    with pytest.raises(UserError, match="layers="):
        compress.quantize(tiny_pipeline(), "int4", layers=str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target": BitsTarget()}, "target="),
        ({"target": BitsTarget(bits=4, psnr=30)}, "target="),
        ({"target": BitsTarget(bits=1.5)}, "target.bits=1.5"),
        ({"choices": [4]}, "choices="),
        ({"choices": [4, 9]}, "choices="),
        ({"format": "nf4"}, "format=nf4"),
    ],
)
def test_values_are_checked(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**keys)


def test_a_target_out_of_reach_says_what_is_in_reach(tiny_parquet: Path) -> None:
    keys: dict[str, Any] = {"data": tiny_parquet, "calibration": {"examples": 1, "steps": 1}, **QUICK}
    with pytest.raises(UserError, match=r"target.psnr=190.*expected at most"):
        compress.quantize(tiny_pipeline(), "mixed_bits", target={"bits": None, "psnr": 190.0}, **keys)
    with pytest.raises(UserError, match=r"target.bits=2.1: expected at least"):
        compress.quantize(tiny_pipeline(), "mixed_bits", target={"bits": 2.1}, **keys)
