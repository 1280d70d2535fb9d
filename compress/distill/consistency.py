"""The objective of consistency distillation."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.distill.few import Scene
from compress.models.schedule import Schedule

if TYPE_CHECKING:
    from compress.distill.batches import Batch
    from compress.distill.lcm import Config


class Consistency(nn.Module):
    """A student and the average of its weights that gives the target.

    Args:
        scene: Student, teacher and schedule.
        config: Of the method.
    """

    names = ("loss",)

    def __init__(self, scene: Scene, config: "Config") -> None:
        super().__init__()
        self.student, self._scene, self._config = scene.student, scene, config
        # Saved with the training state, as it decides what follows.
        self.average = copy.deepcopy(scene.student).eval().requires_grad_(False) if config.target_decay else None

    def forward(self, batch: "Batch") -> Tensor:
        """The loss, mean over the batch, ``(1,)``."""
        scene, device = self._scene, self._scene.device
        latents, noise = batch.latents.to(device, torch.float32), batch.noise.to(device)
        timesteps = (batch.timesteps.to(device) + 1) * scene.grid - 1
        earlier = (timesteps - scene.grid).clamp(min=0)
        noisy = scene.schedule.add_noise(latents, noise, timesteps)
        if noisy.ndim == 4:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        guided, *_ = scene.teacher(noisy, scene.schedule.times(timesteps), batch)
        before = ddim_step(scene.schedule, noisy, guided[:, : noisy.shape[1]].float(), timesteps, earlier)
        found = scene.clean(self.student, noisy, timesteps, batch)
        with torch.no_grad():
            wanted = scene.clean(self.average or self.student, before, earlier, batch)
        return loss(found, wanted, self._config).mean()[None]

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the average towards the student."""
        if self.average is not None:
            share = 1 - self._config.target_decay
            torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), share)


def ddim_step(schedule: Schedule, noisy: Tensor, prediction: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
    """One step of DDIM without noise (Song et al. 2021, equation 12): latents at an earlier timestep, ``(b, ...)``.

    Args:
        schedule: Of the noise.
        noisy: Latents ``(b, ...)`` at ``timesteps``.
        prediction: For them, same shape.
        timesteps: ``(b,)``.
        earlier: ``(b,)``.
    """
    shape = (-1, *[1] * (noisy.ndim - 1))
    signal, sigma = (rate.view(shape) for rate in schedule.rates(timesteps))
    signal_before, sigma_before = (rate.view(shape) for rate in schedule.rates(earlier))
    clean = schedule.clean(noisy, prediction, timesteps)
    return signal_before * clean + sigma_before * (noisy - signal * clean) / sigma


def loss(found: Tensor, wanted: Tensor, config: "Config") -> Tensor:
    """The error of each example, ``(b,)``."""
    squares = (found - wanted).pow(2)
    if config.loss == "huber":
        squares = (squares + config.huber_c**2).sqrt() - config.huber_c
    return squares.mean(tuple(range(1, squares.ndim)))
