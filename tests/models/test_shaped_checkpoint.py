"""Checkpoints that carry a model file: loaded by diffusers with the flag, and without it where compress is imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.models import ModelConfig, check, load_teacher
from compress.models.compressed_model import ShapedUNet2DConditionModel
from compress.models.folder import MODEL_FILE
from compress.models.inputs import predict, small_inputs
from compress.models.shapes import shaped
from compress.quantize.int8 import quantize_weights
from compress.store import checkpoint
from tests.models.test_shaped_unet import factors
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parents[2]
COMMON = """
import json
import torch

def compare(unet, folder):
    inputs = torch.load(folder + "/inputs.pt", weights_only=True)
    wanted = torch.load(folder + "/wanted.pt", weights_only=True)
    with torch.no_grad():
        found = unet.eval()(**inputs, return_dict=False)[0]
    return ((found - wanted).abs().max() / wanted.abs().max()).item()

def train(unet):
    unet.train().requires_grad_(True)
    unet.enable_gradient_checkpointing()
    inputs = torch.load(folder + "/float/inputs.pt", weights_only=True)
    optimizer = torch.optim.SGD(unet.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        loss = unet(**inputs, return_dict=False)[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

folder, found = arguments[0], {}
"""
# A user who has diffusers and no compress.
STRANGER = (
    COMMON
    + """
from diffusers import AutoModel, DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(folder + "/float")
except ValueError as error:
    found["refused"] = str(error)
for name in ("float", "int8"):
    pipeline = DiffusionPipeline.from_pretrained(
        f"{folder}/{name}", torch_dtype=torch.float32, trust_remote_code=True
    )
    found[name] = compare(pipeline.unet, f"{folder}/{name}")
    pipeline("a red cat", num_inference_steps=1, output_type="latent")
    if name == "float":
        found["losses"] = train(pipeline.unet)
        pipeline.save_pretrained(folder + "/again")
alone = AutoModel.from_pretrained(folder + "/float/unet", trust_remote_code=True)
found["alone"] = compare(alone, folder + "/float")
print(json.dumps(found))
"""
)
# A user who imports compress, before or after diffusers. The model file was changed and would end the process.
FRIEND = (
    COMMON
    + """
import compress
from diffusers import AutoModel, DiffusionPipeline, pipelines
found["before"] = compare(DiffusionPipeline.from_pretrained(folder + "/float").unet, folder + "/float")
found["alone"] = compare(AutoModel.from_pretrained(folder + "/float", subfolder="unet"), folder + "/float")
del pipelines.compressed_model
try:
    DiffusionPipeline.from_pretrained(folder + "/float")
except ValueError as error:
    found["refused"] = str(error)
compress.register()
pipeline = DiffusionPipeline.from_pretrained(folder + "/float")
found["after"] = compare(pipeline.unet, folder + "/float")
found["module"] = type(pipeline.unet).__module__
print(json.dumps(found))
"""
)


def in_fresh_process(code: str, folder: Path, scratch: Path) -> dict[str, Any]:
    clean = os.environ | {"HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import sys; arguments = sys.argv[1:]" + code, str(folder)]
    done = subprocess.run(command, cwd=scratch, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints ``float`` and ``int8`` of the same shaped UNet, each with inputs and the output that is wanted."""
    folder = tmp_path_factory.mktemp("shaped")
    pipeline = tiny_pipeline(widths=(16, 32))
    pipeline.register_modules(unet=shaped(pipeline.unet, *factors(pipeline.unet)))
    for name in ("float", "int8"):
        if name == "int8":
            quantize_weights(pipeline.unet)
        info = {"model_file": checkpoint.model_file(pipeline), "stages": []}
        checkpoint.save_checkpoint(pipeline, folder / name, info)
        inputs = small_inputs(pipeline.unet)
        assert inputs is not None
        torch.save(inputs, folder / name / "inputs.pt")
        torch.save(predict(pipeline.unet, inputs), folder / name / "wanted.pt")
    return folder


def test_diffusers_alone_loads_trains_and_saves_it_with_the_flag(saved: Path, stranger: Callable[..., str]) -> None:
    found = json.loads(stranger(STRANGER, saved).splitlines()[-1])
    assert "custom code in compressed_model.py" in found["refused"] and "trust_remote_code=True" in found["refused"]
    assert found["float"] <= 1e-5 and found["alone"] <= 1e-5 and found["int8"] == 0
    assert found["losses"][1] < found["losses"][0]
    again = saved / "again"  # what a stranger saves carries the file on
    assert json.loads((again / "model_index.json").read_text())["unet"][0] == "compressed_model"
    assert (again / "unet" / "compressed_model.py").read_bytes() == MODEL_FILE.read_bytes()


def test_with_compress_no_flag_is_needed_and_no_file_is_run(saved: Path, tmp_path: Path) -> None:
    file = saved / "float" / "unet" / "compressed_model.py"
    file.write_text("raise SystemExit('the model file was run')")
    try:
        found = in_fresh_process(FRIEND, saved, tmp_path)
    finally:
        file.write_bytes(MODEL_FILE.read_bytes())
    assert found["before"] <= 1e-5 and found["after"] <= 1e-5 and found["alone"] <= 1e-5
    assert "trust_remote_code=True" in found["refused"]
    assert found["module"] == "compress.models.compressed_model"


def test_a_checkpoint_carries_the_model_file(saved: Path) -> None:
    manifest = json.loads((saved / "float" / checkpoint.MANIFEST).read_text())
    assert "unet/compressed_model.py" in manifest
    assert checkpoint.read_info(saved / "float")["model_file"] == "unet/compressed_model.py"
    loaded = checkpoint.load_checkpoint(saved / "float")
    assert type(loaded.unet) is ShapedUNet2DConditionModel
    assert checkpoint.model_file(tiny_pipeline(widths=(16, 32))) is None


def test_it_is_a_model_like_any_other(saved: Path) -> None:
    config = ModelConfig(str(saved / "float"))
    check(config)
    assert type(load_teacher(config).unet) is ShapedUNet2DConditionModel


def test_a_model_file_that_is_not_ours_is_refused(saved: Path, tmp_path: Path) -> None:
    file = saved / "float" / "unet" / "compressed_model.py"
    file.write_bytes(MODEL_FILE.read_bytes() + b"\n# changed\n")
    try:
        for load in (
            lambda: check(ModelConfig(str(saved / "float"))),
            lambda: checkpoint.load_checkpoint(saved / "float"),
        ):
            with pytest.raises(UserError, match="is not the model file of this version of compress"):
                load()
    finally:
        file.write_bytes(MODEL_FILE.read_bytes())


def test_foreign_code_is_refused(tmp_path: Path) -> None:
    tiny_pipeline(widths=(16, 32)).save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": ["mine", "Encoder"]}))
    (tmp_path / "text_encoder" / "mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match=r"text_encoder/mine\.py is code that loading.*model\.path"):
        check(ModelConfig(str(tmp_path)))
