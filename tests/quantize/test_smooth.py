"""Smoothing changes what layers get and not what they compute; which norms it may touch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import compress
from compress.errors import UserError
from compress.models.inputs import example_inputs, predict, small_inputs
from compress.models.quantized import ranges_of
from compress.quantize.packed import Config as Packed
from compress.quantize.ranges.inputs import int8_inputs
from compress.quantize.ranges.smooth import balance, fed_layers
from compress.quantize.w8a8 import Config, check
from compress.runtime.fake import float_model
from tests.pipelines import PIPELINES
from tests.tiny import tiny_pipeline, tiny_unet

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
FED = {
    "norm1": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "norm2": ["attn2.to_q"],
    "norm3": ["ff.net.0.proj"],
}


def with_outliers(unet: Any) -> Any:
    """The same function, but a few channels of every LayerNorm's output are far larger than the others."""
    generator = torch.Generator().manual_seed(0)
    fed, _ = fed_layers(unet, int8_inputs(unet), small_inputs(unet))
    with torch.no_grad():
        for norm, names in fed.items():
            module = unet.get_submodule(norm)
            factor = torch.ones(len(module.weight))
            factor[torch.randperm(len(factor), generator=generator)[:3]] = 40.0
            module.weight *= factor
            module.bias *= factor
            for name in names:
                unet.get_submodule(name).weight /= factor
    return unet


def test_the_norms_of_a_block_feed_their_layers() -> None:
    unet = tiny_unet()
    fed, left = fed_layers(unet, int8_inputs(unet), small_inputs(unet))
    assert {norm: fed[f"{BLOCK}.{norm}"] for norm in FED} == {
        norm: [f"{BLOCK}.{name}" for name in names] for norm, names in FED.items()
    }
    assert not left and len(fed) == len([m for m in unet.modules() if isinstance(m, nn.LayerNorm)])
    _, left = fed_layers(unet, int8_inputs(unet, skip=[f"{BLOCK}.attn1.to_k"]), small_inputs(unet))
    assert left == {f"{BLOCK}.norm1": "its output goes elsewhere too"}


class Branching(nn.Module):
    """The outputs of some norms are added, reshaped or returned."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(7))
        self.plain = nn.LayerNorm(8, elementwise_affine=False)
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(7))

    def forward(self, sample: Tensor, return_dict: bool = True) -> tuple[Tensor, Tensor]:
        alone, added, viewed, last, typed, joined, changed = (norm(sample) for norm in self.norms)
        assert alone.shape == sample.shape and alone.dim() == 3
        total = self.linears[0](alone) + self.linears[1](added) + added
        total = total + self.linears[2](viewed.flatten(0, 1)).view_as(total) + self.linears[3](self.plain(sample))
        total = total + self.linears[5](joined) + torch.cat([joined, joined])[:2] + self.linears[6](changed.mul_(2))
        return total + self.linears[4](typed.to(torch.float32)) + self.linears[4](typed), last


def test_outputs_that_go_elsewhere_are_left_alone() -> None:
    model = Branching()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fed, left = fed_layers(model, layers, {"sample": torch.randn(2, 3, 8)})
    assert fed == {"norms.0": ["linears.0"], "norms.4": ["linears.4"]}
    assert left.keys() == {"plain", "norms.1", "norms.2", "norms.3", "norms.5", "norms.6"}
    assert left["plain"] == "it has no scale and shift"


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_function_stays_and_channels_become_alike(alpha: float) -> None:
    unet = with_outliers(tiny_unet())
    inputs = example_inputs(unet, batch=2, seed=0)
    before = predict(unet, inputs)
    fed, _ = fed_layers(unet, int8_inputs(unet), inputs)
    for norm, names in fed.items():
        module: Any = unet.get_submodule(norm)
        largest = 3 * module.weight.abs() + module.bias.abs()
        balance(module, [unet.get_submodule(name) for name in names], largest, alpha)
        if alpha == 1:
            assert torch.allclose(3 * module.weight.abs() + module.bias.abs(), torch.ones(len(largest)))
    assert (predict(unet, inputs) - before).abs().max() <= 1e-5 * before.abs().max()


def test_zero_channels_and_columns_stay() -> None:
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[:, 1] = 0
        balance(norm, [linear], torch.tensor([0.0, 2.0, 2.0, 2.0]), 0.5)
    assert norm.weight[:2].tolist() == [1, 1] and linear.weight.isfinite().all() and norm.weight[2] != 1


@pytest.mark.parametrize("choice", ["w8a8", "w4a8"])
def test_a_stage_with_outliers_loses_less_and_loads(choice: str, tiny_parquet: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(unet=with_outliers(tiny_unet()))
    inputs = example_inputs(pipeline.unet, batch=2, seed=0)
    exact = predict(pipeline.unet, inputs)
    errors = {}
    for smooth in (None, 0.5):
        keys: dict[str, Any] = {"data": tiny_parquet, "calibration": {"examples": 2, "steps": 2}, "smooth": smooth}
        student, report = compress.quantize(pipeline, choice, ranges="absmax", **keys)
        fake = float_model(student.unet, ranges_of(student.unet))
        errors[smooth] = float((predict(fake, inputs) - exact).norm())
        assert ("smoothed" in report.details) == (smooth is not None)
    assert f"{BLOCK}.norm1" in report.details["smoothed"] and report.details["not_smoothed"] == {}
    assert errors[0.5] < (0.7 if choice == "w8a8" else 1) * errors[None]
    folder = compress.save(student, tmp_path / "checkpoint")
    loaded = DiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32, trust_remote_code=True)
    assert torch.equal(predict(loaded.unet, inputs), predict(student.unet, inputs))


def test_models_whose_norms_have_no_scale_are_told_so(tiny_parquet: Path) -> None:
    with pytest.raises(UserError, match="smooth=0.5: expected null: no LayerNorm of this denoiser"):
        check(Config(smooth=0.5), PIPELINES["pixart"]().transformer, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="smooth=0.5: expected null: no LayerNorm with a scale"):
        compress.quantize(PIPELINES["pixart"](), "w8a8", smooth=0.5, data=tiny_parquet)


def test_values_are_checked() -> None:
    for value in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"smooth={value}: expected a number from 0 to 1"):
            Config(smooth=value)
    with pytest.raises(UserError, match="smooth=0.5: expected null with activations=none"):
        Packed(bits=4, smooth=0.5)
