"""The objective of distribution matching distillation."""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from compress.distill.few import Scene
from compress.distill.objective import predict

if TYPE_CHECKING:
    from compress.distill.batches import Batch

SHARES = 0.02, 0.98
"""Of the timesteps: between them the distributions are compared."""


class Matching(nn.Module):
    """A student, and a denoiser of its images that is trained along.

    Args:
        scene: Student, teacher and schedule.
    """

    names = ("loss", "matching_loss", "fake_loss")

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        fake: Any = copy.deepcopy(scene.teacher.model).float().train().requires_grad_(True)
        processors = getattr(fake, "attn_processors", {}).values()
        if scene.device.type == "cpu" and all(isinstance(processor, AttnProcessor2_0) for processor in processors):
            fake.set_attn_processor(AttnProcessor())  # the backward pass of fused attention is slow there
        if getattr(scene.student, "is_gradient_checkpointing", False):
            fake.enable_gradient_checkpointing()
        self.student, self.fake, self._scene = scene.student, fake, scene

    def forward(self, batch: "Batch") -> Tensor:
        """The sum and both losses, means over the batch, ``(3,)``.

        The student moves along the difference of two predictions for its noisy images: of the teacher with guidance,
        and of the denoiser of its images, which learns from the same images.
        """
        scene, schedule = self._scene, self._scene.schedule
        assert batch.more is not None
        shares, noises = (draws.to(scene.device) for draws in batch.more)
        starts, times = self._starts(batch, noises[1:])
        images = scene.clean(self.student, starts, times, batch)
        timesteps = ((SHARES[0] + (SHARES[1] - SHARES[0]) * shares) * schedule.steps).long()
        noisy = schedule.add_noise(images.detach(), noises[0], timesteps)
        guided, *_ = scene.teacher(noisy, schedule.times(timesteps), batch)
        with scene.autocast():
            prompted = replace(batch, scales=None)
            output = predict(self.fake, noisy, schedule.times(timesteps), prompted, torch.float32)
        target = schedule.target(images.detach(), noises[0], timesteps)
        guided, output = (found[:, : target.shape[1]].float() for found in (guided, output))
        real, fake = (schedule.clean(noisy, found.detach(), timesteps) for found in (guided, output))
        matching = matching_loss(images, real, fake)
        learning = (output - target).pow(2).mean()
        return torch.stack([matching + learning, matching, learning])

    @torch.no_grad()
    def _starts(self, batch: "Batch", noises: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents that the student itself leads to, ``(b, ...)``, and their timesteps ``(b,)``.

        Args:
            batch: Its timesteps are numbers of steps that the student has made, from 0.
            noises: ``(steps - 1, b, ...)``, added before each further step.
        """
        scene = self._scene
        latents, done = batch.noise.to(scene.device), batch.timesteps.to(scene.device)
        times = torch.tensor(scene.times, device=scene.device)
        for number, noise in enumerate(noises):
            rows = (done > number).nonzero().flatten()
            if not len(rows):
                break
            chosen = rows.cpu()
            scales = None if batch.scales is None else batch.scales[chosen]
            part = replace(batch, conditions=batch.conditions.rows_of(chosen), scales=scales)
            clean = scene.clean(self.student, latents[rows], times[number].expand(len(rows)), part)
            later = times[number + 1].expand(len(rows))
            latents = latents.index_copy(0, rows, scene.schedule.add_noise(clean, noise[rows], later))
        return latents, times[done]

    def follow(self) -> None:
        """See :class:`compress.distill.few.FewStepObjective`."""


def matching_loss(images: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """A loss whose gradient moves images from what a denoiser of them predicts to what the teacher predicts.

    The difference is divided by the mean distance of an image to the teacher's prediction (Yin et al. 2024, DMD,
    equation 8).

    Args:
        images: The student's clean latents, ``(b, ...)``.
        real: The teacher's prediction for them with noise, same shape.
        fake: The prediction of the denoiser of the student's images, same shape.
    """
    distance = (images.detach() - real).abs().mean(tuple(range(1, images.ndim)), keepdim=True).clamp(min=1e-6)
    step = (fake - real) / distance
    return 0.5 * (images - (images.detach() - step)).pow(2).mean()
