"""Sampling: the same noise for a prompt whatever the batch, and the pipeline left as it was."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from compress.errors import UserError
from compress.evaluate import SCHEDULERS, EvaluateConfig
from compress.evaluate.sample import blank, sample, sample_grid, sampler
from tests.tiny import tiny_pipeline

PROMPTS = ["a cat", "a red dog", "sun", "tree in flat style", "heart"]
SEEDS = [7, 8, 9, 10, 11]


def config(**changes):
    return EvaluateConfig(**{"steps": 3, "batch_size": 2, **changes})


def test_batch_size_changes_no_picture_by_more_than_rounding():
    pipeline = tiny_pipeline()
    pictures = sample(pipeline, PROMPTS, SEEDS, config())
    assert pictures.shape == (5, 3, 16, 16)
    assert pictures.dtype == torch.uint8
    alone = sample(pipeline, PROMPTS[3:4], SEEDS[3:4], config(batch_size=1))
    assert (pictures[3].int() - alone[0].int()).abs().max() <= 1
    other = sample(pipeline, PROMPTS[3:4], [99], config(batch_size=1))
    assert (pictures[3].int() - other[0].int()).abs().max() > 5


def test_grid_pictures_are_what_a_user_gets():
    pipeline = tiny_pipeline()
    cells = sample_grid(pipeline, PROMPTS[:2], SEEDS[:2], config())
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    for cell, prompt, seed in zip(cells, PROMPTS, SEEDS, strict=False):
        assert (cell["prompt"], cell["seed"]) == (prompt, seed)
        generator = torch.Generator("cpu").manual_seed(seed)
        mine = pipeline(prompt, generator=generator, num_inference_steps=3, guidance_scale=4.0).images[0]
        assert np.array_equal(np.asarray(cell["image"]), np.asarray(mine))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples_and_the_pipeline_keeps_its_own(name):
    pipeline = tiny_pipeline()
    scheduler, settings = pipeline.scheduler, dict(pipeline.config)
    pictures = sample(pipeline, PROMPTS[:1], SEEDS[:1], config(scheduler=name, steps=2))
    assert blank(pictures) == 0
    assert pipeline.scheduler is scheduler
    assert dict(pipeline.config) == settings
    assert scheduler.num_inference_steps is None  # not even the shared scheduler has been set to other steps


def test_flow_matching_keeps_its_scheduler():
    pipeline = tiny_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match=r"evaluate\.scheduler=ddim: expected checkpoint"):
        sampler(pipeline, config(scheduler="ddim"))
    assert isinstance(sampler(pipeline, config(scheduler="checkpoint")).scheduler, FlowMatchEulerDiscreteScheduler)


def test_nan_is_an_error():
    pipeline = tiny_pipeline()
    pipeline.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"NaN: picture 0 .*'a cat', seed 7"):
        sample(pipeline, PROMPTS, SEEDS, config())


def test_blank_pictures_are_counted():
    pictures = torch.full((3, 3, 4, 4), 200, dtype=torch.uint8)
    pictures[0, 0] = 3
    pictures[1, 2, 1, 1] = 0
    assert blank(pictures) == 2
