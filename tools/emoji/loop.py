"""The three trainings of the embedded default, by the trainer that distillation uses."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compress.distill.batches import drawn
from compress.distill.trainer import Trainer, autocast
from compress.distill.training import TrainingConfig, Validation
from compress.system.random import generator

Batch = tuple[Tensor, torch.Generator]
Loss = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Images a step.
        learning_rate: Peak of a cosine schedule with a linear warm-up over its first 4 %.
        weight_decay: AdamW's.
        ema_decay: Largest decay of the averaged weights, which are the ones that are saved.
        bf16: Autocast the forward pass to bfloat16.
        seed: Seed of initialization, batches and noise.
        save_every: Steps between two training states.
        schedule_steps: Length of the schedule where it is longer than ``steps``; 0 for the same.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    bf16: bool = True
    seed: int = 0
    save_every: int = 500
    schedule_steps: int = 0


class Objective(nn.Module):
    """A loss as the trainer takes it, beside the parameters that it trains."""

    def __init__(self, trained: nn.Module, loss: Loss, bf16: bool) -> None:
        super().__init__()
        self.trained, self.loss = trained, loss
        self.cast = autocast("bf16" if bf16 else "no", torch.float32, torch.device("cpu"))

    def forward(self, batch: Batch) -> Tensor:
        """The loss as ``(1,)``."""
        with self.cast():
            return self.loss(*batch).float().reshape(1)


def train(
    model: nn.Module,
    loss: Loss,
    size: int,
    config: LoopConfig,
    out: Path,
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Trains ``model`` in place and leaves it with its averaged weights.

    Training states are kept in ``out``, so a second call continues where the first stopped.

    Args:
        model: What is trained; only parameters that require a gradient are.
        loss: From indices ``(batch_size,)`` of the training examples and a generator to a scalar.
        size: Number of training examples.
        config: See :class:`LoopConfig`.
        out: Folder of the states and of ``curve.json``.
        evaluate: Called with averaged weights in place at every save.

    Returns:
        ``{"curves": {name: [[step, value], ...]}, "figures": [...]}``.

    Raises:
        UserError: The training diverged.
        KeyboardInterrupt: After Ctrl-C, once the step is finished and its state saved.
    """

    def batches(step: int, part: slice) -> Batch:
        return drawn(size, config.batch_size, config.seed, step)[part], generator(config.seed, "batch", step)

    settings = TrainingConfig(
        steps=config.steps, batch_size=config.batch_size, learning_rate=config.learning_rate, warmup=0.04,
        weight_decay=config.weight_decay, betas=(0.9, 0.99), ema_decay=config.ema_decay, save_every=config.save_every,
        log_every=50, schedule_steps=config.schedule_steps, validation=Validation(every=config.save_every),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    file = out / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else []

    def validate(step: int) -> None:
        figures[:] = [found for found in figures if found["step"] < step] + [{"step": step, **(evaluate or dict)()}]
        file.write_text(json.dumps(figures))

    trainer = Trainer(
        Objective(model, loss, config.bf16), batches, settings, ["loss"], Accelerator(cpu=True, mixed_precision="no"),
        folder=out, validate=validate if evaluate is not None else None,
    )  # fmt: skip
    record = trainer.train()
    model.eval()
    result = {"curves": record.curves, "figures": figures}
    (out / "curve.json").write_text(json.dumps(result))
    return result
