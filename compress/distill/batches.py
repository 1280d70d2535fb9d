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
    """A part of one step's batch, on the CPU.

    Attributes:
        latents: ``(b, ...)``, clean.
        noise: Of the same shape, standard normal.
        timesteps: ``(b,)`` integers in [0, timesteps of the schedule).
        conditions: Of b prompts.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditions: Conditions


@dataclass(frozen=True)
class Batches:
    """A source of batches: what is drawn depends on the seed and the step alone.

    An example gets the same noise with any number of processes, and nothing has to be remembered to continue a
    training. Every example comes once before any comes again.

    Attributes:
        examples: To draw from.
        size: Of a whole batch, over all processes.
        timesteps: Of the schedule.
        prompt_dropout: Share of captions replaced by the empty prompt, in [0, 1].
        seed: The run's.
    """

    examples: Examples
    size: int
    timesteps: int
    prompt_dropout: float
    seed: int

    def __call__(self, step: int, part: slice) -> Batch:
        """Part of the batch of a step, counted from 0."""
        source = generator(self.seed, "batch", step)
        times = torch.randint(self.timesteps, (self.size,), generator=source)
        noise = torch.randn(self.size, *self.examples.latents.shape[1:], generator=source)
        dropped = torch.rand(self.size, generator=source) < self.prompt_dropout
        index = drawn(len(self.examples.latents), self.size, self.seed, step)[part]
        captions = self.examples.captions[index].masked_fill(dropped[part], 0)
        conditions = self.examples.conditions.rows_of(captions)
        return Batch(self.examples.latents[index], noise[part], times[part], conditions)


def drawn(count: int, size: int, seed: int, step: int) -> Tensor:
    """The examples of a step's batch, ``(size,)`` of ``count``: each comes once before any comes again."""
    first = step * size
    return torch.stack([_order(count, seed, i // count)[i % count] for i in range(first, first + size)])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch))
