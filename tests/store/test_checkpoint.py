"""Checkpoints: whole, the same in stock diffusers without ``compress``, and never half."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compress.errors import UserError
from compress.models import denoiser
from compress.models.inputs import predict, small_inputs
from compress.quantize.int8 import quantize_weights
from compress.store import checkpoint
from tests.tiny import tiny_pipeline, tiny_unet

# What a user does who has never heard of compress: loads, looks and draws.
STOCK = """
import hashlib, json, sys
import torch
from diffusers import DiffusionPipeline
found = {}
for dtype in (torch.float32, torch.bfloat16):
    pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=dtype)
    types = {}
    for module in pipeline.unet.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            weight = getattr(module.weight, "qdata", module.weight)
            types.setdefault(type(module).__name__, set()).add(str(weight.dtype))
    image = pipeline(
        "a red cat", num_inference_steps=2, output_type="pt", generator=torch.Generator("cpu").manual_seed(3)
    ).images
    found[str(dtype)] = {
        "types": {name: sorted(kinds) for name, kinds in types.items()},
        "finite": bool(torch.isfinite(image).all()),
        "sha256": hashlib.sha256(image.float().numpy().tobytes()).hexdigest(),
    }
assert not any(name.split(".")[0] == "compress" for name in sys.modules)
print(json.dumps(found))
"""
INT8 = {"Conv2d": ["torch.int8"], "Linear": ["torch.int8"]}


def draw(pipeline):
    """The SHA256 of the image that STOCK draws."""
    image = pipeline(
        "a red cat", num_inference_steps=2, output_type="pt", generator=torch.Generator("cpu").manual_seed(3)
    ).images
    return hashlib.sha256(image.float().numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A quantized pipeline and its checkpoint."""
    pipeline = tiny_pipeline()
    quantize_weights(pipeline.unet)
    folder = tmp_path_factory.mktemp("store") / "quantized"
    checkpoint.save_checkpoint(pipeline, folder, {}, card="# a card\n", exact=True, libraries=["torchao"])
    return pipeline, folder


@pytest.fixture
def saved(tmp_path):
    """A small float checkpoint of its own for a test that damages it."""
    folder = tmp_path / "store" / "abc"
    checkpoint.save_checkpoint(tiny_pipeline(widths=(16, 32)), folder, {"recipe": "r"})
    return folder


def test_a_float_checkpoint_reads_back_the_same(saved):
    pipeline = tiny_pipeline(widths=(16, 32))
    loaded = checkpoint.load_checkpoint(saved)
    inputs = small_inputs(pipeline.unet)
    assert torch.equal(predict(loaded.unet, inputs), predict(pipeline.unet, inputs))
    assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())
    info = checkpoint.read_info(saved)
    assert info["recipe"] == "r"
    assert info["probe"]["dtype"] == "float32" and len(info["probe"]["sha256"]) == 64
    assert info["versions"].keys() == {"compress", "torch", "diffusers", "transformers"}
    checkpoint.verify_checkpoint(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["abc"]


def test_stock_diffusers_draws_the_same_with_int8_weights(quantized, tmp_path):
    pipeline, folder = quantized
    command = [sys.executable, "-P", "-c", STOCK, str(folder)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["torch.float32"] == {"types": INT8, "finite": True, "sha256": draw(pipeline)}
    assert found["torch.bfloat16"]["types"] == INT8 and found["torch.bfloat16"]["finite"]
    assert "only bfloat16 is supported" not in run.stderr


def test_int8_weights_are_int8_on_the_disk(quantized):
    with safe_open(quantized[1] / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys() if name.endswith("_weight_qdata")}  # noqa: SIM118
    assert set(kinds.values()) == {"I8"}
    assert {"conv_in._weight_qdata", "time_embedding.linear_1._weight_qdata"} <= kinds.keys()


def test_the_same_weights_give_the_same_bytes(quantized, tmp_path):
    pipeline, folder = quantized
    file = "unet/diffusion_pytorch_model.safetensors"
    for index in range(3):  # the writer's own order would be another each time
        checkpoint.save_checkpoint(pipeline, tmp_path / str(index), {}, exact=True, libraries=["torchao"])
        assert (tmp_path / str(index) / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_run_in_half_precision_reads_back_bit_for_bit(dtype, tmp_path):
    pipeline = tiny_pipeline().to(dtype)
    quantize_weights(pipeline.unet)
    checkpoint.save_checkpoint(pipeline, tmp_path / "half", {}, exact=True)
    loaded = checkpoint.load_checkpoint(tmp_path / "half", dtype=dtype)
    inputs = small_inputs(pipeline.unet, seed=5)
    assert torch.equal(predict(loaded.unet, inputs), predict(pipeline.unet, inputs))
    assert checkpoint.read_info(tmp_path / "half")["probe"]["dtype"] == str(dtype).removeprefix("torch.")


def test_components_in_another_precision_are_kept(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet.to(torch.bfloat16)
    checkpoint.save_checkpoint(pipeline, tmp_path / "mixed", {})
    loaded = checkpoint.load_checkpoint(tmp_path / "mixed", dtype=torch.float32)
    assert torch.equal(loaded.vae.decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)


def test_card_versions_and_permissions(quantized):
    folder = quantized[1]
    assert (folder / "README.md").read_text() == "# a card\n"
    assert "torchao" in checkpoint.read_info(folder)["versions"]
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "compress.json"])
def test_a_flipped_byte_is_found_and_named(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-9] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){name}.*delete the folder {saved}"):
        checkpoint.verify_checkpoint(saved)


def test_missing_and_extra_files_are_found(saved):
    (saved / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt does not belong"):
        checkpoint.verify_checkpoint(saved)
    (saved / "unet" / "notes.txt").unlink()
    (saved / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae/config.json is missing"):
        checkpoint.verify_checkpoint(saved)
    (saved / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=checkpoint.MANIFEST):
        checkpoint.verify_checkpoint(saved)
    with pytest.raises(UserError, match=r"compress.json is missing"):
        checkpoint.read_info(saved / "unet")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    pipeline = tiny_pipeline()

    def full(folder, **_):
        Path(folder).mkdir()
        (Path(folder) / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "save_pretrained", full)
    with pytest.raises(UserError, match=r"No space left.*make room"):
        checkpoint.save_checkpoint(pipeline, tmp_path / "c", {})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"no space left on the disk that holds .* are needed"):
        checkpoint.save_checkpoint(tiny_pipeline(), tmp_path / "c", {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_checkpoint_that_was_there(saved, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "flush", broken)
    with pytest.raises(UserError, match="Input/output error"):
        checkpoint.save_checkpoint(tiny_pipeline(seed=1), saved, {})
    checkpoint.verify_checkpoint(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["abc"]


def test_saving_again_replaces(saved):
    checkpoint.save_checkpoint(tiny_pipeline(seed=1, widths=(16, 32)), saved, {"recipe": "second"})
    checkpoint.verify_checkpoint(saved)
    assert checkpoint.read_info(saved)["recipe"] == "second"
    assert [path.name for path in saved.parent.iterdir()] == ["abc"]


def test_old_leftovers_of_a_killed_save_are_removed(saved):
    old, new = saved.parent / ".abc.1.partial", saved.parent / ".abc.2.partial"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    checkpoint.save_checkpoint(tiny_pipeline(widths=(16, 32)), saved, {})
    assert not old.exists() and new.exists()


def test_checkpoints_of_a_store_share_what_is_equal(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    pipeline = tiny_pipeline(widths=(16, 32))
    checkpoint.save_checkpoint(pipeline, first, {"recipe": "a"}, store=tmp_path)
    with torch.no_grad():
        pipeline.unet.conv_in.bias += 1
    checkpoint.save_checkpoint(pipeline, second, {"recipe": "b"}, "# card\n", store=tmp_path)
    files = [file for file in second.rglob("*") if file.is_file()]
    own = {file.relative_to(second).as_posix() for file in files if file.stat().st_nlink == 1}
    assert own == {
        "README.md", "compress.json", "compress.sha256.json", "unet/diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    shared = (second / "vae" / "diffusion_pytorch_model.safetensors").stat()
    assert shared.st_ino == (first / "vae" / "diffusion_pytorch_model.safetensors").stat().st_ino
    shutil.rmtree(first)
    checkpoint.verify_checkpoint(second)
    assert torch.equal(checkpoint.load_checkpoint(second).unet.conv_in.bias, pipeline.unet.conv_in.bias)


def test_damaged_files_are_not_shared(saved):
    weights = saved / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    (saved / "vae" / "config.json").unlink()
    other = saved.with_name("other")
    checkpoint.save_checkpoint(tiny_pipeline(widths=(16, 32)), other, {}, store=saved.parent)
    checkpoint.verify_checkpoint(other)
    assert (other / "vae" / "diffusion_pytorch_model.safetensors").stat().st_nlink == 1
    assert (other / "unet" / "config.json").stat().st_nlink == 2


def test_where_there_are_no_links_everything_is_written(saved, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    other = saved.with_name("other")
    checkpoint.save_checkpoint(tiny_pipeline(widths=(16, 32)), other, {}, store=saved.parent)
    checkpoint.verify_checkpoint(other)
    assert {file.stat().st_nlink for file in other.rglob("*") if file.is_file()} == {1}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["abc", "other"]


def test_a_shape_that_the_config_cannot_express_is_not_saved(tmp_path):
    pipeline = tiny_pipeline(unet=tiny_unet())
    resnet = denoiser(pipeline).down_blocks[0].resnets[0]
    resnet.conv1 = torch.nn.Conv2d(32, 24, 3, padding=1)  # as if a channel pruner had been here
    resnet.norm2 = torch.nn.GroupNorm(8, 24)
    resnet.time_emb_proj = torch.nn.Linear(resnet.time_emb_proj.in_features, 24)
    resnet.conv2 = torch.nn.Conv2d(24, 32, 3, padding=1)
    with pytest.raises(RuntimeError, match="stock diffusers"):
        checkpoint.save_checkpoint(pipeline, tmp_path / "c", {})
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_computes_something_else_is_not_saved(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet.conv_norm_out.eps = 0.1  # the weights read back the same, the function does not
    with pytest.raises(RuntimeError, match="gives different outputs"):
        checkpoint.save_checkpoint(pipeline, tmp_path / "c", {})
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet.conv_in.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"unet: conv_in.bias"):
        checkpoint.save_checkpoint(pipeline, tmp_path / "c", {})
    assert list(tmp_path.iterdir()) == []
