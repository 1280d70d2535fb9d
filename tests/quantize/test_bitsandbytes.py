"""bitsandbytes: Linear weights; refused where diffusers could not read them back."""

from functools import partial
from pathlib import Path

import pytest
import torch
from contract import counts_as_before, refuses_what_it_cannot_do, rounds_within
from torch import nn

import compress
from compress.errors import UserError
from compress.models.quantized import float_weight, plain_tensors, quantized_layers
from compress.quantize import bitsandbytes as stage
from compress.quantize.bitsandbytes import Config, kept, quantize_weights
from compress.runtime.fake import float_model
from tests.tiny import tiny_pipeline, tiny_unet

STEPS = {"int8": 1.1 / 127, "nf4": 0.16, "fp4": 1 / 6}
"""Largest rounding error as a share of the largest weight: int8 adds the rounding of the scale's float16."""


@pytest.mark.parametrize("keys", [{"weights": "int4"}, {"skip": [""]}])
def test_values_are_checked(keys: dict) -> None:
    with pytest.raises(UserError, match=next(iter(keys)) + "="):
        Config(**keys)


@pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_one_sentence() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="method=bitsandbytes: diffusers loads weights of bitsandbytes on a GPU alone"):
        compress.quantize(tiny_pipeline(), "bnb_nf4")


def test_what_diffusers_cannot_tell_from_a_skipped_layer_stays_in_float() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "block": nn.ModuleDict({"proj": nn.Linear(2, 2)})})
    model["last"], model["conv"] = nn.Linear(2, 2), nn.Conv2d(2, 2, 1)
    assert kept(model, ["proj"]) == {
        "block.proj": "diffusers cannot tell it from proj",
        "conv": "a Conv2d: bitsandbytes knows Linear layers alone",
    }


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("weights", STEPS)
def test_the_contract(weights: str, bitsandbytes: None) -> None:
    quantize = partial(quantize_weights, weights=weights)
    unet = tiny_unet()
    report = quantize(unet)
    assert {type(m) for m in unet.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert report.skipped["conv_out"] == "a Conv2d: bitsandbytes knows Linear layers alone"
    assert 0 < max(report.rounding.values()) <= (STEPS[weights] if weights == "int8" else 1)
    plain = float_model(unet, {})
    for name, layer in quantized_layers(unet).items():
        assert torch.equal(plain.get_submodule(name).weight, float_weight(layer))
    counts_as_before(quantize)


def test_int8_rounds_by_channel(bitsandbytes: None) -> None:
    rounds_within(partial(quantize_weights, weights="int8"), STEPS["int8"])


def test_refusals(bitsandbytes: None) -> None:
    refuses_what_it_cannot_do(quantize_weights)


@pytest.mark.parametrize("weights", STEPS)
def test_diffusers_reads_the_same_weights_back(
    weights: str, bitsandbytes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its question for a GPU, which is all that keeps it from reading them here."""
    from diffusers import UNet2DConditionModel
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(kind, "update_device_map", lambda _, device_map: device_map)
    monkeypatch.setattr(stage, "check_device", lambda: None)
    pipeline, report = compress.quantize(tiny_pipeline(), f"bnb_{weights}", skip=["*.to_k"])
    assert not [name for name in report.details["quantized"] if name.endswith("to_k")]
    pipeline.unet.save_pretrained(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float32)
    ours, theirs = dict(plain_tensors(pipeline.unet)), dict(plain_tensors(loaded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert quantized_layers(loaded).keys() == quantized_layers(pipeline.unet).keys()
