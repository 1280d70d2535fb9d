"""The lines of code that come with the best row do what the row did."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pipelines import PIPELINES

from compress.jobs.benchmark import Choices
from compress.jobs.benchmark.model import denoiser_of, pipeline_class
from compress.jobs.benchmark.prompt import embedding_names
from compress.jobs.benchmark.row import Task, measure
from compress.jobs.benchmark.snippet import snippet
from compress.models import ModelConfig


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "pipeline"
    PIPELINES["sdxl"]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "choices",
    [
        Choices(scheduler="checkpoint", steps=2),
        Choices(scheduler="dpmsolver++_karras", steps=2, batch_size=2, vae_slicing=True),
        Choices(scheduler="euler_a", steps=2, attention="plain", channels_last=True, reuse_prompt=True),
        Choices(scheduler="pndm", steps=2, attention_slicing=True, dtype="bf16"),
        pytest.param(Choices(scheduler="pndm", steps=2, engine="openvino"), marks=pytest.mark.slow),
    ],
)
def test_the_code_gives_the_images_of_the_row(tiny_model: Path, choices: Choices):
    assert_same_images(tiny_model, choices)


@pytest.mark.slow  # with one text encoder it is run in the usual suite
def test_the_code_gives_the_images_of_a_pipeline_with_two_text_encoders(tiny_sdxl: Path):
    for change in ({}, {"reuse_prompt": True}, {"reuse_prompt": True, "batch_size": 2}):
        assert_same_images(tiny_sdxl, replace(Choices(scheduler="ddim", steps=2), **change))
    assert_same_images(tiny_sdxl, Choices(scheduler="ddim", steps=2, reuse_prompt=True), guidance=1.0)


def assert_same_images(folder: Path, choices: Choices, guidance: float = 4.0):
    """Runs the snippet and a row of the same choices."""
    model = ModelConfig(str(folder))
    names: dict = {}
    embeddings = embedding_names(pipeline_class(model))
    code = snippet(model, choices, "cpu", denoiser_of(model), guidance, {}, embeddings)
    exec(compile(code, "snippet", "exec"), names)
    seeds = tuple(range(len(names["prompts"])))
    task = Task(model, choices, "cpu", 1, tuple(names["prompts"]), seeds, guidance, None, None, 1, 2)
    expected = measure(task)["images"]
    found = np.stack([np.array(image).transpose(2, 0, 1) for image in names["images"]])
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_code_for_what_needs_an_accelerator():
    choices = Choices(
        dtype="fp16", attention="flash", offload="sequential", vae_tiling=True, compile=True, scheduler="checkpoint"
    )
    model = ModelConfig("owner/name", revision="main", variant="fp16")
    lines = snippet(model, choices, "cuda:1", "transformer", 3.5, {"height": 512, "width": 768}).splitlines()
    assert lines[:4] == [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("owner/name", revision="main", variant="fp16", '
        "torch_dtype=torch.float16)",
    ]
    assert lines[4:8] == [
        'pipeline.transformer.set_attention_backend("flash")',
        "pipeline.vae.enable_tiling()",
        'pipeline.enable_sequential_cpu_offload(device="cuda:1")',
        "pipeline.transformer.compile()",
    ]
    assert "num_inference_steps=50, guidance_scale=3.5, height=512, width=768" in lines[-1]
    moved = snippet(model, replace(choices, offload="none", attention="xformers"), "cuda", "unet", 3.5, {})
    assert 'pipeline.to("cuda")' in moved
    assert "pipeline.unet.enable_xformers_memory_efficient_attention()" in moved
