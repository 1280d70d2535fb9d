"""Examples are encoded once for all stages of a teacher and data."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

import compress.data.examples
from compress.data.samples import SamplesConfig
from compress.distill.encoded import training_examples
from compress.stage import StageContext
from tests.distill.worker import data, images


def test_stages_share_what_they_have_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = compress.data.examples.encode_images, []

    def counted(*arguments):
        calls.append(arguments)
        return encode(*arguments)

    monkeypatch.setattr(compress.data.examples, "encode_images", counted)
    teacher, rows = tiny_pipeline(), data(images())

    def examples(stage: str, seed: int, most: int | None = None, count: int = 0):
        context = StageContext(
            load_teacher=lambda: teacher, data=rows, folder=tmp_path / stage, history=[], seed=seed,
            device=torch.device("cpu"), dtype=torch.float32, log=lambda metrics, step: None,
            examples=lambda: tmp_path / "examples",
        )  # fmt: skip
        return training_examples(context, most, SamplesConfig(count=count, steps=1))

    first, second = examples("a", seed=0), examples("b", seed=1)
    assert torch.equal(first.latents, second.latents) and len(calls) == 1
    assert len(examples("a", seed=0, most=2).latents) == 2 and len(calls) == 2
    assert len(examples("a", seed=0, count=1).latents) == 7
    assert len(list((tmp_path / "examples").iterdir())) == 3
