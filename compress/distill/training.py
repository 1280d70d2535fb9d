"""The keys of every stage that trains a denoiser: how long, how fast, and in which precision."""

import math
from dataclasses import dataclass
from typing import Any

from compress.errors import bad_value


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; see :class:`compress.distill.trainer.Trainer`.

    Attributes:
        steps: Optimizer steps, at least 1.
        batch_size: Examples a step, over all processes; a multiple of processes times ``gradient_accumulation``.
        gradient_accumulation: Parts in which a process computes its share of a batch, at least 1; saves memory, same
            result up to rounding.
        learning_rate: AdamW's peak, above 0.
        schedule: What follows the warm-up: ``cosine`` or ``linear`` down to 0, or ``constant``.
        schedule_steps: Length of the schedule where it is longer than ``steps``; 0: the same.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        weight_decay: AdamW's, at least 0.
        betas: AdamW's, each in [0, 1).
        max_grad_norm: Gradients are clipped to this norm, above 0.
        ema_decay: Largest decay of the averaged weights, which the student ends with, in [0, 1).
        mixed_precision: ``no``, ``bf16`` (autocast), or ``auto``: bf16 where the device computes it natively. In a
            bf16 or fp16 run ``no`` means ``auto``, since the trained weights are float32.
        save_every: Steps between two training states, at least 1.
        log_every: Steps between two points of the curves, each the mean since the last, at least 1.
    """

    steps: int = 300
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    schedule_steps: int = 0
    warmup: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    mixed_precision: str = "no"
    save_every: int = 50
    log_every: int = 10

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            UserError: A value is out of its range.
        """
        for key in ("steps", "batch_size", "gradient_accumulation", "save_every", "log_every"):
            check_value(self, key, getattr(self, key) >= 1, "an integer of at least 1")
        for key in ("learning_rate", "max_grad_norm"):
            check_value(self, key, 0 < getattr(self, key) < math.inf, "a number above 0")
        check_value(self, "weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        for key in ("warmup", "ema_decay"):
            check_value(self, key, 0 <= getattr(self, key) < 1, "a number in [0, 1)")
        check_value(
            self, "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"
        )
        check_value(self, "schedule", self.schedule in ("cosine", "linear", "constant"), "cosine, linear or constant")
        check_value(
            self,
            "schedule_steps",
            self.schedule_steps == 0 or self.schedule_steps >= self.steps,
            "0, or more than steps",
        )
        check_value(self, "mixed_precision", self.mixed_precision in ("no", "bf16", "auto"), "no, bf16 or auto")
        if self.batch_size % self.gradient_accumulation:
            expected = f"a multiple of gradient_accumulation, which is {self.gradient_accumulation}"
            raise bad_value("batch_size", self.batch_size, expected)

    def rate(self, step: int) -> float:
        """The learning rate of a step counted from 0: a linear rise over the warm-up, then the schedule."""
        steps = self.schedule_steps or self.steps
        warm = round(self.warmup * steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step - warm) / (steps - warm)
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return self.learning_rate * shape[self.schedule]


def check_value(config: Any, key: str, good: bool, expected: str) -> None:
    """Raises the error of a config's bad value."""
    if not good:
        raise bad_value(key, getattr(config, key), expected)


def check_examples(config: Any) -> None:
    """Checks ``max_examples`` and ``samples`` of a config.

    Raises:
        UserError: There would be no example.
    """
    most = config.max_examples
    good = most is None or most >= 1 or (most == 0 and config.samples.count > 0)
    check_value(config, "max_examples", good, "an integer of at least 1, null for all, or 0 with samples.count above 0")
