"""Each kind of target: a tiny model trained with it from nothing draws what the data is like."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from compress.data.examples import Examples
from compress.distill.features import Config, distill
from compress.models.conditions import Conditions
from tests.tiny import tiny_unet

TEXT = torch.zeros(1, 3, 16)
KINDS = ("epsilon", "v_prediction", "sample", "flow")


def data(count: int, seed: int) -> Tensor:
    """Three smooth shapes of any strength, with a little noise, ``(count, 4, 4, 4)``."""
    source = torch.Generator().manual_seed(seed)
    shapes = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(7))
    shapes = torch.nn.functional.interpolate(shapes, size=4, mode="bilinear")
    shapes = shapes / shapes.std((1, 2, 3), keepdim=True)
    strength = 0.7 + 0.3 * torch.rand(count, 1, 1, 1, generator=source)
    chosen = shapes[torch.randint(3, (count,), generator=source)]
    return chosen * strength + 0.1 * torch.randn(count, 4, 4, 4, generator=source)


def energy(a: Tensor, b: Tensor) -> float:
    """Unbiased energy distance of two sets (Szekely and Rizzo 2013), 0 for sets of one distribution."""
    a, b = a.flatten(1), b.flatten(1)
    own = sum(torch.cdist(x, x).mean() * len(x) / (len(x) - 1) for x in (a, b))
    return float(2 * torch.cdist(a, b).mean() - own)


@torch.no_grad()
def drawn(kind: str, seed: int, count: int = 128) -> Tensor:
    if kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler()
    else:
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind,
            clip_sample=False, timestep_spacing="trailing",
        )  # fmt: skip
    unet = tiny_unet(widths=(32,), seed=seed + 1)
    examples = Examples(
        data(512, 1), torch.zeros(512, dtype=torch.long), Conditions({"encoder_hidden_states": TEXT}, {})
    )
    config = Config(steps=300, batch_size=64, learning_rate=2e-3, losses={"noise": 1.0}, ema_decay=0.98)
    with torch.enable_grad():
        distill(unet, tiny_unet(widths=(32,)), examples, scheduler, config, seed=seed)
    latents = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    scheduler.set_timesteps(25)
    for time in scheduler.timesteps:
        prediction = unet(latents, time.expand(count), TEXT.expand(count, -1, -1)).sample
        latents = scheduler.step(prediction, time, latents, return_dict=False)[0]
    return latents


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_from_nothing_reaches_the_data(kind: str) -> None:
    """Pure noise is at 2.3; after so few steps epsilon ends near 0.14, sample near 0.1, the others near 0."""
    held = data(512, 99)
    nothing = energy(torch.randn(128, 4, 4, 4, generator=torch.Generator().manual_seed(5)), held)
    assert energy(drawn(kind, 0), held) < 0.1 * nothing
