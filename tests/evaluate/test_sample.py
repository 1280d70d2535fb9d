"""Sampling: the same noise for a prompt whatever the batch, no batch twice, and the pipeline left as it was."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from PIL import Image

from compress.evaluate import EvaluateConfig
from compress.evaluate.latents import read_latents
from compress.evaluate.manifest import settings
from compress.evaluate.sample import alone, blank, image_paths, sample, sampler, scheduler_used
from compress.models.schedulers import SCHEDULERS
from tests.tiny import tiny_pipeline

PROMPTS = ["a cat", "a red dog", "sun", "tree in flat style", "heart"]
SEEDS = [7, 8, 9, 10, 11]


def config(**changes):
    return EvaluateConfig(**{"steps": 3, "batch_size": 2, **changes})


def test_batch_size_changes_no_image_by_more_than_rounding():
    pipeline = tiny_pipeline()
    images = sample(pipeline, PROMPTS, SEEDS, config())
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.uint8
    for size in (1, 3, 5):
        error = (images.double() - sample(pipeline, PROMPTS, SEEDS, config(batch_size=size))).square().mean()
        assert error == 0 or 10 * torch.log10(255**2 / error) >= 70  # dB
    other = sample(pipeline, PROMPTS[3:4], [99], config(batch_size=1))
    assert (images[3].int() - other[0].int()).abs().max() > 5


def test_images_alone_are_what_a_user_gets():
    pipeline = tiny_pipeline()
    images = sample(pipeline, PROMPTS[:2], SEEDS[:2], alone(config(resize=8)))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    for image, prompt, seed in zip(images, PROMPTS, SEEDS, strict=False):
        generator = torch.Generator("cpu").manual_seed(seed)
        mine = pipeline(prompt, generator=generator, num_inference_steps=3, guidance_scale=4.0).images[0]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(mine))


def test_files_hold_the_same_bits_whoever_samples_which_batch(tmp_path):
    pipeline = tiny_pipeline()
    expected = sample(pipeline, PROMPTS, SEEDS, config())
    found = sample(pipeline, PROMPTS, SEEDS, config(), tmp_path / "one")
    assert torch.equal(found[0:5], expected)
    sample(pipeline, PROMPTS[4:], SEEDS[4:], config(), tmp_path / "two", first=4)
    sample(pipeline, PROMPTS[:4], SEEDS[:4], config(), tmp_path / "two")
    names = sorted(file.name for file in (tmp_path / "two").iterdir())
    assert names == [file.name for file in image_paths(tmp_path, range(5))]
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_only_batches_that_are_not_whole_are_sampled_again(tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    expected = sample(pipeline, PROMPTS, SEEDS, config(), tmp_path, latents=True)[0:5]
    files = image_paths(tmp_path, range(5))
    files[3].unlink()
    before = [files[index].stat().st_mtime_ns for index in (0, 1, 4)]
    passes = []
    monkeypatch.setattr(
        pipeline.unet, "forward", lambda *a, f=pipeline.unet.forward, **k: passes.append(1) or f(*a, **k)
    )
    assert torch.equal(sample(pipeline, PROMPTS, SEEDS, config(), tmp_path, latents=True)[0:5], expected)
    assert len(passes) == 3  # the steps of one batch
    assert [files[index].stat().st_mtime_ns for index in (0, 1, 4)] == before


def test_a_killed_sampling_goes_on_where_it_was(tmp_path):
    pipeline, killed = tiny_pipeline(), tmp_path / "killed"
    arguments = (["a cat"] * 16, range(16), config(steps=20))
    expected = sample(pipeline, *arguments)
    child = os.fork()
    if child == 0:
        sample(pipeline, *arguments, killed, latents=True)
        os._exit(0)
    deadline = time.monotonic() + 600
    while len(list(killed.glob("sample-*.png"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    done = {file: file.stat().st_mtime_ns for file in killed.glob("sample-*.png")}
    assert 4 <= len(done) < 16
    found = sample(pipeline, *arguments, killed, latents=True)
    whole = {file for file in done if file.with_name(f"sample-{int(file.stem[-6:]) ^ 1:06d}.png") in done}
    assert len(whole) >= 4
    assert all(file.stat().st_mtime_ns == done[file] for file in whole)
    assert torch.equal(found[0:16], expected)
    assert all(len(read_latents(killed, start)) == 2 for start in range(0, 16, 2))


def test_images_are_reduced_and_may_have_another_size():
    pipeline = tiny_pipeline()
    whole = sample(pipeline, PROMPTS[:2], SEEDS[:2], config(height=16, width=32))
    assert whole.shape == (2, 3, 16, 32)
    small = sample(pipeline, PROMPTS[:2], SEEDS[:2], config(height=16, width=32, resize=8))
    assert small.shape == (2, 3, 8, 16)
    expected = Image.fromarray(whole[1].permute(1, 2, 0).numpy()).resize((16, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(small[1].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_latents_after_one_step_are_those_of_the_whole_sampling(tmp_path):
    pipeline = tiny_pipeline()
    sample(pipeline, PROMPTS, SEEDS, config(), tmp_path, latents=True)
    kept = torch.cat([read_latents(tmp_path, start) for start in (0, 2, 4)])
    assert kept.shape == (5, 4, 8, 8)
    steps = []
    twin = sampler(pipeline, config())
    twin(PROMPTS[0], generator=torch.Generator("cpu").manual_seed(SEEDS[0]), num_inference_steps=3, guidance_scale=4.0,
         callback_on_step_end=lambda pipe, step, time, more: steps.append(more["latents"].clone()) or {})  # fmt: skip
    assert torch.allclose(kept[0], steps[0][0], atol=1e-5)
    with pytest.raises(FileNotFoundError):
        read_latents(tmp_path, 6)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "lcm"])
def test_every_scheduler_samples_and_the_pipeline_keeps_its_own(name):
    pipeline = tiny_pipeline()
    scheduler, settings = pipeline.scheduler, dict(pipeline.config)
    images = sample(pipeline, PROMPTS[:1], SEEDS[:1], config(scheduler=name, steps=2))
    assert blank(images) == 0
    assert pipeline.scheduler is scheduler
    assert dict(pipeline.config) == settings
    assert scheduler.num_inference_steps is None  # not even the shared scheduler has been set to other steps


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "checkpoint"])
@pytest.mark.parametrize("own", [FlowMatchEulerDiscreteScheduler, LCMScheduler])
def test_a_scheduler_that_does_not_fit_is_replaced_by_the_models_own(own, name):
    pipeline = tiny_pipeline()
    pipeline.scheduler = own()
    assert isinstance(sampler(pipeline, config(scheduler=name)).scheduler, own)
    assert scheduler_used(pipeline, config(scheduler=name)) == own.__name__
    shown = settings(pipeline, config(scheduler=name), (16, 16), torch.float32, 0)
    assert shown["scheduler"] == own.__name__


def test_a_flow_matching_solver_is_exchanged_for_those_that_know_flows_alone():
    pipeline = tiny_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    used = {name: scheduler_used(pipeline, config(scheduler=name)) for name in SCHEDULERS}
    assert {name for name, found in used.items() if found == name} == {"dpmsolver++", "unipc"}


def test_nan_is_an_error():
    pipeline = tiny_pipeline()
    pipeline.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"NaN: image 0 .*'a cat', seed 7"):
        sample(pipeline, PROMPTS, SEEDS, config())


def test_blank_images_are_counted():
    images = torch.full((3, 3, 4, 4), 200, dtype=torch.uint8)
    images[0, 0] = 3
    images[1, 2, 1, 1] = 0
    assert blank(images) == 2
