"""The optimizers of a training, by name."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compress.distill.training import TrainingConfig
from compress.errors import UserError

SMALLEST_MATRIX = 16
"""Rows and columns that a weight needs for Muon; output layers and scales, which have fewer, stay with AdamW."""
NO_GPU = "optimizer=adamw_8bit: needs a GPU, and this training is on the CPU; take adamw_fused"


def make(parameters: Sequence[nn.Parameter], settings: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that a config names.

    Raises:
        UserError: It needs a package or a GPU that is not there.
    """
    options: dict[str, Any] = {"betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "muon":
        return _muon(parameters, settings)
    if settings.optimizer == "adamw_8bit":
        return _adamw_8bit(parameters, settings.learning_rate, options)
    fused = {"fused": True} if settings.optimizer == "adamw_fused" else {}
    return torch.optim.AdamW(parameters, settings.learning_rate, **options, **fused)


def check_optimizer(name: str) -> None:
    """Checks that what an optimizer needs is here.

    Raises:
        UserError: It needs a package or a GPU that is not there.
    """
    if name == "adamw_8bit":
        _class_8bit()
        if not torch.accelerator.is_available():
            raise UserError(NO_GPU)


def kind(settings: TrainingConfig) -> str:
    """What decides the form of an optimizer's state."""
    return "adamw" if settings.optimizer == "adamw_fused" else settings.optimizer


def _muon(parameters: Sequence[nn.Parameter], settings: TrainingConfig) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) for matrices and convolutions, AdamW for all else.

    Updates are scaled as those of AdamW (Liu et al. 2025, 2502.16982), so that one learning rate does for both.
    """
    from pytorch_optimizer import Muon

    groups = [
        {"params": [parameter for parameter in parameters if is_matrix(parameter) is muon], "use_muon": muon}
        for muon in (True, False)
    ]
    rate, decay = settings.learning_rate, settings.weight_decay
    return Muon(
        [group for group in groups if group["params"]], lr=rate, weight_decay=decay, use_adjusted_lr=True,
        adamw_lr=rate, adamw_wd=decay, adamw_betas=settings.betas, adamw_eps=1e-8,
    )  # fmt: skip


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether Muon trains a parameter: with its dimensions but the first as one, it is a matrix that is not small."""
    return parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= SMALLEST_MATRIX


def _adamw_8bit(parameters: Sequence[nn.Parameter], rate: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits.

    Raises:
        UserError: There is no bitsandbytes, or no GPU.
    """
    made = _class_8bit()
    if parameters[0].device.type == "cpu":
        raise UserError(NO_GPU)
    return made(parameters, rate, **options)


def _class_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f'optimizer=adamw_8bit: needs the package bitsandbytes: pip install "compress[bitsandbytes]" ({error})'
        ) from error
    return AdamW8bit
