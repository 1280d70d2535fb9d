"""Quantization-aware training: what is trained is what is stored, it beats rounding afterwards, and it resumes."""

import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

import compress
from compress.config.compose import compose
from compress.distill import features
from compress.distill.lora import Lora
from compress.errors import UserError
from compress.models.inputs import example_inputs, predict
from compress.models.quantized import ranges_of
from compress.prune import sparse
from compress.quantize import qat, qat_int8
from compress.quantize.weights.fake import LearnedLevels, LearnedRange, fake_quantized
from compress.quantize.weights.scheme import Scheme
from compress.run.config import to_run_config
from compress.runtime.fake import activation_step, float_model
from tests.distill.worker import images
from tests.tiny import seeded, tiny_pipeline, tiny_unet

SHORT: dict[str, Any] = {"steps": 4, "batch_size": 2, "save_every": 2, "log_every": 2}
CALIBRATION = {"examples": 1, "steps": 2}


def trained(
    choice: str, student: StableDiffusionPipeline | None = None, **keys: Any
) -> tuple[StableDiffusionPipeline, Any]:
    student = tiny_pipeline(seed=1) if student is None else student
    keys = {**SHORT, "calibration": CALIBRATION, **keys}
    return compress.quantize(student, choice, teacher=tiny_pipeline(), data=images(), **keys)


@pytest.fixture
def before_packing(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the denoiser, still in training but with averaged weights, predicts just before it is packed."""
    seen: list[Tensor] = []

    def rounded_layers(model: Any) -> Any:
        found = original(model)
        seen.append(predict(model, example_inputs(model, batch=2, seed=0)))
        return found

    original = qat.rounded_layers
    monkeypatch.setattr(qat, "rounded_layers", rounded_layers)
    return seen


@pytest.mark.parametrize(
    ("choice", "keys"),
    [
        ("qat_int8", {}),
        ("qat_int4", {}),
        pytest.param("qat_int4", {"bits": 3, "granularity": "channel"}, marks=pytest.mark.slow),
        pytest.param("qat_int4", {"bits": 6, "granularity": "tensor"}, marks=pytest.mark.slow),
        ("qat_int4", {"symmetric": False}),
        ("qat_int4", {"format": "nf4"}),
        ("qat_w4a8", {}),
        ("qat_palette4", {}),
    ],
)
def test_what_is_stored_computes_what_was_trained(
    choice: str, keys: dict[str, Any], before_packing: list[Tensor]
) -> None:
    student, report = trained(choice, learning_rate=1e-3, **keys)
    inputs = example_inputs(student.unet, batch=2, seed=0)
    stored = predict(float_model(student.unet, ranges_of(student.unet)), inputs)
    (expected,) = before_packing
    assert (stored - expected).abs().max() < 1e-4 * expected.abs().max()
    assert report.coverage["params"] > 0.9 and report.details["steps"] == 4
    assert [name for name in report.curves if name.endswith("_loss")] == ["output_loss", "features_loss"]


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=3),
        Scheme(bits=4),
        Scheme(bits=3, granularity="group", group_size=8, symmetric=False),
        Scheme(bits=4, format="nf4"),
        Scheme(bits=3, format="palette", granularity="tensor"),
    ],
    ids=str,
)
def test_training_leaves_less_error_than_rounding_alone(scheme: Scheme) -> None:
    source = torch.Generator().manual_seed(0)
    inputs, held = torch.randn(512, 16, generator=source), torch.randn(512, 16, generator=source)
    with seeded(0):
        teacher = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 8))
    student = deepcopy(teacher)

    def error(values: Tensor) -> Tensor:
        return (student(values) - teacher(values).detach()).pow(2).mean()

    with fake_quantized(student, dict.fromkeys(("0", "2"), scheme), {"2": (-0.5, 3.0)}):
        before = error(held).item()
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 200)
        for _ in range(200):
            optimizer.zero_grad()
            error(inputs).backward()
            optimizer.step()
            schedule.step()
        after = error(held).item()
    assert after < 0.7 * before


def test_the_gradient_of_a_scale_is_that_of_lsq() -> None:
    weight = torch.tensor([[0.3, -0.9, 0.26, 5.0]], requires_grad=True)
    layer = LearnedLevels(weight.detach(), Scheme(bits=3), "absmax")
    layer.start.fill_(0.5)
    rounded = layer(weight)
    assert rounded.tolist() == [[0.5, -1.0, 0.5, 1.5]]
    rounded.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[1, 1, 1, 0]], "what is clipped does not move"
    # round(v) - v with v = w / s inside, the last level outside; times ds / dgrowth = 10 s.
    inside = (1 - 0.6) + (-2 + 1.8) + (1 - 0.52)
    assert layer.growth.grad is not None and layer.growth.grad.item() == pytest.approx(
        10 * 0.5 * (inside + 3), rel=1e-4
    )


def test_inputs_are_rounded_as_the_engine_does_and_ranges_learn() -> None:
    layer, values = LearnedRange(-1.0, 3.0), torch.linspace(-2, 4, 1001, requires_grad=True)
    rounded = layer(values)
    step, zero = activation_step(-1.0, 3.0)
    assert torch.equal(rounded, torch.fake_quantize_per_tensor_affine(values, step, zero, 0, 255))
    (rounded - values.detach()).pow(2).sum().backward()
    assert values.grad is not None and values.grad[0] == 0 and layer.growth.grad is not None
    assert (layer.growth.grad < 0).all(), "both ends grow towards what they clip"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_float_again_afterwards(dtype: torch.dtype) -> None:
    unet = tiny_unet().to(dtype)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    classes = {name: type(module) for name, module in unet.named_modules()}
    with fake_quantized(unet, {"conv_in": Scheme(), "conv_out": Scheme(bits=2)}, {"conv_in": (-1.0, 1.0)}):
        assert "conv_in.levels.growth" in unet.state_dict() and unet.conv_in.weight.dtype == torch.float32
    assert {name: type(module) for name, module in unet.named_modules()} == classes
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_half_precision_is_trained_in_full() -> None:
    student = tiny_pipeline(seed=1)
    student.unet.to(torch.bfloat16)
    found, report = compress.quantize(
        student, "qat_int4", teacher=tiny_pipeline(), data=images(), **{**SHORT, "steps": 1}
    )
    assert report.details["autocast"] in ("bf16", "no") and found.unet.conv_in.bias.dtype == torch.bfloat16


def test_zeros_stay_zero() -> None:
    student, _ = compress.prune(tiny_pipeline(seed=1), "sparse_2_4")
    weights = {name: m.weight.detach() == 0 for name, m in student.unet.named_modules() if hasattr(m, "in_features")}
    assert sparse.STAGE.zeros and sum(int(zero.sum()) for zero in weights.values()) > 1000
    found, report = trained("qat_int4", student, learning_rate=1e-2)
    assert report.details["zeros_kept"] > 1000
    for name, zero in weights.items():
        assert not found.unet.get_submodule(name).weight[zero].any(), name


@pytest.mark.parametrize("choice", ["qat_int8", pytest.param("qat_palette4", marks=pytest.mark.slow)])
def test_a_stopped_training_continues_to_the_same_bits(choice: str, tmp_path: Path) -> None:
    def fail(metrics: dict[str, float], step: int) -> None:
        if step == 4:
            raise RuntimeError("stop")

    keys: dict[str, Any] = {"steps": 5, "save_every": 3}
    whole, _ = trained(choice, **keys)
    with pytest.raises(RuntimeError, match="stop"):
        trained(choice, folder=tmp_path, log=fail, **keys)
    assert [file.name for file in tmp_path.glob("state-*")] == ["state-00000003.safetensors"]
    resumed, _ = trained(choice, folder=tmp_path, **keys)
    inputs = example_inputs(whole.unet, batch=1, seed=0)
    assert torch.equal(predict(whole.unet, inputs), predict(resumed.unet, inputs))
    assert ranges_of(whole.unet) == ranges_of(resumed.unet)


WORKER = """
import sys, torch
from accelerate import PartialState
from compress.models.inputs import example_inputs, predict
from tests.quantize.test_qat import trained
torch.set_num_threads(1)
student, _ = trained("qat_w4a8", folder=sys.argv[1])
assert PartialState().num_processes == 2
output = predict(student.unet, example_inputs(student.unet, batch=1, seed=0))
torch.save(output, f"{sys.argv[1]}/{PartialState().process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *options, str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    alone, _ = trained("qat_w4a8")
    expected = predict(alone.unet, example_inputs(alone.unet, batch=1, seed=0))
    # A weight or an input in the middle of two levels may go to the other.
    assert (first - expected).pow(2).mean() < 5e-3 * expected.pow(2).mean()


def test_the_checkpoint_with_int8_inputs_is_that_of_w8a8(tmp_path: Path) -> None:
    student, report = trained("qat_int8")
    folder = compress.save(student, tmp_path / "checkpoint")
    assert (folder / "unet" / "activation_ranges.safetensors").is_file()
    assert not list(folder.rglob("*.py")), "stock diffusers needs no model file"
    again = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    inputs = example_inputs(student.unet, batch=1, seed=0)
    assert torch.equal(predict(again.unet, inputs), predict(student.unet, inputs))
    assert ranges_of(again.unet) == ranges_of(student.unet) and report.details["int8_inputs"] > 40


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        (qat, {"bits": 9}, "bits=9: expected"),
        (qat, {"activations": "dynamic"}, "activations=dynamic: expected none or static"),
        (qat_int8, {"activations": "dynamic"}, "activations=dynamic: expected static"),
        (qat, {"compile": True}, "compile=True: expected nothing"),
        (qat_int8, {"compile": True}, "compile=True: expected nothing"),
        (qat, {"lora": Lora(rank=4)}, "lora.rank=4: expected 0"),
        (qat_int8, {"lora": Lora(rank=4)}, "lora.rank=4: expected 0"),
        (qat, {"steps": 0}, "steps=0"),
        (qat_int8, {"ranges": "best"}, "ranges=best"),
        (qat_int8, {"learning_rate": 0.0}, "learning_rate=0.0"),
    ],
)
def test_values_are_checked(config: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.Config(**keys)


@pytest.mark.parametrize(
    ("config", "keys", "width", "message"),
    [
        (qat, {"skip": ["zzz"]}, 16, "skip=zzz: expected a pattern"),
        (qat_int8, {"float_inputs": ["zzz"]}, 16, "float_inputs=zzz: expected a pattern"),
        (qat, {}, 32, "cross_attention_dim=16, its teacher 32"),
        (qat_int8, {}, 32, "cross_attention_dim=16, its teacher 32"),
    ],
)
def test_what_cannot_work_is_refused_beforehand(config: Any, keys: dict[str, Any], width: int, message: str) -> None:
    outline: Any = SimpleNamespace(denoiser=lambda: tiny_unet(cross_attention_dim=width))
    with pytest.raises(UserError, match=message):
        config.check(config.Config(**keys), tiny_unet(), outline)


def test_a_quantized_student_is_refused() -> None:
    student, _ = compress.quantize(tiny_pipeline(seed=1), "int8")
    for choice in ("qat_int8", "qat_int4"):
        with pytest.raises(UserError, match="quantized already"):
            trained(choice, student)


def test_one_training_is_that_of_the_recipe_with_two_stages() -> None:
    one = to_run_config(compose(["recipe=prune_distill_qat"])).stages[1].config
    distill = to_run_config(compose(["recipe=prune_distill_int8"])).stages[1].config
    assert isinstance(one, qat_int8.Config) and isinstance(distill, features.Config)
    assert all(getattr(one, field.name) == getattr(distill, field.name) for field in fields(features.Config))


def test_one_training_distills_and_quantizes() -> None:
    stages = to_run_config(compose(["recipe=prune_distill_qat", "stages.quantize.steps=7"])).stages
    assert [(stage.kind, stage.method) for stage in stages] == [("prune", "width"), ("quantize", "qat_int8")]
    assert stages[1].config.steps == 7
    assert stages[1].declared.distributed and stages[1].declared.leaves == "quantized"
    with pytest.raises(UserError, match="stages.quantize.ranges=guessed"):
        to_run_config(compose(["recipe=prune_distill_qat", "stages.quantize.ranges=guessed"]))
