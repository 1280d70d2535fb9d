"""int8 weights: what is rounded, by how much, what stays, and what it saves on the disk."""

import json

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.evaluate.cost import weight_bytes
from compress.quantize import int8 as stage
from compress.quantize.int8 import Config, quantize_weights
from compress.stage import StageContext
from compress.store.checkpoint import load_checkpoint, save_checkpoint
from tests.tiny import tiny_pipeline, tiny_unet


def layers(unet):
    """Conv2d and Linear modules by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def stored(weight):
    """The quantized weight as float32 numbers: integers times scale."""
    return weight.qdata.float() * weight.scale.float().reshape(-1, *[1] * (weight.dim() - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_within_half_a_step(dtype):
    unet = tiny_unet().to(dtype)
    unet.conv_in.weight[0] *= 1e-4  # a channel so small that float16 has few numbers for its scale
    before = {name: module.weight.detach().float().clone() for name, module in layers(unet).items()}
    report = quantize_weights(unet)
    assert set(report.modules) == before.keys()
    for name, module in layers(unet).items():
        weight = module.weight
        assert weight.qdata.dtype == torch.int8 and weight.dtype == dtype
        scale = weight.scale.float().flatten()
        assert scale.numel() == before[name].shape[0]  # one per output channel
        assert weight.zero_point.count_nonzero() == 0 and weight.qdata.min() >= -127
        error = (stored(weight) - before[name]).abs().flatten(1).amax(1)
        assert (error <= scale / 2 * (1 + 1e-4)).all(), name
    if dtype == torch.float32:
        assert 0 < max(report.rounding.values()) <= 0.5 / 127 * (1 + 1e-4)


def test_the_function_changes_little_and_gradients_are_off():
    unet, exact = tiny_unet(), tiny_unet()
    quantize_weights(unet)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        ours, theirs = unet(sample, 10, text).sample, exact(sample, 10, text).sample
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.03
    assert not any(module.weight.requires_grad for module in layers(unet).values())


def test_the_file_shrinks_to_less_than_a_third(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "float")
    quantize_weights(pipeline.unet)
    pipeline.save_pretrained(tmp_path / "int8")
    small, large = (weight_bytes(tmp_path / name / "unet")[0] for name in ("int8", "float"))
    assert small < 0.33 * large


def test_coverage_adds_up():
    unet = tiny_unet()
    total = sum(parameter.numel() for parameter in unet.parameters())
    report = quantize_weights(unet, skip=["conv_in", "*.to_k"])
    in_float = sum(entry["params"] for entry in report.left_float.values())
    skipped = sum(layers(unet)[name].weight.numel() for name in report.skipped)
    assert report.params == pytest.approx(1 - (in_float + skipped) / total)
    assert report.left_float.keys() == {"bias", "norm"}
    assert report.macs is not None and 0.5 < report.macs < 1
    assert report.skipped["conv_in"] == "asked for by skip: conv_in"
    assert all(name == "conv_in" or name.endswith(".to_k") for name in report.skipped)
    assert type(unet.conv_in.weight) is nn.Parameter


def test_macs_count_attention_as_float():
    report = quantize_weights(tiny_unet())
    assert report.macs is not None and 0.9 < report.macs < 1


def test_skipped_modules_stay_in_float_through_the_disk(tmp_path):
    pipeline = tiny_pipeline()
    quantize_weights(pipeline.unet, skip=["time_embedding.*", "conv_out"])
    save_checkpoint(pipeline, tmp_path / "c", {})
    loaded = load_checkpoint(tmp_path / "c").unet
    assert type(loaded.conv_out.weight) is nn.Parameter
    assert torch.equal(loaded.time_embedding.linear_1.weight, pipeline.unet.time_embedding.linear_1.weight)
    assert loaded.conv_in.weight.qdata.dtype == torch.int8


def test_zero_channels_stay_zero():
    unet = tiny_unet()
    unet.conv_out.weight.zero_()
    unet.time_embedding.linear_1.weight[3] = 0
    report = quantize_weights(unet)
    assert report.zero_channels == 5
    assert unet.conv_out.weight.dequantize().count_nonzero() == 0
    assert all(torch.isfinite(torch.tensor(value)) for value in report.rounding.values())


def test_what_cannot_be_quantized_is_refused_and_left_as_it_was():
    unet = tiny_unet()
    for skip, words in ((["nothing.*"], "skip=nothing"), (["*"], "leave a Conv2d")):
        with pytest.raises(UserError, match=words):
            quantize_weights(unet, skip=skip)
    unet.conv_out.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="conv_out"):
        quantize_weights(unet)
    assert all(type(module.weight) is nn.Parameter for module in layers(unet).values())
    unet.conv_out.weight[0, 0, 0, 0] = 0
    quantize_weights(unet)
    with pytest.raises(UserError, match="quantized already"):
        quantize_weights(unet)


@pytest.mark.parametrize("keys", [{"bits": 4}, {"bits": True}, {"skip": [""]}, {"skip": [3]}])
def test_the_config_checks_its_ranges(keys):
    with pytest.raises(UserError, match=next(iter(keys)) + "="):
        Config(**keys)


def test_the_stage_reports(tmp_path):
    pipeline = tiny_pipeline()
    context = StageContext(
        load_teacher=tiny_pipeline,
        data=None,
        folder=tmp_path,
        history=[],
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        log=lambda metrics, step: None,
    )
    report = stage.run(pipeline, Config(skip=["conv_in"]), context)
    assert report.coverage["modules"] == len(layers(pipeline.unet)) - 1
    assert list(report.coverage["skipped"]) == ["conv_in"]
    assert report.details["rounding"]["largest"] <= 0.5 / 127 * (1 + 1e-4)
    assert len(report.details["rounding"]["worst_modules"]) == 5
    json.dumps([report.coverage, report.details])
