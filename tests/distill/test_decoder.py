"""A small decoder: it follows the teacher's, resumes exactly, and works as the VAE of stock pipelines."""

import json
import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from pipelines import PIPELINES, sample
from tiny import tiny_pipeline, tiny_vae

import compress
from compress.__main__ import main
from compress.distill.decoder import STAGE, Config, _split, distill_decoder, laplacian, run, small_autoencoder
from compress.errors import UserError
from compress.models.latents import encode_images, unpacked
from compress.stage import StageContext
from tests.distill.worker import data, images

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = Config(steps=10, batch_size=4, width=8, blocks=1, save_every=3, log_every=5, ema_decay=0.9)


def latents(count: int = 40) -> torch.Tensor:
    """Smooth latents, as those of pictures are."""
    coarse = torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear")


def trained(config: Config = CONFIG, **options):
    rows = latents()
    return distill_decoder(tiny_vae(), lambda index: rows[index], len(rows), config, **options)


def test_decoder_follows_its_teacher_on_held_out_pictures():
    teacher = tiny_vae()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    _, start = trained(replace(CONFIG, steps=1))
    small, report = trained(replace(CONFIG, steps=200, learning_rate=5e-3))
    details = report.details
    assert details["psnr"]["value"] > start.details["psnr"]["value"] + 6
    assert details["psnr"]["n"] == details["held_out"] == 4 and details["examples"] == 36
    assert 0 < details["ssim"]["value"] <= 1 and details["seconds_after"] > 0
    assert details["config_after"]["its parameters"] == sum(p.numel() for p in small.parameters())
    assert report.coverage["params"] == report.coverage["macs"] == 0 and report.coverage["modules"] > 0
    assert report.curves["encoder_loss"][-1][1] < report.curves["encoder_loss"][0][1]
    assert not small.training and not any(p.requires_grad for p in small.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_store_does_not_give_a_decoder_of_the_former_default_optimizer():
    assert Config().optimizer == "muon" and STAGE.version > 1  # version 1 stood for AdamW


def test_the_mirror_image_of_a_held_out_one_is_not_trained_on():
    trained, held = _split(count=26, held_out=4, seed=0, mirrored=10)  # ten images, their mirror images, six samples
    image = {row: row % 10 if row < 20 else row for row in range(26)}
    assert len(held) == 2 and not {image[row] for row in held.tolist()} & {image[row] for row in trained.tolist()}
    assert len(trained) == 26 - len({row for row in image if image[row] in {image[row] for row in held.tolist()}})


def test_laplacian_of_a_constant_and_of_a_checkerboard():
    constant = torch.full((1, 3, 16, 16), 0.5)
    assert laplacian(constant).item() == pytest.approx(0.5 / 3)  # two bands of 0, the rest of 0.5
    checkers = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).mul(2.0).sub(1).expand(1, 3, 16, 16)
    assert laplacian(checkers).item() == pytest.approx(1 / 3)  # all of it in the finest band


def test_stopped_training_continues_to_the_same_bits(tmp_path):
    def interrupt(metrics: dict[str, float], step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    config = replace(CONFIG, crop=4)
    expected, undisturbed = trained(config)
    with pytest.raises(KeyboardInterrupt):
        trained(config, folder=tmp_path, log=interrupt)
    small, report = trained(config, folder=tmp_path)
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert report.curves == undisturbed.curves and report.details["psnr"] == undisturbed.details["psnr"]


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", pytest.param("sana", marks=pytest.mark.slow)])
def test_small_decoder_works_in_stock_pipelines(name, tmp_path):
    pipeline, teacher = PIPELINES[name](), PIPELINES[name]()
    context = StageContext(
        load_teacher=lambda: teacher, data=data(images(2)), folder=tmp_path, history=[], seed=0,
        device=torch.device("cpu"), dtype=torch.float32, log=lambda metrics, step: None,
    )  # fmt: skip
    if name == "flux":
        pipeline.default_sample_size = teacher.default_sample_size = 16
    run(pipeline, replace(CONFIG, steps=1, batch_size=1), context)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.vae, AutoencoderTiny)
    before, after = sample(teacher, name), sample(loaded, name)
    assert before.shape == after.shape and np.isfinite(after).all()
    np.testing.assert_allclose(after, sample(pipeline, name), atol=1e-5)
    side = before.shape[0]
    encoded = [
        unpacked(p, encode_images(p, [images(1)[0]["image"]], side, side), side, side) for p in (teacher, loaded)
    ]
    assert encoded[0].shape == encoded[1].shape


@pytest.mark.slow
def test_by_the_command_line_after_int8(tiny_overrides, tmp_path, monkeypatch):
    folders = [f"out={tmp_path / 'out'}", f"store={tmp_path / 'store'}"]
    stage = ["stages.decoder.steps=2", "stages.decoder.batch_size=2", "stages.decoder.width=8"]
    words = ["recipe=int8", "+distill@stages.decoder=decoder", *stage]
    monkeypatch.setattr(sys, "argv", ["compress", *tiny_overrides, *folders, *words])
    assert main() == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stages"][1]["details"]["psnr"]["n"] == 1
    assert report["stages"][1]["cost"]["bytes"] == report["stages"][0]["cost"]["bytes"]
    assert "VAE AutoencoderKL → AutoencoderTiny" in (tmp_path / "out" / "report.md").read_text()
    assert isinstance(compress.load(tmp_path / "out" / "checkpoint").vae, AutoencoderTiny)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"width": 0}, r"width=0: expected an integer of at least 1, or null"),
        ({"losses": {"l3": 1.0}}, r"losses\.l3: no such loss"),
        ({"losses": {"l2": 1.0}}, r"losses=.*: expected weights above 0 for encoder and"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        Config(**keys)


def test_a_pipeline_without_a_vae_is_refused():
    with pytest.raises(UserError, match="DDPMPipeline has no VAE"):
        compress.distill(PIPELINES["ddpm"](), "decoder", teacher=PIPELINES["ddpm"](), data=images())


def test_the_library_leaves_the_teacher_alone():
    teacher = tiny_pipeline()
    student, report = compress.distill(
        teacher, "decoder", teacher=teacher, data=images(), steps=1, batch_size=2, width=8
    )
    assert isinstance(student.vae, AutoencoderTiny) and not isinstance(teacher.vae, AutoencoderTiny)
    assert report.details["held_out"] == 1


def test_loading_it_says_nothing(tmp_path, capfd):
    pipeline = tiny_pipeline()
    pipeline.register_modules(vae=small_autoencoder(pipeline.vae.config, Config()))
    compress.load(compress.save(pipeline, tmp_path / "small"))
    assert "AutoencoderTiny" not in capfd.readouterr().err
