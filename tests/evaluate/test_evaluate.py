"""A whole evaluation, with the real Inception network once."""

import json

import pytest
import torch

from compress.evaluate import EvaluateConfig, evaluate
from compress.evaluate.networks.inception_file import INCEPTION_SHA256
from tests.evaluate.parts import TinyInception, tiny_clip, tiny_data
from tests.tiny import tiny_pipeline

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """No process for the memory and no real Inception network."""
    monkeypatch.setattr("compress.evaluate.cost.peak_memory", lambda *_: {"peak_memory_bytes": 1, "method": "none"})
    monkeypatch.setattr("compress.evaluate.inception.Inception", TinyInception)


def settings(tmp_path, **changes):
    clip = tiny_clip(tmp_path / "clip")
    values = {"images": 8, "batch_size": 3, "steps": 2, "grid": 2, "clip": clip, "clip_name": "tiny-clip"}
    return EvaluateConfig(**{**values, "reference_images": 10, "bootstrap": 20, "latency_repeats": 1, **changes})


def test_teacher_and_student(tmp_path, quick):
    teacher, data, config = tiny_pipeline(0), tiny_data(), settings(tmp_path)
    teacher.save_pretrained(tmp_path / "teacher")
    arguments = (data, config, tmp_path / "teacher", CPU, torch.float32, 5)
    first = evaluate(teacher, None, *arguments)
    assert first.images.shape == (8, 3, 16, 16)
    assert [cell["seed"] for cell in first.grid] == [5, 6]
    assert first.metrics["psnr"] is None and first.metrics["ssim"] is None
    fid = first.metrics["fid"]
    assert fid["low"] <= fid["value"] <= fid["high"]
    expected = {"n": 8, "n_reference": 10, "steps": 2, "guidance": 4.0, "scheduler": "dpmsolver++", "seed": 5}
    expected |= {"resolution": "16x16", "dtype": "float32", "blank": 0, "network_sha256": INCEPTION_SHA256}
    assert expected.items() <= fid.items()
    assert first.metrics["clip_score"]["network"] == "tiny-clip"

    same = evaluate(teacher, first.images, *arguments)
    assert same.metrics["psnr"]["value"] == 100
    assert same.metrics["psnr"]["equal"] == 8
    assert same.metrics["ssim"]["value"] == pytest.approx(1)
    assert {**same.metrics, "psnr": None, "ssim": None} == first.metrics  # the same numbers, to the bit

    student = tiny_pipeline(1)
    other = evaluate(student, first.images, *arguments)
    assert other.metrics["psnr"]["low"] <= other.metrics["psnr"]["value"] < 40
    assert other.metrics["psnr"]["equal"] == 0
    json.dumps({"cost": other.cost, "metrics": other.metrics}, allow_nan=False)

    with pytest.raises(ValueError, match="the teacher's pictures"):
        evaluate(student, first.images[:4], *arguments)


def test_cost_only(tmp_path, quick):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "teacher")
    config = settings(tmp_path, images=0)
    found = evaluate(pipeline, None, tiny_data(), config, tmp_path / "teacher", CPU, torch.float32, 0)
    assert found.cost["params"] > 0
    assert (found.metrics, len(found.images), found.grid) == ({}, 0, [])


def test_blank_pictures_are_reported(tmp_path, quick, caplog, monkeypatch):
    pipeline, black = tiny_pipeline(), torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    pipeline.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr("compress.evaluate.sample.sample", lambda *_: black)
    config = settings(tmp_path, grid=0)
    found = evaluate(pipeline, None, tiny_data(), config, tmp_path / "teacher", CPU, torch.float32, 0)
    assert found.metrics["fid"]["blank"] == 8
    assert "8 of 8 pictures are of one color" in caplog.text


def test_with_the_real_network(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.evaluate.cost.peak_memory", lambda *_: {"peak_memory_bytes": 1, "method": "none"})
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "teacher")
    config = settings(tmp_path, images=4, grid=0, reference_images=4)
    cache = tmp_path / "cache"
    found = evaluate(pipeline, None, tiny_data(4), config, tmp_path / "teacher", CPU, torch.float32, 0, cache)
    assert len(list(cache.iterdir())) == 1
    assert found.metrics["fid"]["value"] > found.metrics["kid"]["value"] > 0
