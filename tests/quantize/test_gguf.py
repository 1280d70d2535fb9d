"""GGUF: the file that diffusers reads, and the pipeline that computes what the file does."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract import weights_of
from pipelines import PIPELINES

import compress
from compress.errors import UserError
from compress.models.inputs import predict, small_inputs
from compress.quantize import gguf as stage
from compress.quantize.gguf import TYPES, Config, check_class, kept, write_gguf
from compress.store.checkpoint import save_checkpoint
from tests.tiny import tiny_pipeline, tiny_unet

STEPS = {"q8_0": 1 / 127, "q5_0": 1 / 16, "q5_1": 1.1 / 31, "q4_0": 1 / 8, "q4_1": 1.1 / 15}
"""Largest rounding error as a share of the channel's largest weight."""


@pytest.mark.parametrize("keys", [{"type": "q4_k"}, {"skip": [""]}])
def test_values_are_checked(keys: dict) -> None:
    with pytest.raises(UserError, match=next(iter(keys)) + "="):
        Config(**keys)


@pytest.mark.parametrize("name", ["pixart", "ddpm"])
def test_classes_that_diffusers_reads_no_single_file_of_are_refused(name: str) -> None:
    pipeline: Any = PIPELINES[name]()
    with pytest.raises(UserError, match="from a single file, so a .gguf file of it would have no reader"):
        check_class(pipeline.unet if name == "ddpm" else pipeline.transformer)


def test_what_the_blocks_do_not_fit_is_named() -> None:
    found = kept(tiny_unet(cross_attention_dim=16))
    assert found["conv_in"] == "float16: diffusers decodes .gguf weights in Linear layers alone"
    narrow = [why for name, why in found.items() if name.endswith("attn2.to_k")]
    assert set(narrow) == {"float16: its rows of 16 are no multiple of 32"}


@pytest.fixture
def gguf() -> None:
    pytest.importorskip("gguf")


@pytest.mark.parametrize("type", TYPES)
def test_rounding(type: str, gguf: None, tmp_path: Path) -> None:
    unet: Any = tiny_unet()
    before = weights_of(unet)
    report = write_gguf(unet, tmp_path / "unet.gguf", type, skip=["time_embedding.linear_2"])
    assert report.skipped["time_embedding.linear_2"] == "asked for by skip: time_embedding.linear_2"
    for name, weight in before.items():
        error = (unet.get_submodule(name).weight - weight).abs().flatten(1).amax(1)
        largest = weight.abs().flatten(1).amax(1)
        assert (error <= (STEPS[type] if name in report.modules else 2**-10) * largest * 1.01).all(), name
    assert 0 < max(report.rounding.values()) <= STEPS[type] * 1.01


def test_what_cannot_be_written_is_refused_and_left_as_it_was(gguf: None, tmp_path: Path) -> None:
    unet: Any = tiny_unet()
    before = weights_of(unet)
    for skip, words in ((["nothing.*"], "skip=nothing"), (["*"], "leave a Conv2d or Linear")):
        with pytest.raises(UserError, match=words):
            write_gguf(unet, tmp_path / "x.gguf", skip=skip)
    for value, words in ((float("nan"), "NaN"), (1e6, "float16 cannot hold")):
        unet.time_embedding.linear_1.weight[0, 0] = value
        with pytest.raises(UserError, match=words):
            write_gguf(unet, tmp_path / "x.gguf")
    unet.time_embedding.linear_1.weight[0, 0] = before["time_embedding.linear_1"][0, 0]
    assert all(torch.equal(now, before[name]) for name, now in weights_of(unet).items())
    compress.quantize(unet, "int8")[0]
    quantized, _ = compress.quantize(unet, "int8")
    with pytest.raises(UserError, match="quantized already"):
        write_gguf(quantized, tmp_path / "x.gguf")
    with pytest.raises(UserError, match="gguf leaves a file"):
        compress.quantize(tiny_pipeline(), "gguf_q8_0")


def test_a_damaged_file_is_found(gguf: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = stage._write

    def damaged(file: Path, stored: Any) -> None:
        write(file, stored)
        content = bytearray(file.read_bytes())
        content[-40] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(stage, "_write", damaged)
    with pytest.raises(RuntimeError, match="back different from what was written"):
        write_gguf(tiny_unet(), tmp_path / "x.gguf")


def test_the_code_beside_the_file_loads_it_in_a_new_process(gguf: None, tmp_path: Path) -> None:
    pipeline: Any = tiny_pipeline()
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    context: Any = SimpleNamespace(artifact=artifact)
    report = stage.run(pipeline, Config("q4_0"), context)
    assert (artifact / report.details["file"]).stat().st_size == report.details["file_bytes"]
    save_checkpoint(pipeline, tmp_path / "c", {}, artifact=artifact, libraries=["gguf"])
    inputs = small_inputs(pipeline.unet)
    assert inputs is not None
    torch.save([inputs, predict(pipeline.unet, inputs)], tmp_path / "call.pt")
    code = re.search(r"```python\n(.*?)```", (artifact / "README.md").read_text(), re.DOTALL)
    assert code is not None
    script = code[1].replace("path/to/this/checkpoint", str(tmp_path / "c")) + (
        f"inputs, expected = torch.load({str(tmp_path / 'call.pt')!r})\n"
        "with torch.no_grad():\n    output = pipeline.unet(**{**inputs, 'return_dict': False})[0]\n"
        "assert torch.equal(output, expected)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
