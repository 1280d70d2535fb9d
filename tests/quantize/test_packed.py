"""Packed weights of whole models: what is stored, how it loads, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import compress
from compress.errors import UserError
from compress.evaluate.cost.size import memory_bytes
from compress.models.folder import check_folder
from compress.models.inputs import example_inputs, predict
from compress.models.outline import Outline
from compress.models.quantized import DYNAMIC, ranges_of
from compress.quantize.packed import Config, check, choose_schemes, pack_weights
from compress.runtime.fake import FakeQuantized, float_model
from tests.tiny import tiny_pipeline, tiny_unet

# In a process without compress: from each checkpoint and the inputs beside it to an output; the last one draws.
LOAD = """
import torch
from diffusers import DiffusionPipeline
for folder in arguments:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=True)
    torch.save(pipeline.unet(**torch.load(folder + ".pt")).sample, folder + ".out.pt")
pipeline.set_progress_bar_config(disable=True)
image = pipeline("a cat", num_inference_steps=1, height=16, width=16, output_type="pt").images
assert image.isfinite().all()
for name in ("vae", "text_encoder", "unet"):
    assert any(hasattr(layer, "packing") for layer in getattr(pipeline, name).modules()), name
"""


def test_stock_diffusers_reads_back_the_same_bits(tmp_path: Path, stranger: Callable[..., str]) -> None:
    """Every scheme, and one checkpoint whose other components have schemes of their own."""
    others: dict[str, Any] = {"components": {"vae": {"bits": 8}, "text_encoder": {"granularity": "channel"}}}
    pipeline = tiny_pipeline()
    students = {choice: compress.quantize(pipeline, choice) for choice in ("int4", "nf4", "fp8", "palette4")}
    students["others"] = compress.quantize(pipeline, "int4", **others)
    inputs = example_inputs(pipeline.unet, batch=1, seed=0)
    for name, (student, _) in students.items():
        compress.save(student, tmp_path / name)
        torch.save(inputs, tmp_path / f"{name}.pt")
    stranger(LOAD, *(tmp_path / name for name in students))
    for name, (student, _) in students.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.out.pt"), predict(student.unet, inputs)), name
    small, report = students["others"]
    assert set(report.details["components"]) == {"vae", "text_encoder"}
    for name in ("vae", "text_encoder"):
        assert memory_bytes(getattr(small, name)) < 0.6 * memory_bytes(getattr(pipeline, name))


@pytest.mark.parametrize(("choice", "bits"), [("int4", 4.5), ("nf4", 4.25), ("fp8", 8), ("palette4", 4)])
def test_bytes_are_those_of_the_scheme(choice: str, bits: float) -> None:
    unet = tiny_unet()
    config = Config(**{**choices()[choice], "layers": {}})
    weights = sum(unet.get_submodule(name).weight.numel() for name in choose_schemes(unet, config))
    scales = sum(len(unet.get_submodule(name).weight) for name in choose_schemes(unet, config))
    left = memory_bytes(unet) - 4 * weights
    pack_weights(unet, choose_schemes(unet, config))
    expected = weights * bits / 8 + {"fp8": 2 * scales, "palette4": 64 * len(choose_schemes(tiny_unet(), config))}.get(
        choice, 0
    )
    assert memory_bytes(unet) - left == pytest.approx(expected, rel=0.02)


def choices() -> dict[str, dict[str, Any]]:
    """Of ``conf/quantize``, the keys that make a scheme."""
    return {
        "int4": {"bits": 4, "granularity": "group", "symmetric": False},
        "nf4": {"format": "nf4", "bits": 4, "granularity": "group"},
        "fp8": {"format": "fp8", "bits": 8},
        "palette4": {"format": "palette", "bits": 4, "granularity": "tensor"},
    }


def test_sensitive_layers_keep_eight_bits_unless_told_otherwise() -> None:
    schemes = choose_schemes(tiny_unet(), Config(bits=4))
    assert schemes["conv_in"].bits == schemes["conv_out"].bits == schemes["time_embedding.linear_1"].bits == 8
    assert {scheme.bits for scheme in schemes.values()} == {4, 8}
    assert {scheme.bits for scheme in choose_schemes(tiny_unet(), Config(bits=4, layers={})).values()} == {4}
    mixed = choose_schemes(tiny_unet(), Config(bits=4, layers={"*": {"bits": 3}, "*.to_k": {"format": "palette"}}))
    assert str(mixed["conv_in"]).startswith("int3") and {
        scheme.format for name, scheme in mixed.items() if name.endswith("to_k")
    } == {"palette"}


def test_an_engine_computes_with_the_packed_weights_and_the_ranges(tiny_parquet: Path) -> None:
    keys: dict[str, Any] = {"data": tiny_parquet, "calibration": {"examples": 1, "steps": 2}}
    student, report = compress.quantize(tiny_pipeline(), "w4a8", **keys)
    assert report.details["scheme"]["activations"] == "static" and report.details["int8_inputs"] > 40
    ranges = ranges_of(student.unet)
    plain = float_model(student.unet, {})
    inputs = example_inputs(student.unet, batch=1, seed=0)
    assert torch.allclose(predict(plain, inputs), predict(student.unet, inputs), atol=1e-6)
    fake = float_model(student.unet, ranges)
    layers = [module for module in fake.modules() if isinstance(module, FakeQuantized)]
    assert len(layers) == len(ranges)
    for layer in layers:
        assert layer.scale is not None
        levels = layer.weight / layer.scale.view(-1, *[1] * (layer.weight.dim() - 1))
        assert levels.round().abs().max() <= 7 and torch.allclose(levels, levels.round(), atol=1e-4)


def test_a_component_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="components=vaee: expected one of"):
        outline = Outline("StableDiffusionPipeline", {}, {"vae": {}, "unet": {}})
        check(Config(bits=4, components={"vaee": {}}), tiny_unet(), outline)
    for name in ("vaee", "tokenizer", "unet"):
        with pytest.raises(UserError, match=f"components={name}: expected one of vae, text_encoder"):
            compress.quantize(tiny_pipeline(), "int4", components={name: {}})


def test_packed_weights_are_not_packed_again_or_pruned(tmp_path: Path) -> None:
    student, _ = compress.quantize(tiny_pipeline(), "int4")
    teacher = tiny_pipeline()
    for again in (
        lambda: compress.quantize(student, "int4"),
        lambda: compress.prune(student, "magnitude"),
        lambda: compress.distill(student, teacher=teacher, data="none"),
    ):
        with pytest.raises(UserError, match="needs float weights, and the PackedUNet2DConditionModel is quantized"):
            again()
    folder = compress.save(student, tmp_path / "checkpoint")
    with pytest.raises(UserError, match="quantized already"):
        check_folder(folder)


def test_a_damaged_packing_is_refused(tmp_path: Path) -> None:
    student, _ = compress.quantize(tiny_pipeline(), "nf4")
    folder = compress.save(student, tmp_path / "checkpoint")
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["packed_layers"]["no_such_layer"] = config["packed_layers"].pop("conv_in")
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no_such_layer is no module"):
        DiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": {"nothing.*": {"bits": 8}}}, r"layers=nothing\.\*: expected a pattern"),
        ({"skip": ["zzz"]}, "skip=zzz: expected a pattern"),
        ({"granularity": "group", "group_size": 10**6}, "group_size=1000000: expected at most"),
    ],
)
def test_what_fits_no_layer_is_refused_beforehand(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(Config(bits=4, **keys), tiny_unet(), Outline("StableDiffusionPipeline", {}, {}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"search": "best"}, "search=best"),
        ({"rounding": "up"}, "rounding=up: expected one of nearest, gptq"),
        ({"search": "hqq"}, "search=hqq: expected symmetric=false"),
        ({"format": "palette", "granularity": "group"}, "granularity=group: expected tensor or channel"),
        ({"layers": {"conv_in": {"bit": 8}}}, "layers.conv_in="),
        ({"layers": {"conv_in": {"bits": 11}}}, "layers.conv_in: bits=11"),
    ],
)
def test_values_are_checked(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**{"bits": 4, **keys})


def test_dynamic_inputs_of_packed_layers_need_no_data() -> None:
    small, report = compress.quantize(tiny_pipeline(), "w4a8", activations="dynamic")
    assert set(ranges_of(small.unet).values()) == {DYNAMIC} and report.details["int8_inputs"] > 20
