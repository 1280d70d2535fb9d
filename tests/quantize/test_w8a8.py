"""Ranges of inputs: what they are found from, how, and which layers get one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compress.data.calls import CallsConfig
from compress.errors import UserError
from compress.models.quantized import ranges_of
from compress.quantize.ranges.inputs import find_ranges, int8_inputs, observed
from compress.quantize.w8a8 import Config, run
from compress.runtime.fake import activation_step
from tests.tiny import tiny_pipeline, tiny_unet


def rounded(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    step, zero = activation_step(low, high)
    return ((values / step).round() + zero).clamp(0, 255).sub(zero) * step


def test_ranges_of_each_method() -> None:
    values = torch.cat([torch.linspace(-1, 3, 40_001), torch.tensor([-80.0, 100.0])])
    seen = {"layer": list(values.split(10_000))}
    assert find_ranges(seen, "absmax")["layer"] == (-80.0, 100.0)
    low, high = find_ranges(seen, "percentile")["layer"]
    assert low == pytest.approx(-1, abs=0.01) and high == pytest.approx(3, abs=0.01)
    errors = {}
    for method in ("absmax", "percentile", "mse"):
        low, high = find_ranges(seen, method)["layer"]
        errors[method] = float((rounded(values, low, high) - values).square().mean())
    assert errors["mse"] <= min(errors.values())


def test_zero_is_always_a_level_and_layers_without_calls_have_no_range() -> None:
    found = find_ranges({"high": [torch.tensor([3.0, 5.0])], "zeros": [torch.zeros(4)], "unused": []}, "mse")
    assert found["high"][0] == 0 and found["high"][1] > 3
    assert found["zeros"] == (0.0, 0.0) and "unused" not in found
    with pytest.raises(UserError, match="the input of layer is NaN or infinite"):
        find_ranges({"layer": [torch.tensor([1.0, float("nan")])]}, "mse")


def test_the_lowest_and_highest_value_of_a_large_input_are_seen() -> None:
    layer = nn.Linear(64, 1)
    inputs = torch.rand(1000, 64)
    inputs[500, 31], inputs[7, 2] = 9.0, -7.0
    with observed({"layer": layer}) as seen:
        layer(inputs)
    assert len(seen["layer"][0]) < 5000
    assert find_ranges(seen, "absmax")["layer"] == (-7.0, 9.0)
    layer(inputs)
    assert len(seen["layer"]) == 1, "the hooks are gone"


def test_a_stage_sees_every_step_and_both_passes_of_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()
    rows: list[int] = []
    pipeline.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    config = Config(calibration=CallsConfig(examples=3, steps=4, side=None))
    context: Any = SimpleNamespace(data=SimpleNamespace(text=["a cat", "a dog"]), seed=0, dtype=torch.float32)
    report = run(pipeline, config, context)
    assert rows[:4] == [6, 6, 6, 6]
    ranges = ranges_of(pipeline.unet)
    assert report.details["int8_inputs"] == len(ranges) > 40
    floats = set(report.details["float_inputs"])
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= floats and not floats & set(ranges)
    assert report.coverage["params"] > 0.9 and report.details["scheme"]["activations"] == "static"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"float_inputs": ["nothing_like_it"]}, "float_inputs=nothing_like_it: expected a pattern that matches"),
        ({"float_inputs": ["*"]}, "float_inputs=.*: expected patterns that leave a layer"),
        ({"skip": ["zzz"]}, "skip=zzz: expected a pattern that matches"),
    ],
)
def test_patterns_that_match_nothing_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        int8_inputs(tiny_unet(), **keys)


@pytest.mark.parametrize("keys", [{"ranges": "hqq"}, {"skip": [""]}, {"float_inputs": [3]}])
def test_values_are_checked(keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(keys))}="):
        Config(**keys)


def test_two_stages_give_the_same_ranges(tiny_parquet: Path) -> None:
    import compress

    keys: dict[str, Any] = {"data": tiny_parquet, "calibration": {"examples": 2, "steps": 2}}
    first, second = (ranges_of(compress.quantize(tiny_pipeline(), "w8a8", **keys)[0].unet) for _ in range(2))
    assert first == second
