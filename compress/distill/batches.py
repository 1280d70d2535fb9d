"""The batches of a distillation, drawn from encoded examples."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from compress.data.examples import Examples
from compress.models.conditions import Conditions
from compress.system.random import generator


@dataclass(frozen=True)
class Batch:
    """A part of a step's batch, on the CPU.

    Attributes:
        latents: ``(b, ...)``, clean.
        noise: Same shape, standard normal.
        timesteps: ``(b,)`` integers in [0, timesteps of the schedule).
        conditions: Of b prompts.
        scales: Of the guidance, ``(b,)``; None: without guidance.
        more: Even values in [0, 1), ``(b,)``, and further noise, ``(k, b, ...)``; None: not asked for.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditions: Conditions
    scales: Tensor | None = None
    more: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Batches:
    """A source of batches that depend on the seed and the step only.

    An example gets the same noise with any number of processes, and resuming needs no state. Every example is used
    once per epoch.

    Attributes:
        examples: To draw from.
        size: Of a batch, over all processes.
        timesteps: Of the schedule.
        prompt_dropout: Share of captions replaced by the empty prompt, in [0, 1].
        seed: Of the run.
        guidance: Lowest and highest guidance scale, drawn evenly; None: without guidance.
        more: How much further noise a batch has.
        density: Of the timesteps, ``(timesteps,)``, in any unit; None: all alike.
    """

    examples: Examples
    size: int
    timesteps: int
    prompt_dropout: float
    seed: int
    guidance: tuple[float, float] | None = None
    more: int = 0
    density: Tensor | None = None

    def __call__(self, step: int, part: slice) -> Batch:
        """Part of the batch of a step, counted from 0."""
        source = generator(self.seed, "batch", step)
        if self.density is None:
            times = torch.randint(self.timesteps, (self.size,), generator=source)
        else:
            times = torch.multinomial(self.density, self.size, replacement=True, generator=source)
        noise = torch.randn(self.size, *self.examples.latents.shape[1:], generator=source)
        dropped = torch.rand(self.size, generator=source) < self.prompt_dropout
        index = drawn(len(self.examples.latents), self.size, self.seed, step)[part]
        captions = self.examples.captions[index].masked_fill(dropped[part], 0)
        conditions = self.examples.conditions.rows_of(captions)
        scales = None
        if self.guidance is not None:
            low, high = self.guidance
            scales = low + (high - low) * torch.rand(self.size, generator=generator(self.seed, "guidance", step))[part]
        more = None
        if self.more:
            source = generator(self.seed, "more", step)
            shares = torch.rand(self.size, generator=source)
            more = shares[part], torch.randn(self.more, *noise.shape, generator=source)[:, part]
        return Batch(self.examples.latents[index], noise[part], times[part], conditions, scales, more)


def drawn(count: int, size: int, seed: int, step: int) -> Tensor:
    """Indices of a step's examples, ``(size,)`` in [0, count); every example is used once per epoch."""
    first = step * size
    return torch.stack([_order(count, seed, i // count)[i % count] for i in range(first, first + size)])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch))
