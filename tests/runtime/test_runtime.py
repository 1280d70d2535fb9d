"""An accelerated pipeline draws what the pipeline draws, at any shape, and says what it cannot do."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import PIPELINES, sample

import compress
from compress.errors import UserError
from compress.models.quantized import FILE, ranges_of
from compress.runtime import Engines, accelerate, kernels, openvino, resolve
from compress.runtime.openvino import OpenVINOModule
from compress.store.checkpoint import load_checkpoint
from tests.tiny import tiny_pipeline

OPENVINO = Engines("openvino", "openvino", "openvino", "fp32")
CPU = torch.device("cpu")


def draw(pipeline: Any, count: int = 1, guidance: float = 4.0, side: int = 16) -> np.ndarray:
    return pipeline(
        ["a cat"] * count, num_inference_steps=2, guidance_scale=guidance, height=side, width=side,
        generator=[torch.Generator().manual_seed(i) for i in range(count)], output_type="np",
    ).images  # fmt: skip


def test_a_pipeline_draws_the_same_at_every_batch_guidance_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_pipeline()
    before = copy.deepcopy(pipeline.unet.state_dict())
    fast = accelerate(pipeline, OPENVINO, tmp_path)
    for options in ({}, {"guidance": 1.0, "count": 3}, {"side": 32}):
        assert np.abs(draw(fast, **options) - draw(pipeline, **options)).max() < 1e-4
    assert type(fast.unet) is type(pipeline.unet) and fast.unet.config == pipeline.unet.config
    assert "forward" not in vars(pipeline.unet) and pipeline.vae.decoder is not fast.vae.decoder
    assert all(torch.equal(before[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
    layers = sum(isinstance(module, torch.nn.Conv2d) for module in pipeline.unet.modules())
    assert kernels(fast)["unet"]["Convolution f32"] == layers
    assert len(list(tmp_path.glob("*/graph.xml"))) == 3, "one graph each for denoiser, decoder and text encoder"

    expected = draw(fast)
    monkeypatch.setattr("openvino.convert_model", lambda *_, **__: pytest.fail("converted again"))
    monkeypatch.setattr(OpenVINOModule, "_verify", lambda *_: pytest.fail("verified again"))
    assert np.array_equal(draw(accelerate(tiny_pipeline(), OPENVINO, tmp_path)), expected)
    with pytest.raises(pytest.fail.Exception, match="converted again"):
        draw(accelerate(tiny_pipeline(seed=1), OPENVINO, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "inpainting"])
def test_every_architecture(name: str) -> None:
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    fast = accelerate(pipeline, Engines("openvino", "openvino", precision="fp32"))
    expected, found = sample(pipeline, name), sample(fast, name)
    assert np.abs(np.asarray(found, np.float32) - np.asarray(expected, np.float32)).max() < 2e-3


class Small(torch.nn.Module):
    """A convolution whose graph takes a moment to make."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, image: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(image) * scale, image.mean((1, 2, 3))


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


def test_a_damaged_graph_is_made_again(small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = torch.randn(2, 3, 8, 8)
    expected = OpenVINOModule(small, "unet", "f32", cache=tmp_path)(image)[0]
    (file,) = tmp_path.glob("*/graph.bin")
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damage in (
        lambda: file.write_bytes(flipped),
        lambda: file.write_bytes(content[:100]),
        file.unlink,
        lambda: (file.parent / "graph.json").write_text("{"),
    ):
        damage()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert torch.equal(OpenVINOModule(small, "unet", "f32", cache=tmp_path)(image)[0], expected)
        assert "is damaged" in caplog.text and "made again" in caplog.text
    caplog.clear()
    OpenVINOModule(small, "unet", "f32", cache=tmp_path)(image)
    assert "damaged" not in caplog.text


def test_arguments_that_are_no_tensors_are_part_of_what_is_compiled(small: Small) -> None:
    module, image = OpenVINOModule(small, "unet", "f32"), torch.randn(2, 3, 8, 8)
    for scale in (1.0, 3.0):
        for given in (image, image[:1], torch.randn(5, 3, 4, 6)):
            found, expected = module(given, scale=scale), small(given, scale=scale)
            assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(found, expected, strict=True))
    half = OpenVINOModule(small.bfloat16(), "unet", "f32")(image.bfloat16())
    assert half[0].dtype == torch.bfloat16


def test_a_cache_that_cannot_be_written_costs_only_time(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "graphs").write_text("a file where the folder should be")
    image = torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING):
        found = OpenVINOModule(small, "unet", "f32", cache=tmp_path / "graphs")(image)
    assert torch.allclose(found[0], small(image)[0], atol=1e-5) and "cannot be kept" in caplog.text


def test_a_graph_that_computes_something_else_is_refused(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    real = openvino._run
    monkeypatch.setattr(openvino, "_run", lambda compiled, call: [2 * t for t in real(compiled, call)])
    with pytest.raises(UserError, match=r"engine=openvino: the unet \(Small\) .*differ by 1 of their size"):
        OpenVINOModule(small, "unet", "f32")(torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def int8(tiny_parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    small, report = compress.quantize(
        tiny_pipeline(), "w8a8", data=tiny_parquet, calibration={"examples": 2, "steps": 4}
    )
    assert report.details["int8_inputs"] > 20
    return compress.save(small, tmp_path_factory.mktemp("int8") / "checkpoint")


def test_an_int8_checkpoint_runs_in_int8_kernels(int8: Path, tmp_path: Path) -> None:
    expected = draw(load_checkpoint(int8))
    fast = compress.accelerate(int8, "openvino", vae="eager", precision="fp32", cache=tmp_path)
    assert 0 < np.abs(draw(fast) - expected).mean() < 0.05
    assert set(kernels(fast)) == {"unet"}
    assert kernels(fast)["unet"]["Convolution u8"] > 10 and kernels(fast)["unet"]["FullyConnected u8"] > 10
    assert json.loads(next(tmp_path.glob("*/graph.json")).read_text())["files"]


def test_stock_diffusers_loads_the_same_weights_and_the_ranges_are_found_beside_them(int8: Path) -> None:
    from diffusers import DiffusionPipeline

    stock = DiffusionPipeline.from_pretrained(int8, torch_dtype=torch.float32)
    ours = load_checkpoint(int8)
    assert ranges_of(ours.unet) and ranges_of(stock.unet) == ranges_of(ours.unet)
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(stock), draw(ours))
    ours.unet.register_to_config(_name_or_path="")
    assert ranges_of(copy.deepcopy(ours.unet)) == ranges_of(stock.unet), "they follow copies"


def test_dynamic_inputs_need_no_data_and_are_in_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import DiffusionPipeline

    small, report = compress.quantize(tiny_pipeline(), "w8a8_dynamic")
    assert report.details["int8_inputs"] > 20 and report.details["scheme"]["activations"] == "dynamic"
    folder = compress.save(small, tmp_path / "checkpoint")
    stock = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    weights_alone, eager = draw(stock), draw(compress.accelerate(stock, "eager"))
    assert "engine=eager: " in caplog.text and "compute in float" in caplog.text
    assert 0 < np.abs(eager - weights_alone).mean() < 0.05
    compress.accelerate(stock, "openvino")
    assert "engine=openvino: " in caplog.text


@pytest.mark.parametrize("content", [b"nothing", None])
def test_damaged_ranges_are_refused(content: bytes | None, int8: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from compress.models.quantized import read_ranges

    if content is None:
        save_file({"no_layer": torch.tensor([-1.0, 1.0])}, tmp_path / FILE)
    else:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"{FILE} (is damaged|does not fit the model: no_layer)"):
        read_ranges(tiny_pipeline().unet, tmp_path)


def test_unknown_engines_and_precisions_are_refused() -> None:
    with pytest.raises(UserError, match="engine=tensorrt: expected one of auto, eager, inductor, openvino"):
        compress.accelerate(tiny_pipeline(), "tensorrt")
    with pytest.raises(UserError, match="vae=tensorrt: expected"):
        compress.accelerate(tiny_pipeline(), vae="tensorrt")
    with pytest.raises(UserError, match="precision=int4"):
        compress.accelerate(tiny_pipeline(), precision="int4")
    with pytest.raises(UserError, match="linear=int4: expected null or one of int8, fp8"):
        compress.accelerate(tiny_pipeline(), linear="int4")
    with pytest.raises(UserError, match="linear=fp8: needs engine=inductor on CUDA, and the denoiser runs in inductor"):
        compress.accelerate(tiny_pipeline(), "inductor", vae="eager", linear="fp8")


def test_what_an_engine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("auto", CPU) == "openvino"
    with pytest.raises(UserError, match="engine=openvino: runs on CPUs, and the pipeline is on cuda"):
        resolve("openvino", torch.device("cuda"))
    monkeypatch.setattr(openvino, "missing", lambda: "needs the package openvino")
    with pytest.raises(UserError, match="engine=openvino: needs the package openvino"):
        resolve("openvino", CPU)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError, match=r"engine=inductor: needs a C\+\+ compiler"):
        resolve("inductor", CPU)
    assert resolve("auto", CPU) == "eager"


def test_inductor_computes_the_same(small: Small) -> None:
    from compress.runtime.inductor import InductorModule

    image = torch.randn(2, 3, 8, 8)
    found = InductorModule(small, "unet", torch.bfloat16)(image)
    assert found[0].dtype == torch.float32 and 0 < (found[0] - small(image)[0]).abs().max() < 0.05
