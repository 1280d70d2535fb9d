"""What choices do to a pipeline, and why some cannot be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from compress.jobs.benchmark import Choices
from compress.jobs.benchmark.apply import apply, refusal
from compress.jobs.benchmark.prompt import EMBEDDINGS, embedding_names
from compress.models.schedulers import SCHEDULERS
from tests.tiny import tiny_pipeline

CPU = torch.device("cpu")


def refused(choices: Choices, pipeline=None, device=CPU, size=(16, 16), folder=None) -> str | None:
    return refusal(pipeline or tiny_pipeline(), choices, device, size, folder)


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        (Choices(offload="model"), "this device is the CPU"),
        (Choices(vae_slicing=True), "changes nothing at batch 1"),
        (Choices(vae_tiling=True), "images of 16x16 px are not larger than a tile of 16 px"),
        (Choices(attention="xformers"), "xformers"),
        (Choices(attention="flash"), "cannot switch backends"),
        (Choices(scheduler="lcm", steps=4), "LCM needs a model distilled for it"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(choices, reason):
    assert reason in (refused(choices) or "")


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "lcm"])
def test_schedulers_of_the_same_family_are_not_refused(scheduler):
    assert refused(Choices(scheduler=scheduler)) is None


def test_what_has_an_effect_is_not_refused():
    for choices in (
        Choices(vae_slicing=True, batch_size=2),
        Choices(attention="plain"),
        Choices(attention_slicing=True),
        Choices(reuse_prompt=True),
    ):
        assert refused(choices) is None
    assert refused(Choices(vae_tiling=True), size=(16, 24)) is None
    assert refused(Choices(offload="model"), device=torch.device("cuda")) is None


def test_a_flow_model_keeps_its_scheduler():
    pipeline = tiny_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert "cannot be exchanged for a PNDMScheduler" in (refused(Choices(), pipeline) or "")
    assert refused(Choices(scheduler="checkpoint"), pipeline) is None


def test_lcm_is_for_models_that_were_distilled_for_it(tmp_path: Path):
    lcm, pipeline = Choices(scheduler="lcm", steps=4), tiny_pipeline()
    (tmp_path / "README.md").write_text("A Latent Consistency model.")
    assert refused(lcm, pipeline, folder=tmp_path) is None
    (tmp_path / "README.md").write_text("A diffusion model.")
    assert refused(lcm, pipeline, folder=tmp_path)
    pipeline.unet.register_to_config(time_cond_proj_dim=8)
    assert refused(lcm, pipeline) is None


def test_a_model_with_other_attention_keeps_it():
    pipeline = tiny_pipeline()
    pipeline.unet.set_attn_processor(SlicedAttnProcessor(1))
    assert "other attention processors" in (refused(Choices(attention="plain"), pipeline) or "")


def test_choices_are_put_into_effect():
    choices = Choices(
        scheduler="dpmsolver++_karras", batch_size=2, channels_last=True, attention="plain", vae_slicing=True,
        vae_tiling=True, compile=True,
    )  # fmt: skip
    pipeline = tiny_pipeline()
    apply(pipeline, choices, CPU)
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipeline.scheduler.config.use_karras_sigmas
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"  # the rest is the model's own
    assert pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(type(processor) is AttnProcessor for processor in pipeline.unet.attn_processors.values())
    assert pipeline.vae.use_slicing
    assert pipeline.vae.use_tiling
    assert pipeline.unet._compiled_call_impl is not None
    apply(pipeline, Choices(attention_slicing=True), CPU)
    assert type(pipeline.scheduler).__name__ == "PNDMScheduler"
    assert all(type(processor) is SlicedAttnProcessor for processor in pipeline.unet.attn_processors.values())


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "plain"},
        {"attention_slicing": True},
        {"channels_last": True},
        {"vae_slicing": True, "batch_size": 2},
    ],
)
def test_what_only_computes_in_another_way_gives_the_same_image(change):
    images = []
    for choices in (Choices(steps=2), replace(Choices(steps=2), **change)):
        pipeline = tiny_pipeline()
        apply(pipeline, choices, CPU)
        noise = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        images.append(pipeline(["a cat", "a dog"], num_inference_steps=2, generator=noise, output_type="pt").images)
    assert (images[0] - images[1]).abs().max() < 1e-5


def test_what_encode_prompt_gives_is_known_or_nothing():
    assert embedding_names(StableDiffusionPipeline) == EMBEDDINGS[:2]
    assert embedding_names(StableDiffusionXLPipeline) == EMBEDDINGS
    assert embedding_names(PixArtAlphaPipeline) == ()  # gives masks of attention too
    assert embedding_names(DDPMPipeline) == ()
