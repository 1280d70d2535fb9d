"""The objective of consistency distillation."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.distill.few import Scene
from compress.models.schedule import Schedule

if TYPE_CHECKING:
    from compress.distill.batches import Batch


class Consistency(nn.Module):
    """A student and the average of its weights that gives the target.

    Args:
        scene: Student, teacher and schedule.
        error: Of what is found against what is wanted, such as :func:`loss`: ``(b,)``.
        decay: Of the average, in [0, 1); 0: the student itself.
    """

    names = ("loss",)

    def __init__(self, scene: Scene, error: Callable[[Tensor, Tensor], Tensor], decay: float) -> None:
        super().__init__()
        self.student, self._scene, self._error, self._decay = scene.student, scene, error, decay
        # Saved with the training state, as it decides what follows.
        self.average = copy.deepcopy(scene.student).eval().requires_grad_(False) if decay else None

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
        return self._error(found, wanted).mean()[None]

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the average towards the student."""
        if self.average is not None:
            torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 1 - self._decay)


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


def loss(found: Tensor, wanted: Tensor, kind: str, huber_c: float) -> Tensor:
    """The error of each example, ``(b,)``; ``kind`` and ``huber_c`` as in :class:`compress.distill.lcm.Config`."""
    squares = (found - wanted).pow(2)
    if kind == "huber":
        squares = (squares + huber_c**2).sqrt() - huber_c
    return squares.mean(tuple(range(1, squares.ndim)))
