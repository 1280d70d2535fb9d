"""Lines about stages and the table of layer types."""

import torch

from compress.evaluate.cost.memory import watch_memory
from compress.report.stages import change, effort, layer_types


def test_what_changed() -> None:
    assert change({"details": {"widths_before": [64, 128], "widths_after": [48, 96]}}) == (
        "widths by level 64, 128 → 48, 96"
    )
    depth = {"config_before": {"layers_per_block": 2, "mid_block_type": "UNetMidBlock2DCrossAttn"}}
    depth["config_after"] = {"layers_per_block": [1, 2], "mid_block_type": None}
    assert change({"details": depth}) == "layers_per_block 2 → 1, 2; mid_block_type UNetMidBlock2DCrossAttn → None"
    assert change({}) == change({"details": {"steps": 3}}) == ""


def test_time_and_memory() -> None:
    stage = {"seconds": 12.4, "peak_memory_bytes": 1.5e9, "peak_memory_of": "resident memory"}
    assert effort(stage) == "12 s, at most 1.50 GB of resident memory"
    assert effort({"seconds": 3.0}) == "3 s"
    assert effort({}) == ""


def test_layers_by_type() -> None:
    teacher = {"params_by_type": {"Conv2d": 2_000_000, "Linear": 1_000_000}, "macs_by_type": {"Conv2d": 3 * 10**9}}
    student = {"params_by_type": {"Conv2d": 500_000}, "macs_by_type": {"Conv2d": 10**9, "attention products": 10**8}}
    table = layer_types({"teacher": {"cost": teacher}, "stages": [{"name": "prune", "cost": student}]})
    assert table.splitlines() == [
        "| parameters (M), MACs (G) | teacher | prune |",
        "|---|---:|---:|",
        "| Conv2d | 2, 3 | 0.5, 1 |",
        "| Linear | 1, 0 | 0, 0 |",
        "| attention products | 0, 0 | 0, 0.1 |",
    ]
    assert layer_types({"teacher": {"cost": {}}, "stages": []}) == ""


def test_memory_is_that_of_the_time_watched() -> None:
    found = watch_memory(torch.device("cpu"))
    before = found()["peak_memory_bytes"]
    held = torch.ones(100_000_000 // 4)
    del held
    after = found()
    assert after["peak_memory_bytes"] - before > 80_000_000
    assert after["peak_memory_of"].startswith("resident memory")
