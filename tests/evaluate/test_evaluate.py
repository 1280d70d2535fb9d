"""A whole evaluation: teacher, noise floor and student, interrupted and not."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.errors import UserError
from compress.evaluate import evaluate
from compress.evaluate.images import ImageFiles
from compress.evaluate.networks.inception_file import INCEPTION_SHA256
from compress.evaluate.sample import image_paths
from tests.evaluate import worker
from tests.evaluate.parts import tiny_clip, tiny_data
from tests.evaluate.worker import HOW, TinyNetwork, numbers
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parents[2]
PAIRED = {"fid_teacher", "psnr", "ssim", "ms_ssim", "latent_psnr"}


@pytest.fixture
def tiny_networks(monkeypatch):
    """No real Inception network."""
    monkeypatch.setattr("compress.evaluate.networks.inception.Inception", TinyNetwork)


def settings(tmp_path, **changes):
    tiny_clip(tmp_path / "clip")
    return worker.settings(tmp_path, **changes)


def test_teacher_noise_floor_and_student(tmp_path, tiny_networks):
    teacher, data, config = tiny_pipeline(0), tiny_data(), settings(tmp_path)
    teacher.save_pretrained(tmp_path / "teacher")
    first = evaluate(teacher, data, config, tmp_path / "first", cost_of=tmp_path / "teacher", **HOW)
    assert first.cost["params"] > 0
    assert [(cell["seed"], cell["image"]) for cell in first.grid] == [
        (5, "images/grid-000000.png"),
        (6, "images/grid-000001.png"),
    ]
    assert (tmp_path / "first" / first.grid[1]["image"]).exists()
    assert {name for name, metric in first.metrics.items() if metric is None} == PAIRED
    fid = first.metrics["fid"]
    assert fid["low"] <= fid["value"] <= fid["high"]
    expected = {"n": 12, "n_reference": 10, "steps": 2, "guidance": 4.0, "scheduler": "dpmsolver++", "seed": 5}
    expected |= {"resolution": "16x16", "dtype": "float32", "blank": 0, "interval": 0.95, "batch_size": 4}
    assert expected.items() <= fid.items()
    assert first.metrics["clip_score"]["network"] == "tiny-clip"
    manifest = first.manifest
    assert (manifest["protocol"], manifest["version"]) == ("quick", 1)
    assert {"images", "batch_size", "steps"} <= set(manifest["changed"])
    assert not {"guidance", "clip", "scheduler", "leave_out", "noise_floor"} & set(manifest["changed"])
    assert manifest["seeds"] == {"first": 5, "last": 16}
    assert manifest["networks"]["tiny"] == fid["network_sha256"] and set(manifest["networks"]) == {"tiny", "tiny-clip"}
    assert set(manifest["reference"]["sha256"]) == {"inception", "clip"} and manifest["reference"]["n"] == 10
    assert manifest["scheduler_class"] == "DPMSolverMultistepScheduler"

    same = evaluate(teacher, data, config, tmp_path / "same", teacher=tmp_path / "first", **HOW)
    assert same.cost == {}
    assert same.metrics["psnr"]["value"] == 100 and same.metrics["psnr"]["equal"] == 12
    assert same.metrics["latent_psnr"]["value"] == 100 and same.metrics["latent_psnr"]["denoising_steps"] == 1
    assert same.metrics["ms_ssim"]["value"] == pytest.approx(1)
    assert same.metrics["fid_teacher"]["value"] == pytest.approx(0, abs=1e-6)
    ours = numbers({name: metric for name, metric in same.metrics.items() if name not in PAIRED})
    assert ours == numbers(first.metrics)  # the same images, the same numbers

    floor = evaluate(teacher, data, config, tmp_path / "floor", teacher=tmp_path / "first", other_seeds=True, **HOW)
    assert floor.grid == []
    assert floor.metrics["psnr"]["value"] < 40 and floor.metrics["psnr"]["seed"] == 5 + 2**31
    other = evaluate(tiny_pipeline(1), data, config, tmp_path / "other", teacher=tmp_path / "first", **HOW)
    assert other.metrics["latent_psnr"]["low"] <= other.metrics["latent_psnr"]["value"] < 60
    for found in (first, same, floor, other):
        json.dumps([found.cost, found.metrics, found.manifest, found.grid], allow_nan=False)


def test_an_interrupted_evaluation_gives_the_same_numbers(tmp_path, tiny_networks):
    pipeline, data, config = tiny_pipeline(), tiny_data(), settings(tmp_path)
    whole = evaluate(pipeline, data, config, tmp_path / "whole", **HOW)
    folder = tmp_path / "half"
    (folder / "images").mkdir(parents=True)
    for file in (tmp_path / "whole" / "images").iterdir():
        if not file.name.startswith("sample-") or int(file.stem[-6:]) < 6:  # one batch, and half of the next
            (folder / "images" / file.name).write_bytes(file.read_bytes())
    assert numbers(evaluate(pipeline, data, config, folder, **HOW).metrics) == numbers(whole.metrics)


@pytest.mark.slow
def test_five_processes_change_no_number(tmp_path, monkeypatch):
    """Five processes for three batches: two have no images."""
    alone = worker.evaluated_alone(tmp_path, monkeypatch)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "5", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*command, worker.__file__, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    every = json.loads((tmp_path / "metrics.json").read_text())
    assert len(every) == 5
    worker.check_alike(tmp_path, alone, every)


def test_cost_only(tmp_path):
    pipeline, folder = tiny_pipeline(), tmp_path / "evaluation"
    pipeline.save_pretrained(tmp_path / "teacher")
    config = settings(tmp_path, images=0)
    found = evaluate(pipeline, tiny_data(), config, folder, cost_of=tmp_path / "teacher", **HOW)
    assert found.cost["params"] > 0
    assert (found.metrics, found.manifest, found.grid) == ({}, {}, [])
    assert not folder.exists()


def test_many_images_are_sampled_in_an_engine_that_gives_the_same_ones(tmp_path, tiny_networks, monkeypatch, caplog):
    monkeypatch.setattr("compress.evaluate.SAMPLED_FAST_FROM", 8)
    data, config = tiny_data(), settings(tmp_path, images=8)
    fast = evaluate(tiny_pipeline(0), data, config, tmp_path / "fast", **HOW)
    assert fast.manifest["sampled_in"] == "openvino, float32"
    plain = evaluate(tiny_pipeline(0), data, replace(config, sampling_engine="eager"), tmp_path / "plain", **HOW)
    assert "sampled_in" not in plain.manifest
    ours, theirs = (ImageFiles(image_paths(tmp_path / name / "images", range(8)))[:] for name in ("fast", "plain"))
    assert (ours.int() - theirs.int()).abs().max() <= 1

    def refused(*_, **__):
        raise UserError("engine=openvino: the unet cannot be run")

    monkeypatch.setattr("compress.runtime.openvino.OpenVINOModule.__call__", refused)
    evaluate(tiny_pipeline(0), data, config, tmp_path / "refused", **HOW)
    assert "cannot be run: images are sampled in eager mode" in caplog.text
    again = ImageFiles(image_paths(tmp_path / "refused" / "images", range(8)))[:]
    assert torch.equal(again, theirs)


def test_blank_images_are_reported(tmp_path, tiny_networks, caplog):
    pipeline = tiny_pipeline()
    for parameter in pipeline.vae.decoder.conv_out.parameters():
        parameter.data.zero_()
    found = evaluate(pipeline, tiny_data(), settings(tmp_path, grid=0), tmp_path / "evaluation", **HOW)
    assert found.metrics["fid"]["blank"] == 12
    assert "12 of 12 images have a single color" in caplog.text


def test_metrics_can_be_left_out(tmp_path, tiny_networks):
    config = settings(tmp_path, leave_out=("kid", "latent_psnr", "cmmd", "r_at_5"))
    found = evaluate(tiny_pipeline(), tiny_data(), config, tmp_path / "evaluation", **HOW)
    assert found.metrics["fid"] and found.metrics["r_at_1"]
    assert not any(found.metrics.get(name) for name in config.leave_out)
    assert not list((tmp_path / "evaluation" / "images").glob("latents-*"))


def test_with_the_real_network(tmp_path):
    config = settings(tmp_path, images=5, grid=0, reference_images=4, prompts=str(tmp_path / "prompts.csv"))
    (tmp_path / "prompts.csv").write_text("text\na red cat\na dog\n")
    cache = tmp_path / "cache"
    found = evaluate(tiny_pipeline(), tiny_data(4), config, tmp_path / "evaluation", cache=cache, **HOW)
    assert len(list(cache.iterdir())) == 2
    assert found.metrics["fid"]["network_sha256"] == INCEPTION_SHA256
    assert math.isfinite(found.metrics["fid"]["value"])
    assert found.metrics["r_at_1"]["among"] == 2
