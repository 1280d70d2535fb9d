"""Noise schedules: noisy examples, and what a perfect denoiser predicts for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.families import family_of

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

FLOW = "flow_prediction"


class Schedule(Protocol):
    """A noise schedule for training and calibration.

    Attributes:
        steps: Number of timesteps; a timestep is an integer in [0, steps).
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``.
    """

    @property
    def steps(self) -> int:
        """See above."""

    @property
    def prediction_type(self) -> str:
        """See above."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents, of the latents' shape; ``timesteps`` is ``(b,)``."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction of a perfect denoiser, of the latents' shape."""

    def clean(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction for noisy latents implies, of the latents' shape."""

    def rates(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the clean latents and of the noise in noisy latents, each ``(b,)``."""

    def weight(self, timesteps: Tensor, gamma: float | None) -> Tensor:
        """Weight of each timestep's loss, ``(b,)``: min-SNR with ``gamma``; 1 without, and for flow matching."""

    def times(self, timesteps: Tensor) -> Tensor:
        """The denoiser's time input for some timesteps, ``(b,)``."""


def schedule_of(scheduler: Any, denoiser: Any = None) -> Schedule:
    """The schedule that a model was trained with, for any sampler.

    Args:
        scheduler: The pipeline's; only its config matters.
        denoiser: Some flow-matching models scale their time input.

    Raises:
        UserError: Unsupported scheduler.
    """
    config = scheduler.config
    kind = config.get("prediction_type")
    if "FlowMatch" in type(scheduler).__name__ or kind == FLOW or config.get("use_flow_sigmas"):
        return FlowMatching(
            config.get("num_train_timesteps", 1000), config.get("flow_shift") or config.get("shift") or 1.0,
            _time_scale(denoiser),
        )  # fmt: skip
    if "beta_schedule" in config and kind in ("epsilon", "v_prediction", "sample"):
        from diffusers import DDPMScheduler

        return Diffusion(DDPMScheduler.from_config(config))
    raise UserError(
        f"{type(scheduler).__name__} with prediction_type {kind}: expected a scheduler with a beta schedule and "
        "prediction_type epsilon, v_prediction or sample, or one of flow matching"
    )


def _time_scale(denoiser: Any) -> float:
    """Factor of the time input of flow-matching models."""
    family = family_of(denoiser)
    config: Mapping[str, Any] = getattr(denoiser, "config", {})
    return config.get("timestep_scale") or (family.time_scale if family else 1.0)


class Diffusion:
    """Noise by a beta schedule (Ho et al. 2020), with min-SNR weights (Hang et al. 2023, equations 8 to 10)."""

    def __init__(self, scheduler: "DDPMScheduler") -> None:
        self.scheduler = scheduler
        self.steps: int = scheduler.config.num_train_timesteps
        self.prediction_type: str = scheduler.config.prediction_type

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return latents if self.prediction_type == "sample" else noise

    def clean(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        signal, noise = (_over(rate, noisy) for rate in self.rates(timesteps))
        if self.prediction_type == "epsilon":
            return (noisy - noise * prediction) / signal.clamp(min=1e-4)
        return signal * noisy - noise * prediction if self.prediction_type == "v_prediction" else prediction

    def rates(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Schedule`."""
        share = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return share.sqrt(), (1 - share).sqrt()

    def weight(self, timesteps: Tensor, gamma: float | None) -> Tensor:
        """See :class:`Schedule`."""
        from diffusers.training_utils import compute_snr

        if gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=gamma)
        if self.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        # Without any signal, as with zero terminal SNR, the limit of the ratio is 1.
        return clipped if self.prediction_type == "sample" else torch.where(snr > 0, clipped / snr, 1.0)

    def times(self, timesteps: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        return timesteps


@dataclass(frozen=True)
class FlowMatching:
    """Straight paths from data to noise, whose velocity the denoiser predicts (Lipman et al. 2023).

    Attributes:
        steps: Number of timesteps.
        shift: Of the times towards noise (Esser et al. 2024, section 5.3.2).
        time_scale: The denoiser's time input is this times ``steps`` times the share of noise.
    """

    steps: int
    shift: float
    time_scale: float = 1.0
    prediction_type: str = FLOW

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        sigmas = _over(self._sigmas(timesteps), latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        return noise - latents

    def clean(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        return noisy - _over(self._sigmas(timesteps), noisy) * prediction

    def rates(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Schedule`."""
        sigmas = self._sigmas(timesteps)
        return 1 - sigmas, sigmas

    def weight(self, timesteps: Tensor, gamma: float | None) -> Tensor:
        """See :class:`Schedule`."""
        return torch.ones(len(timesteps), device=timesteps.device)

    def times(self, timesteps: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        return self._sigmas(timesteps) * self.steps * self.time_scale

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        """Share of noise in (0, 1], ``(b,)``."""
        even = (timesteps.float() + 1) / self.steps
        return self.shift * even / (1 + (self.shift - 1) * even)


def _over(values: Tensor, latents: Tensor) -> Tensor:
    """Values ``(b,)`` in the dtype of latents ``(b, ...)``, with axes of size 1 for the rest."""
    return values.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))
