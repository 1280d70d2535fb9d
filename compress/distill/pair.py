"""Checks that student and teacher match, and prepares them for training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from compress.errors import UserError, bad_value
from compress.models.families import family_of


def check_pair(student: Any, teacher: Any) -> None:
    """Checks by their configs that a student can learn from a teacher; both may be on the meta device.

    Raises:
        UserError: It cannot, with the reason.
    """
    if student is teacher:
        raise UserError("student and teacher are the same module; load the teacher separately or copy it")
    for name, model in (("student", student), ("teacher", teacher)):
        if not hasattr(model, "config") or "in_channels" not in model.config:
            raise UserError(f"distillation needs a denoiser of diffusers; the {name} is a {type(model).__name__}")
    if family_of(student) is not family_of(teacher):
        raise UserError(f"the student is a {type(student).__name__}, its teacher a {type(teacher).__name__}")
    for key in ("in_channels", "out_channels", "cross_attention_dim", "caption_channels", "joint_attention_dim"):
        ours, theirs = student.config.get(key), teacher.config.get(key)
        if ours != theirs and not isinstance(ours, (list, tuple)):
            raise UserError(f"the student has {key}={ours}, its teacher {theirs}: they must take the same inputs")


@contextmanager
def arranged(
    student: nn.Module, teacher: nn.Module, device: torch.device, gradient_checkpointing: bool = False
) -> Iterator[None]:
    """Sets the student to float32 and training mode, the teacher to evaluation mode, both channels last; undone after.

    Convolutions are faster channels last. The layout changes the last bits of an output, and a checkpoint is read back
    in the usual layout. On a CPU the student uses plain attention: the backward pass of torch's fused attention takes
    several times as long there.

    Args:
        student: To train.
        teacher: Frozen.
        device: Where both will be.
        gradient_checkpointing: Whether the student's backward pass computes activations again.

    Raises:
        UserError: The student cannot do that.
    """
    if gradient_checkpointing and not getattr(student, "_supports_gradient_checkpointing", False):
        raise bad_value("gradient_checkpointing", True, f"false: a {type(student).__name__} cannot do it")
    processors = dict(student.attn_processors) if device.type == "cpu" and hasattr(student, "attn_processors") else {}
    if processors and all(isinstance(processor, AttnProcessor2_0) for processor in processors.values()):
        student.set_attn_processor(AttnProcessor())
    before = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in student.named_parameters()}
    buffers = {name: buffer.dtype for name, buffer in student.named_buffers()}
    modes = student.training, teacher.training
    student.to(device, memory_format=torch.channels_last).float().train().requires_grad_(True)
    teacher.to(device, memory_format=torch.channels_last).eval()
    if gradient_checkpointing:
        student.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if gradient_checkpointing:
            student.disable_gradient_checkpointing()
        for name, parameter in student.named_parameters():
            dtype, needs_gradient = before[name]
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(needs_gradient)
        for name, buffer in student.named_buffers():
            buffer.data = buffer.data.to(buffers.get(name, buffer.dtype))
        if processors:
            student.set_attn_processor(processors)
        student.to(memory_format=torch.contiguous_format).train(modes[0])
        teacher.to(memory_format=torch.contiguous_format).train(modes[1])
