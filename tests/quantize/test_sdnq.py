"""SDNQ: rounding, small layers too, and a checkpoint that stock diffusers loads."""

from functools import partial
from pathlib import Path

import pytest
import torch
from contract import computes_in_float, counts_as_before, refuses_what_it_cannot_do, rounds_within, shrinks_the_file
from fresh import digest, in_a_new_process

import compress
from compress.errors import UserError
from compress.models.inputs import small_inputs
from compress.quantize.sdnq import Config, quantize_weights
from compress.quantize.weights.scheme import Scheme
from compress.store.checkpoint import load_checkpoint
from tests.tiny import tiny_pipeline, tiny_unet

STEPS = {"int8": 0.5 / 127, "uint8": 1 / 255, "int4": 1 / 7, "uint4": 1 / 15, "int2": 1.0}
"""Largest rounding error as a share of the channel's largest weight. The lowest level of ``int4`` and ``int2`` has no
opposite."""


@pytest.mark.parametrize("keys", [{"weights": "int9"}, {"group_size": 1}, {"group_size": True}, {"skip": [3]}])
def test_values_are_checked(keys: dict) -> None:
    with pytest.raises(UserError, match=next(iter(keys)) + "="):
        Config(**keys)


def test_the_scheme() -> None:
    assert Config().scheme == Scheme()
    assert str(Config("uint4", 0).scheme) == "int4, groups of 64, asymmetric"
    assert str(Config("int6", 32).scheme) == "int6, groups of 32"


@pytest.fixture
def sdnq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")  # of many tiny layers it takes minutes; read at the first import
    pytest.importorskip("sdnq")


@pytest.mark.parametrize("weights", STEPS)
def test_the_contract(weights: str, sdnq: None) -> None:
    quantize = partial(quantize_weights, weights=weights)
    report = rounds_within(quantize, STEPS[weights])
    smallest = min(tiny_unet().get_submodule(name).weight.numel() for name in report.modules)  # type: ignore
    assert "conv_out" in report.modules and smallest < 16_384
    counts_as_before(quantize)
    computes_in_float(quantize)


def test_refusals(sdnq: None) -> None:
    refuses_what_it_cannot_do(quantize_weights)


@pytest.mark.parametrize("option", ["sdnq_int8", "sdnq_uint4"])
def test_stock_diffusers_computes_the_same_in_a_new_process(option: str, sdnq: None, tmp_path: Path) -> None:
    pipeline, report = compress.quantize(tiny_pipeline(), option, skip=["conv_out", "time_embedding.*"])
    saved = compress.save(pipeline, tmp_path / "c")
    tiny_pipeline().save_pretrained(tmp_path / "float")
    shrinks_the_file(saved, tmp_path / "float", 0.35)
    unet = load_checkpoint(saved).unet
    assert type(unet.conv_out) is torch.nn.Conv2d and type(unet.time_embedding.linear_1) is torch.nn.Linear
    inputs = small_inputs(unet)
    torch.save(inputs, saved.with_suffix(".pt"))
    (found,) = in_a_new_process([saved], tmp_path / "found.json").values()
    assert found == {"stock": digest(unet, inputs)}
    assert report.coverage["params"] > 0.8
