"""The keys of every stage that trains a denoiser: how long, how fast, and in which precision."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from compress.errors import UserError, bad_value
from compress.evaluate.config import EvaluateConfig

OPTIMIZERS = ("adamw", "adamw_fused", "adamw_8bit", "muon")
SCHEDULES = (
    "cosine", "linear", "constant",
    "cosine_with_restarts", "polynomial", "constant_with_warmup", "piecewise_constant",
)  # fmt: skip
"""The first three have formulas here; the others are those of :func:`diffusers.optimization.get_scheduler`."""
SCHEDULE_OPTIONS = {"cosine_with_restarts": "num_cycles", "polynomial": "power", "piecewise_constant": "step_rules"}
TEACHER_ENGINES = ("eager", "openvino", "auto")
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Validation:
    """Images that the student draws during its training, with its averaged weights.

    Attributes:
        prompts: One image each, always from the same noise; empty: none are drawn.
        every: Steps between two drawings, at least 1.
        steps: Sampling steps, 1 to 1000.
        guidance: Guidance scale, at least 0.
        scheduler: As in :class:`compress.evaluate.config.EvaluateConfig`.
    """

    prompts: list[str] = field(default_factory=list)
    every: int = 100
    steps: int = 20
    guidance: float = 4.0
    scheduler: str = "dpmsolver++"

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            UserError: A value is out of its range.
        """
        check_value(self, "every", self.every >= 1, "an integer of at least 1")
        self.sampling()

    def sampling(self) -> EvaluateConfig:
        """How images are sampled; all of a drawing in one batch."""
        return EvaluateConfig(
            images=0, batch_size=max(1, len(self.prompts)), steps=self.steps, guidance=self.guidance,
            scheduler=self.scheduler,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; see :class:`compress.distill.trainer.Trainer`.

    Attributes:
        steps: Optimizer steps, at least 1.
        budget: Time for the training, such as ``90s``, ``30m`` or ``2h``: it ends at ``steps`` or when the time is used
            up, whichever comes first, and the schedule follows the one that is nearer to its end. Seconds that earlier
            processes used count, up to the state that the training continues from. None: no limit.
        batch_size: Examples a step, over all processes; a multiple of processes times ``gradient_accumulation``.
        gradient_accumulation: Parts in which a process computes its share of a batch, at least 1; saves memory, same
            result up to rounding.
        optimizer: ``adamw``; ``adamw_fused``: the same in one pass over the weights, equal up to rounding;
            ``adamw_8bit``: moments in 8 bits, by bitsandbytes; ``muon``: orthogonal updates of matrices and
            convolutions, AdamW for all else.
        learning_rate: The peak, above 0.
        schedule: What follows the warm-up: ``cosine`` or ``linear`` down to 0, ``constant``, or another of diffusers:
            ``cosine_with_restarts``, ``polynomial``, ``constant_with_warmup`` (the same as ``constant`` here), and
            ``piecewise_constant``, whose steps count from the start.
        schedule_options: Of diffusers' ``get_scheduler``: ``num_cycles``, ``power`` and ``step_rules``.
        schedule_steps: Length of the schedule where it is longer than ``steps``; 0: the same.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        weight_decay: At least 0.
        betas: AdamW's, each in [0, 1).
        max_grad_norm: Gradients are clipped to this norm, above 0.
        ema_decay: Largest decay of the averaged weights, which the student ends with, in [0, 1).
        mixed_precision: ``no``, ``bf16`` (autocast), or ``auto``: bf16 where that is faster. In a
            bf16 or fp16 run ``no`` means ``auto``, since the trained weights are float32.
        teacher_engine: What runs the frozen teacher: ``eager``; ``openvino`` on CPUs, in float32 or, where
            ``mixed_precision`` says so, bfloat16; or ``auto``: OpenVINO where it can.
        gradient_checkpointing: Whether the backward pass computes activations again: less memory, a third more time.
        compile: Whether ``torch.compile`` runs the student: fused kernels, after minutes of compiling that are kept for
            later runs on this machine, if they give its gradients. Not with rounded weights, nor with methods that pass
            parts of a batch.
        plateau: The training ends early when the mean loss of this many steps is not below that of as many before,
            at least twice ``log_every``; 0: never.
        from_state: A file ``state-*.safetensors`` of another training of this student, from which this one starts, such
            as one that diverged; None: start anew.
        save_every: Steps between two training states, at least 1.
        keep_states: Training states that are kept, the newest, at least 1.
        log_every: Steps between two points of the curves, each the mean since the last, at least 1.
        validation: See :class:`Validation`.
    """

    steps: int = 300
    budget: str | None = None
    batch_size: int = 32
    gradient_accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    schedule_steps: int = 0
    warmup: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    mixed_precision: str = "no"
    teacher_engine: str = "eager"
    gradient_checkpointing: bool = False
    compile: bool = False
    plateau: int = 0
    from_state: str | None = None
    save_every: int = 50
    keep_states: int = 2
    log_every: int = 10
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            UserError: A value is out of its range.
        """
        for key in ("steps", "batch_size", "gradient_accumulation", "save_every", "keep_states", "log_every"):
            check_value(self, key, getattr(self, key) >= 1, "an integer of at least 1")
        for key in ("learning_rate", "max_grad_norm"):
            check_value(self, key, 0 < getattr(self, key) < math.inf, "a number above 0")
        check_value(self, "weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        for key in ("warmup", "ema_decay"):
            check_value(self, key, 0 <= getattr(self, key) < 1, "a number in [0, 1)")
        check_value(
            self, "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"
        )
        for key, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("teacher_engine", TEACHER_ENGINES)):
            check_value(self, key, getattr(self, key) in known, "one of " + ", ".join(known))
        check_value(
            self,
            "schedule_steps",
            self.schedule_steps == 0 or self.schedule_steps >= self.steps,
            "0, or more than steps",
        )
        check_value(self, "mixed_precision", self.mixed_precision in ("no", "bf16", "auto"), "no, bf16 or auto")
        check_value(
            self,
            "plateau",
            self.plateau == 0 or self.plateau >= 2 * self.log_every,
            f"0, or at least twice log_every, which is {self.log_every}",
        )
        if self.budget is not None:
            check_value(self, "budget", self.seconds > 0, "a time such as 90s, 30m or 2h, or null")
        _check_schedule(self)
        if self.batch_size % self.gradient_accumulation:
            expected = f"a multiple of gradient_accumulation, which is {self.gradient_accumulation}"
            raise bad_value("batch_size", self.batch_size, expected)

    @property
    def seconds(self) -> float:
        """The budget in seconds; infinity without one, 0 if it cannot be read."""
        if self.budget is None:
            return math.inf
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", self.budget.strip())
        return float(found[1]) * _UNITS[found[2]] if found else 0.0

    def rate(self, step: int, used: float = 0.0) -> float:
        """The learning rate of a step counted from 0: a linear rise over the warm-up, then the schedule.

        Args:
            step: Steps done.
            used: Seconds of the budget that are used up.
        """
        steps = self.schedule_steps or self.steps
        at = max(step, used / self.seconds * steps) if self.budget else step
        warm = round(self.warmup * steps)
        if at < warm:
            return self.learning_rate * min(1.0, (at + 1) / warm)
        done = min(1.0, (at - warm) / max(1, steps - warm))
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        if self.schedule == "constant":
            return self.learning_rate
        shape = _shape(self.schedule, steps - warm, self.learning_rate, tuple(self.schedule_options.items()))
        return self.learning_rate * shape(at if self.schedule == "piecewise_constant" else at - warm)


@lru_cache
def _shape(name: str, steps: int, rate: float, options: tuple[tuple[str, Any], ...]) -> Callable[[float], float]:
    """A schedule of diffusers without its warm-up, as a factor of the learning rate."""
    import torch
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    made = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=steps, **dict(options))
    return made.lr_lambdas[0]


def _check_schedule(config: TrainingConfig) -> None:
    """Refuses options that the schedule does not have, and values that it cannot work with."""
    known = SCHEDULE_OPTIONS.get(config.schedule)
    for key in config.schedule_options:
        if key != known:
            has = f"its only one is {known}" if known else "it has none"
            raise UserError(f"schedule_options.{key}: no option of schedule={config.schedule}; {has}")
    if config.schedule == "piecewise_constant":
        rules = str(config.schedule_options.get("step_rules", ""))
        if not re.fullmatch(r"(\d[\d.e-]*:\d+,)+\d[\d.e-]*", rules):
            expected = "factors of the learning rate with the steps at which they end, such as 1:100,0.1:200,0.01"
            raise bad_value("schedule_options.step_rules", rules, expected)
    power = config.schedule_options.get("power", 1.0)
    if isinstance(power, float | int) and power < 0:
        raise bad_value("schedule_options.power", power, "0 or more: below it the rate grows without end")
    if known:
        try:
            shape = _shape(config.schedule, config.steps, config.learning_rate, tuple(config.schedule_options.items()))
            shape(config.steps // 2)
        except (ValueError, TypeError, ArithmeticError) as error:
            what = f"{known}={config.schedule_options.get(known)} and learning_rate={config.learning_rate:g}"
            raise UserError(f"schedule={config.schedule}: impossible with {what} ({error})") from error


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


def check_prompts(config: Any, or_null: str = "") -> None:
    """Checks ``prompt_dropout`` and ``guidance`` of a config.

    Args:
        config: Its ``guidance`` may be None.
        or_null: Ends the message where None is a choice.

    Raises:
        UserError: A value is out of its range.
    """
    check_value(config, "prompt_dropout", 0 <= config.prompt_dropout <= 1, "a number in [0, 1]")
    scales = config.guidance
    good = scales is None or (len(scales) == 2 and 1 <= scales[0] <= scales[1] < math.inf)
    check_value(config, "guidance", good, f"the lowest and the highest scale, at least 1, such as [4, 4]{or_null}")


def refuse_unused(config: TrainingConfig, *keys: str) -> None:
    """Refuses keys of this module that a method does not use.

    Raises:
        UserError: One is not its default.
    """
    usual = TrainingConfig()
    for key in keys:
        check_value(config, key, getattr(config, key) == getattr(usual, key), "nothing: this method does not use it")
