"""Method ``features``: distillation by noise, output and block features, as in BK-SDM.

Kim et al. 2023, "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", https://arxiv.org/abs/2305.15798.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, bad_value
from compress.stage import StageContext, StageReport

# torch and diffusers are imported where they are needed: a config can be checked without loading them.
if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from compress.data.examples import Examples

VERSION = 1
NEEDS_FLOAT = True
LEAVES_FLOAT = True
DISTRIBUTED = True


@dataclass(frozen=True)
class Config:
    """How the student is trained.

    Attributes:
        steps: Optimizer steps, at least 1.
        batch_size: Examples an optimizer step, over all processes; a multiple of the number of processes times
            ``gradient_accumulation``.
        gradient_accumulation: Parts in which a process computes its share of a batch, at least 1. Needs less memory
            and gives the same result up to rounding.
        max_examples: At most this many examples, chosen at random by the seed; None: all.
        learning_rate: AdamW's peak, above 0.
        schedule: What follows the warm-up: ``cosine`` or ``linear`` down to 0, or ``constant``.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        weight_decay: AdamW's, at least 0.
        max_grad_norm: Gradients are clipped to this norm, above 0.
        noise_weight: Weight of the error to the true noise (or velocity, or sample), at least 0.
        output_weight: Weight of the error to the teacher's prediction, at least 0.
        feature_weight: Weight of the blocks' errors relative to the teacher's features, at least 0.
        min_snr_gamma: Noise and output errors weigh min(SNR, gamma) / SNR (Hang et al. 2023,
            https://arxiv.org/abs/2303.09556), above 0; None: every timestep weighs the same.
        prompt_dropout: Share of captions replaced by the empty prompt, in [0, 1].
        ema_decay: Largest decay of the averaged weights that the student ends with, in [0, 1).
        mixed_precision: ``no``, ``bf16`` (autocast), or ``auto``: bf16 where the device computes it natively. ``no``
            in a run whose precision is bf16 or fp16 means ``auto``: the trained weights themselves are float32.
        save_every: Steps between two training states, at least 1.
        log_every: Steps between two points of the curves, each the mean since the last, at least 1.
    """

    steps: int = 300
    batch_size: int = 32
    gradient_accumulation: int = 1
    max_examples: int | None = None
    learning_rate: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    noise_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 0.1
    min_snr_gamma: float | None = 5.0
    prompt_dropout: float = 0.1
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
            _check(self, key, getattr(self, key) >= 1, "an integer of at least 1")
        if self.max_examples is not None:
            _check(self, "max_examples", self.max_examples >= 1, "an integer of at least 1, or null for all")
        for key in ("learning_rate", "max_grad_norm"):
            _check(self, key, 0 < getattr(self, key) < math.inf, "a number above 0")
        for key in ("weight_decay", "noise_weight", "output_weight", "feature_weight"):
            _check(self, key, 0 <= getattr(self, key) < math.inf, "a number of at least 0")
        for key in ("warmup", "ema_decay"):
            _check(self, key, 0 <= getattr(self, key) < 1, "a number in [0, 1)")
        _check(self, "prompt_dropout", 0 <= self.prompt_dropout <= 1, "a number in [0, 1]")
        if self.min_snr_gamma is not None:
            _check(self, "min_snr_gamma", 0 < self.min_snr_gamma < math.inf, "a number above 0, or null")
        _check(self, "schedule", self.schedule in ("cosine", "linear", "constant"), "cosine, linear or constant")
        _check(self, "mixed_precision", self.mixed_precision in ("no", "bf16", "auto"), "no, bf16 or auto")
        if self.batch_size % self.gradient_accumulation:
            expected = f"a multiple of gradient_accumulation, which is {self.gradient_accumulation}"
            raise bad_value("batch_size", self.batch_size, expected)
        if not self.noise_weight + self.output_weight + self.feature_weight:
            raise bad_value("noise_weight", self.noise_weight, "above 0 where output_weight and feature_weight are 0")


def _check(config: Config, key: str, good: bool, expected: str) -> None:
    if not good:
        raise bad_value(key, getattr(config, key), expected)


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Trains ``pipeline``'s denoiser to follow ``context.teacher``'s; every process of the run calls it.

    Raises:
        UserError: Student, teacher and data do not fit each other, or the training diverged.
    """
    from datetime import timedelta

    from accelerate import PartialState

    from compress.data.examples import cached_examples
    from compress.distill.losses import kept_channels
    from compress.distill.zeros import made_sparse
    from compress.models import denoiser

    ours, theirs = (p.scheduler.config.get("prediction_type", "epsilon") for p in (pipeline, context.teacher))
    if ours != theirs:
        raise UserError(
            f"the student predicts {ours!r} and its teacher {theirs!r}: the scheduler's prediction_type differs"
        )
    # The others wait while the first process encodes the examples, which may take longer than the usual half hour.
    state = PartialState(cpu=context.device.type == "cpu", timeout=timedelta(hours=12))
    with state.main_process_first():
        examples = cached_examples(
            context.teacher,
            context.data.train,
            context.folder,
            max_examples=config.max_examples,
            seed=context.seed,
            device=context.device,
            write=state.is_main_process,
        )
    return distill(
        denoiser(pipeline),
        denoiser(context.teacher),
        examples,
        pipeline.scheduler,
        config,
        seed=context.seed,
        device=context.device,
        kept=kept_channels(context.history),
        keep_zeros=made_sparse([*context.before, *context.history]),
        folder=context.folder,
        log=context.log,
    )


def distill(
    student: "torch.nn.Module",
    teacher: "torch.nn.Module",
    examples: "Examples",
    scheduler: Any,
    config: Config,
    *,
    seed: int = 0,
    device: "torch.device | str" = "cpu",
    kept: Mapping[str, list[int]] | None = None,
    keep_zeros: bool = False,
    folder: Path | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
) -> StageReport:
    """Trains ``student`` in place to follow ``teacher`` and leaves it with its averaged weights.

    Needs no pipeline and no Hydra, only ``examples`` (see :func:`compress.data.examples.encode_examples`). With a
    ``folder`` it saves training states there and continues from the newest; on a CPU with the same number of threads
    the weights are, bit for bit, those of a run that was never stopped. Works under ``accelerate launch``: the batch is
    split among the processes.

    Args:
        student: A ``UNet2DConditionModel``; trained in float32 and left in its dtype.
        teacher: A ``UNet2DConditionModel``; stays as it is.
        examples: Latents ``(n, c, h, w)`` and text embeddings ``(m, tokens, width)``.
        scheduler: The diffusers scheduler that the two work with; its noise schedule and prediction type are used.
        config: See :class:`Config`.
        seed: Of the examples' order, timesteps, noise and dropped prompts.
        device: Where to train.
        kept: Block of the student -> channels of the teacher's block that the student's are, in their order. Blocks of
            other widths that are not in it are compared through a learned 1x1 convolution.
        keep_zeros: Whether weights of Conv2d and Linear that are zero stay so, as after pruning to a sparsity.
        folder: Where training states go; None: nowhere.
        log: Takes metrics and the number of steps done.

    Returns:
        Coverage, ``details`` (steps, number of examples, final losses, how each block was compared) and curves.

    Raises:
        UserError: Student, teacher and examples do not fit each other, or the training diverged.
        KeyboardInterrupt: After Ctrl-C, once the step is finished and its state saved.
    """
    import torch

    from compress.distill.trainer import train

    return train(
        student,
        teacher,
        examples,
        scheduler,
        config,
        seed=seed,
        device=torch.device(device),
        kept=dict(kept or {}),
        keep_zeros=keep_zeros,
        folder=folder,
        log=log,
    )
