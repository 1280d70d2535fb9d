"""Finding, checking and loading a model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.errors import UserError
from compress.evaluate.cost.size import weight_bytes
from compress.models import ModelConfig, check, denoiser, denoiser_name, fingerprint, load_teacher, set_denoiser
from compress.models.folder import check_folder
from compress.models.quantized import ranges_of
from compress.models.sampling import Sampling, sampling_of, set_sampling
from tests.tiny import tiny_pipeline, tiny_unet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A pipeline in half precision on the disk."""
    tiny_pipeline(widths=(16, 32)).to(torch.float16).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def refused(path, words, **keys):
    """Checks that the model is refused with one line that has the words."""
    with pytest.raises(UserError, match=words) as caught:
        check(ModelConfig(str(path), **keys))
    assert "\n" not in str(caught.value)


def test_a_whole_pipeline_loads_frozen_in_the_precision_asked_for(folder, capfd):
    config = ModelConfig(str(folder))
    check(config)
    teacher = load_teacher(config, "cpu", torch.float32)
    assert {p.dtype for m in (teacher.unet, teacher.vae, teacher.text_encoder) for p in m.parameters()} == {
        torch.float32
    }
    assert not any(parameter.requires_grad for parameter in teacher.unet.parameters())
    assert not teacher.unet.training
    reference = tiny_pipeline(widths=(16, 32)).unet.conv_in.weight
    assert torch.equal(teacher.unet.conv_in.weight, reference.half().float())
    teacher("a cat", num_inference_steps=1, output_type="pt")
    assert "it/s" not in capfd.readouterr().err


def test_the_denoiser_can_be_exchanged(tmp_path):
    pipeline = tiny_pipeline()
    other = tiny_unet((16, 32))
    assert denoiser_name(pipeline) == "unet" and denoiser(pipeline) is pipeline.unet
    set_denoiser(pipeline, other)
    assert pipeline.unet is other and pipeline.components["unet"] is other
    pipeline.save_pretrained(tmp_path)
    assert load_teacher(ModelConfig(str(tmp_path))).unet.config.block_out_channels == [16, 32]


def test_paths_that_are_no_pipeline(tmp_path):
    for path in (tmp_path / "none", "./none", "~/no/such/folder", "embedded:none", "word", "a/b/c"):
        refused(path, "model.path=.*: expected a folder with model_index.json, or the id of a model on the hub")
    refused(tmp_path, "has no model_index.json")
    with pytest.raises(UserError, match="path="):
        ModelConfig("")
    check(ModelConfig("owner/name", revision="v1"))


def test_a_local_folder_has_no_revision(folder):
    refused(folder, "model.revision=main", revision="main")


def test_a_truncated_weight_file_is_named(folder):
    size = (folder / WEIGHTS).stat().st_size
    for length in (size - 1, 100, 4, 0):
        os.truncate(folder / WEIGHTS, length)
        refused(folder, f"{WEIGHTS} is damaged: .*copy or download")
    (folder / WEIGHTS).write_bytes(b"\x10" + b"\x00" * 7 + b"not json at all!")
    refused(folder, f"{WEIGHTS} is damaged")


def test_folders_with_parts_missing(folder):
    os.rename(folder / WEIGHTS, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(folder, "unet has its weights only as pickle")
    os.rename(folder / "unet" / "diffusion_pytorch_model.bin", folder / "unet" / "elsewhere")
    refused(folder, "unet has a config.json but no .safetensors")
    (folder / "unet" / "config.json").unlink()
    refused(folder, "unet has no config.json")
    for file in (folder / "unet").iterdir():
        file.unlink()
    (folder / "unet").rmdir()
    refused(folder, "unet is missing")


def test_an_index_that_cannot_be_used(folder):
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))
    refused(folder, "custom pipeline class")
    file.write_text(json.dumps(index | {"unet": [None, None]}))
    refused(folder, "no unet and no transformer")
    file.write_text("{")
    refused(folder, "model_index.json cannot be read as JSON")
    file.write_text("[]")
    refused(folder, "model_index.json holds no JSON object")


def test_a_quantized_model_is_no_teacher(folder):
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "torchao"}}))
    refused(folder, "quantized already")


def test_variants(tmp_path):
    tiny_pipeline(widths=(16, 32)).save_pretrained(tmp_path, variant="fp16")
    refused(tmp_path, "model.variant=None: .* has only the variant.s. fp16")
    load_teacher(ModelConfig(str(tmp_path), variant="fp16"))


def test_a_variant_in_several_files(tmp_path):
    tiny_pipeline(widths=(16, 32)).save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    shards = sorted((tmp_path / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    refused(tmp_path, "model.variant=None: .* has only the variant.s. fp16: set one of them")
    load_teacher(ModelConfig(str(tmp_path), variant="fp16"))
    assert weight_bytes(tmp_path / "unet", "fp16")[0] == sum(shard.stat().st_size for shard in shards)
    shards[0].unlink()
    with pytest.raises(UserError, match=rf"{shards[0]} is missing"):
        check_folder(tmp_path, "fp16")


def test_shards(tmp_path):
    tiny_pipeline(widths=(16, 32)).save_pretrained(tmp_path, max_shard_size="300KB")
    check(ModelConfig(str(tmp_path)))
    shards = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    refused(tmp_path, f"{shards[0].name} is missing")


def test_a_pipeline_that_diffusers_cannot_load_is_one_message(folder):
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"block_out_channels": [16, 48]}))
    with pytest.raises(UserError, match="diffusers cannot load that pipeline"):
        load_teacher(ModelConfig(str(folder)))


def test_weights_that_are_missing_or_not_finite_are_one_message(folder):
    weights = load_file(folder / WEIGHTS)
    (removed := dict(weights)).pop("conv_in.weight")
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    for found, words in ((weights, "holds NaN or infinite values: it is damaged"), (removed, "is in no file")):
        save_file(found, folder / WEIGHTS, {"format": "pt"})
        with pytest.raises(UserError, match=rf"model.path=.*: conv_in.weight of its unet {words}"):
            load_teacher(ModelConfig(str(folder)))
    tiny_pipeline(widths=(16, 32)).save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    weights["conv_in.weight"][0, 0, 0, 0] = 1e6
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="use precision=fp32 or bf16"):
        load_teacher(ModelConfig(str(folder)), dtype=torch.float16)


def test_a_hub_id_that_cannot_be_had_is_one_message(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (load_teacher, fingerprint):
        with pytest.raises(UserError, match=r"model.path=nobody/nothing: no such folder here, and the hub") as caught:
            call(ModelConfig("nobody/nothing"))
        assert "\n" not in str(caught.value)


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """The folder of a model ``owner/name`` that was downloaded before; there is no connection."""
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / ("a" * 40)


def test_a_hub_model_loads_from_the_cache_at_its_commit(on_hub):
    tiny_pipeline(widths=(16, 32)).save_pretrained(on_hub)
    config = ModelConfig("owner/name")
    assert load_teacher(config).unet.config.block_out_channels == [16, 32]
    assert fingerprint(config) == fingerprint(ModelConfig("owner/name", revision=on_hub.name))


def test_a_published_checkpoint_loads_with_its_sampling_and_its_ranges(on_hub):
    own = Sampling("LCMScheduler", 4, (4.0, 4.0))
    pipeline = tiny_pipeline(widths=(16, 32))
    set_sampling(pipeline, own)
    compress.save(pipeline, on_hub)
    assert sampling_of(load_teacher(ModelConfig("owner/name"))) == own
    quantized, _ = compress.quantize(pipeline, "w8a8_dynamic")
    compress.save(quantized, on_hub)
    loaded = compress.load("owner/name")
    assert sampling_of(loaded) == own
    assert len(ranges_of(loaded.unet)) == len(ranges_of(quantized.unet)) > 0


def test_the_fingerprint_follows_names_and_contents(folder, tmp_path):
    before = fingerprint(ModelConfig(str(folder)))
    assert len(before) == 64
    moved = tmp_path / "elsewhere"
    os.rename(folder, moved)
    (moved / "README.md").write_text("a card")
    assert fingerprint(ModelConfig(str(moved))) == before
    content = bytearray((moved / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (moved / WEIGHTS).write_bytes(content)
    changed = fingerprint(ModelConfig(str(moved)))
    assert changed != before
    os.rename(moved / WEIGHTS, moved / "unet" / "other.safetensors")
    assert fingerprint(ModelConfig(str(moved))) != changed


def test_checking_loads_no_torch(folder):
    code = (
        "import sys; from compress.models import *; "
        f"check(ModelConfig({str(folder)!r})); fingerprint(ModelConfig({str(folder)!r})); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
