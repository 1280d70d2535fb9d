"""Schedules of noise: targets, weights and times of diffusion and of flow matching."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from compress.models.schedule import schedule_of


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_target_gives_back_the_latents(kind):
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
    schedule = schedule_of(scheduler)
    latents, noise, times = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([400, 400])
    noisy = schedule.add_noise(latents, noise, times)
    target = schedule.target(latents, noise, times)
    torch.testing.assert_close(scheduler.step(target, 400, noisy).pred_original_sample, latents, atol=1e-5, rtol=1e-5)
    assert torch.equal(schedule.times(times), times)
    torch.testing.assert_close(schedule.clean(noisy, target, times), latents, atol=1e-5, rtol=1e-5)
    signal, rate = (value.view(-1, 1, 1, 1) for value in schedule.rates(times))
    torch.testing.assert_close(noisy, signal * latents + rate * noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weight_is_min_snr(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    schedule, times = schedule_of(scheduler), torch.tensor([0, 300, 999])
    alpha = scheduler.alphas_cumprod[times]
    snr = alpha / (1 - alpha)
    by = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(3)}[kind]
    torch.testing.assert_close(schedule.weight(times, 5.0), snr.clamp(max=5.0) / by, rtol=1e-4, atol=1e-6)
    assert schedule.weight(times, None).tolist() == [1.0, 1.0, 1.0]


def test_weight_without_any_signal_is_finite():
    schedule = schedule_of(DDPMScheduler(rescale_betas_zero_snr=True))
    schedule.scheduler.alphas_cumprod[-1] = 0.0
    assert schedule.weight(torch.tensor([999]), 5.0).tolist() == [1.0]


def test_flow_matching_is_that_of_the_sampler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = schedule_of(scheduler)
    latents, noise = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4)
    index = torch.tensor([999, 700, 300, 10])
    times = schedule.times(index)
    torch.testing.assert_close(times, scheduler.timesteps[999 - index], rtol=1e-4, atol=1e-3)
    noisy = schedule.add_noise(latents, noise, index)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, scheduler.timesteps[999 - index], noise))
    sigmas = (times / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigmas * schedule.target(latents, noise, index), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        schedule.clean(noisy, schedule.target(latents, noise, index), index), latents, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(torch.stack(schedule.rates(index)), torch.stack([1 - sigmas, sigmas]).flatten(1))
    assert schedule.weight(index, 5.0).tolist() == [1.0] * 4
