"""How often timesteps are drawn, and what they weigh."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from compress.distill.batches import Batches
from compress.distill.features import Config
from compress.distill.timesteps import density_and_weights
from compress.errors import UserError
from compress.models.schedule import FlowMatching, schedule_of
from tests.distill.test_features import examples
from tests.distill.worker import CONFIG, distilled

SCHEDULE = schedule_of(DDPMScheduler(beta_schedule="scaled_linear"))
EVERY = torch.arange(SCHEDULE.steps)


def test_drawing_by_the_weight_has_the_mean_of_weighing() -> None:
    errors = torch.rand(SCHEDULE.steps, generator=torch.Generator().manual_seed(0))
    density, weights = density_and_weights(SCHEDULE, "weighted", 1.0)
    none, plain = density_and_weights(SCHEDULE, "uniform", 1.0)
    assert none is None and torch.equal(plain, SCHEDULE.weight(EVERY, 1.0))
    assert weights.unique().numel() == 1
    torch.testing.assert_close((density / density.sum() * weights * errors).sum(), (plain * errors).mean())


def test_logit_normal_is_that_of_its_quantiles() -> None:
    density, weights = density_and_weights(FlowMatching(1000, 1.0), "logit_normal", None)
    assert torch.equal(weights, torch.ones(1000))
    expected = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([0.1, 0.3, 0.5, 0.9]).logit())
    found = (density / density.sum()).cumsum(0)[[99, 299, 499, 899]]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_batches_follow_the_density() -> None:
    density = torch.zeros(1000)
    density[[3, 500]] = torch.tensor([1.0, 3.0])
    batches = Batches(examples(), 400, 1000, 0.0, seed=0, density=density)
    times = batches(0, slice(None)).timesteps
    assert set(times.tolist()) == {3, 500} and 0.65 < (times == 500).float().mean() < 0.85
    assert torch.equal(batches(0, slice(100, 200)).timesteps, times[100:200])


def test_it_is_trained_with_and_a_name_that_is_none_is_refused(tmp_path) -> None:
    losses = {
        kind: distilled(tmp_path / kind, replace(CONFIG, steps=2, timestep_sampling=kind))[1].curves["loss"]
        for kind in ("uniform", "weighted", "logit_normal")
    }
    assert len({tuple(map(tuple, curve)) for curve in losses.values()}) == 3
    with pytest.raises(UserError, match="timestep_sampling=even: expected one of uniform, weighted, logit_normal"):
        Config(timestep_sampling="even")
