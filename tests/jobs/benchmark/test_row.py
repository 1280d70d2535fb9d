"""A row measured on a tiny model, in this process and in one of its own."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import compress.jobs.benchmark.row
from compress.errors import UserError
from compress.jobs.benchmark import Choices
from compress.jobs.benchmark.process import measure_apart
from compress.jobs.benchmark.row import Task, measure
from compress.models import ModelConfig

PROMPTS = ("a cat", "a dog", "a tree")


@pytest.fixture
def task(tiny_model: Path) -> Task:
    choices = Choices(scheduler="ddim", steps=3)
    return Task(ModelConfig(str(tiny_model)), choices, "cpu", 1, PROMPTS, (5, 6, 7), 4.0, None, None, 2, 3)


def images_of(task: Task, **changes) -> np.ndarray:
    return measure(replace(task, choices=replace(task.choices, **changes)))["images"]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def test_a_row_has_latency_throughput_memory_and_images(task):
    found = measure(task)
    cost, images = found["cost"], found["images"]
    assert 0 < cost["latency_low_s"] <= cost["latency_s"] <= cost["latency_high_s"]
    assert cost["throughput"] == pytest.approx(1 / cost["latency_s"])
    assert cost["latency_repeats"] == 3
    assert cost["peak_memory_bytes"] > 0
    assert images.dtype == np.uint8
    assert images.shape == (3, 3, 16, 16)


def test_images_are_those_of_the_stock_pipeline(task, tiny_model):
    from diffusers import DDIMScheduler, DiffusionPipeline

    stock = DiffusionPipeline.from_pretrained(tiny_model)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    noise = torch.Generator().manual_seed(7)
    expected = np.array(stock("a tree", num_inference_steps=3, guidance_scale=4.0, generator=noise).images[0])
    assert psnr(images_of(task)[2].transpose(1, 2, 0), expected) > 60


def test_batches_and_embedded_prompts_give_the_same_images(task):
    expected = images_of(task)
    assert psnr(images_of(task, batch_size=3), expected) >= 60
    assert psnr(images_of(task, reuse_prompt=True), expected) >= 60
    unguided = replace(task, guidance=1.0)
    assert psnr(images_of(unguided, reuse_prompt=True), images_of(unguided)) >= 60


def test_another_number_format_gives_nearly_the_same_images(task):
    assert 20 < psnr(images_of(task, dtype="bf16"), images_of(task)) < 80


def test_throughput_counts_the_images_of_a_call(task):
    cost = measure(replace(task, choices=replace(task.choices, batch_size=5)))["cost"]  # more than there are prompts
    assert cost["throughput"] == pytest.approx(5 / cost["latency_s"])


def test_images_may_have_another_size(task):
    assert measure(replace(task, height=24, width=32))["images"].shape == (3, 3, 24, 32)


def test_images_of_other_noise_are_drawn_besides(task):
    found = measure(replace(task, other_seeds=(15, 16, 17)))
    assert np.array_equal(found["images"], measure(task)["images"])
    assert np.array_equal(found["others"], measure(replace(task, seeds=(15, 16, 17)))["images"])
    assert "others" not in measure(task)


def test_what_cannot_be_done_is_skipped(task):
    found = measure(replace(task, choices=Choices(offload="model")))
    assert found == {"skipped": "offloading moves models from an accelerator to the CPU, and this device is the CPU"}


def test_a_row_that_would_take_too_long_is_skipped(task):
    found = measure(replace(task, longest=1e-6))
    assert "longer than the limit of 1e-06 s" in found["skipped"]
    assert "cost" in measure(replace(task, longest=1e6))


def test_the_time_of_a_image_is_predicted_from_a_few_steps(task, monkeypatch):
    now, hiccups = [0.0], iter([0.0, 500.0, 300.0, 0.0])

    def draw(pipeline, task, chosen, embedded=None, steps=None):
        now[0] += 10.0 + (steps + 1) + next(hiccups)  # text and decoding, a second a pass, and one pass more than steps

    monkeypatch.setattr(compress.jobs.benchmark.row, "_call", draw)
    monkeypatch.setattr("compress.evaluate.cost.latency.time.perf_counter", lambda: now[0])
    task = replace(task, choices=replace(task.choices, steps=50))
    assert compress.jobs.benchmark.row._expected(None, task, torch.device("cpu")) == 10.0 + 51.0


def test_a_model_that_gives_nan_has_no_row(task, monkeypatch):
    def broken(model, dtype):
        pipeline = compress.models.load_teacher(model, "cpu", dtype)
        pipeline.unet.conv_out.bias.fill_(float("nan"))
        return pipeline

    monkeypatch.setattr(compress.jobs.benchmark.row, "load_model", broken)
    with pytest.raises(FloatingPointError, match="NaN"):
        measure(task)


def test_a_process_of_its_own_gives_the_same(task):
    found = measure_apart(task)
    assert np.array_equal(found["images"], measure(task)["images"])
    assert found["cost"]["peak_memory_bytes"] < 500e6  # without Python and the libraries


def test_prompts_that_are_too_long_are_told_of(task):
    assert not measure_apart(task)["truncated"]
    assert measure_apart(replace(task, prompts=("a cat",) * 2 + ("a red cat " * 20,)))["truncated"]


def test_a_row_that_fails_takes_nothing_with_it(task):
    assert "tpu" in measure_apart(replace(task, device="tpu"))["failed"]
    with pytest.raises(UserError, match="model.path"):
        measure_apart(replace(task, model=ModelConfig("/nowhere")))


class Deadly(Choices):
    """Choices that end the process that reads them, as a full memory does."""

    def __setstate__(self, state):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_a_row_that_failed(task):
    assert "exit code -9" in measure_apart(replace(task, choices=Deadly()))["failed"]
