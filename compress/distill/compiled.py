"""Has ``torch.compile`` run a student in training, where that gives the gradients of the student itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.errors import bad_value
from compress.runtime import inductor
from compress.system.progress import say

if TYPE_CHECKING:
    from compress.distill.trainer import Trainer

TOLERANCE = 0.1
"""Norm of the difference of all gradients over theirs: three times what bfloat16 makes of float32."""


def check_compiler(wanted: bool) -> None:
    """Checks that what ``compile`` needs is here.

    Raises:
        UserError: It is wanted, and there is neither a GPU nor a C++ compiler.
    """
    if wanted and not torch.cuda.is_available() and (why := inductor.missing(torch.device("cpu"))):
        raise bad_value("compile", True, f"false: torch.compile {why}")


@contextmanager
def compiled(student: nn.Module, trainer: "Trainer") -> Iterator[None]:
    """Compiles the student's passes, forward and backward, if the trainer's settings ask for it; undone after.

    Compilers have lost gradients without a word: those of one batch are compared first, and where they differ the
    training goes on without compiling and says so.

    Args:
        student: Part of the trainer's objective.
        trainer: Before its first step.
    """
    try:
        if trainer.settings.compile:
            say("torch.compile: minutes, if it was not done on this machine before")
            if fault := _compile(student, trainer):
                student._compiled_call_impl = None
                say(f"torch.compile {fault}: training without it")
        yield
    finally:
        student._compiled_call_impl = None


def _compile(student: nn.Module, trainer: "Trainer") -> str:
    """Compiles the student; why that cannot be used, or an empty text."""
    from torch._dynamo.exc import TorchDynamoException

    expected = _gradients(trainer)
    student.compile(dynamic=False)
    try:
        found = _gradients(trainer)
    except (TorchDynamoException, RuntimeError) as error:
        trainer.objective.zero_grad(set_to_none=True)
        return f"fails here ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    off = torch.stack([found.sub_(expected).norm() / expected.norm()])
    worst = float(trainer.accelerator.gather(off).max())
    return "" if worst <= TOLERANCE else f"gives other gradients here, {worst:.0%} off"


def _gradients(trainer: "Trainer") -> Tensor:
    """The gradients of the trained parameters for a part of the next batch, in one row."""
    trainer.objective(trainer.batches(trainer.record.step, trainer.parts[0]))[0].backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.parameters]
    row = torch.cat([gradient.float().flatten() for gradient in found])
    trainer.objective.zero_grad(set_to_none=True)
    return row
