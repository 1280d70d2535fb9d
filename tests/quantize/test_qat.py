"""Quantization-aware training: what is trained is what is stored, it beats rounding afterwards, and it resumes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

import compress
from compress.errors import UserError
from compress.models.inputs import example_inputs, predict
from compress.models.quantized import ranges_of
from compress.prune import sparse
from compress.quantize import qat, qat_int8
from compress.quantize.weights.fake import LearnedRange, LearnedScale, TrackedScale, fake_quantized
from compress.quantize.weights.rounding import round_weight
from compress.quantize.weights.scheme import Scheme
from compress.runtime.fake import activation_step, float_model
from tests.distill.worker import images
from tests.tiny import tiny_pipeline, tiny_unet

SHORT: dict[str, Any] = {"steps": 4, "batch_size": 2, "save_every": 2, "log_every": 2, "every": 2}
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
        ("qat_int8", {"scales": "tracked"}),
        ("qat_int4", {}),
        ("qat_int4", {"bits": 3, "granularity": "channel"}),
        ("qat_int4", {"bits": 6, "granularity": "tensor"}),
        ("qat_int4", {"symmetric": False, "scales": "tracked"}),
        ("qat_int4", {"format": "nf4", "scales": "tracked"}),
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
    assert [name for name in report.curves if name.endswith("_loss")] == ["noise_loss", "output_loss", "features_loss"]
