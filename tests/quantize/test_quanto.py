"""optimum-quanto: rounding, and checkpoints that load right or not at all."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from contract import computes_in_float, counts_as_before, refuses_what_it_cannot_do, rounds_within, shrinks_the_file
from fresh import digest, in_a_new_process
from safetensors.torch import load_file, save_file

import compress
from compress.errors import UserError
from compress.models.inputs import small_inputs
from compress.quantize.quanto import Config, quantize_weights
from compress.store.checkpoint import load_checkpoint
from tests.tiny import tiny_pipeline, tiny_unet

STEPS = {"int8": 0.5 / 127, "fp8": 2**-4, "int4": 1 / 15, "int2": 1 / 3}
"""Largest rounding error as a share of the channel's largest weight: half of the distance of two levels."""


@pytest.mark.parametrize("keys", [{"weights": "int3"}, {"skip": [""]}])
def test_values_are_checked(keys: dict) -> None:
    with pytest.raises(UserError, match=next(iter(keys)) + "="):
        Config(**keys)


@pytest.fixture
def quanto() -> None:
    pytest.importorskip("optimum.quanto")


@pytest.mark.parametrize("weights", STEPS)
def test_the_contract(weights: str, quanto: None) -> None:
    quantize = partial(quantize_weights, weights=weights)
    report = rounds_within(quantize, STEPS[weights])
    assert {"conv_in", "conv_out"} - {*report.modules} == {"conv_in"}  # convolutions too
    counts_as_before(quantize)
    computes_in_float(quantize)


def test_refusals(quanto: None) -> None:
    refuses_what_it_cannot_do(quantize_weights)


@pytest.fixture
def saved(tmp_path: Path, quanto: None) -> Path:
    pipeline, _ = compress.quantize(tiny_pipeline(), "quanto_int4", skip=["conv_out"])
    return compress.save(pipeline, tmp_path / "c")


def test_a_new_process_computes_the_same_after_import_compress_and_refuses_without(saved: Path, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "float")
    shrinks_the_file(saved, tmp_path / "float", 0.3)
    unet = load_checkpoint(saved).unet
    assert type(unet.conv_out.weight) is torch.nn.Parameter
    inputs = small_inputs(unet)
    torch.save(inputs, saved.with_suffix(".pt"))
    (alone,) = in_a_new_process([saved], tmp_path / "alone.json").values()
    assert list(alone) == ["error"] and "Unknown quantization type, got quanto_layers" in alone["error"]
    (after,) = in_a_new_process([saved], tmp_path / "after.json", "compress").values()
    assert after == {"stock": digest(unet, inputs)}
    info = json.loads((saved / "compress.json").read_text())
    assert info["versions"]["optimum-quanto"] and "Say `import compress`" in (saved / "README.md").read_text()


@pytest.mark.parametrize(
    "lost", ["conv_in.weight._data._data", "conv_in.weight._scale", "conv_in.bias", "conv_out.bias"]
)
def test_a_lost_tensor_never_becomes_a_random_one(lost: str, saved: Path) -> None:
    file = saved / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"the weight files lack {lost}"):
        load_checkpoint(saved)


def test_it_is_not_taken_for_a_model_in_float(saved: Path) -> None:
    folder = saved.with_name("bare")
    shutil.copytree(saved, folder)
    (folder / "compress.json").unlink()
    with pytest.raises(UserError, match="quantized already"):
        compress.load(folder)


def test_half_precision_reads_back_bit_for_bit(tmp_path: Path, quanto: None) -> None:
    pipeline, _ = compress.quantize(tiny_pipeline().to(torch.bfloat16), "quanto_int8")
    loaded = load_checkpoint(compress.save(pipeline, tmp_path / "c"), dtype=torch.bfloat16)
    assert loaded.unet.conv_in.weight.dtype == torch.bfloat16


def test_a_layer_with_two_names_is_quantized_once(quanto: None) -> None:
    unet = tiny_unet()
    unet.again = unet.conv_in  # type: ignore[assignment]
    quantize_weights(unet)
    assert unet.again is unet.conv_in and "again" not in dict(unet.named_modules())
