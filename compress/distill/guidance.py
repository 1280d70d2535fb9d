"""Guidance in one pass: the student gives what its teacher gives with classifier-free guidance, which takes two passes.

Meng et al. 2023, "On Distillation of Guided Diffusion Models", https://arxiv.org/abs/2210.03142. The guidance scale is
an input of a UNet as in latent consistency models (Luo et al. 2023, https://arxiv.org/abs/2310.04378), so that stock
pipelines make one pass by themselves. A transformer has no such input: it learns one scale.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compress.distill.zeros import Zeros
from compress.errors import UserError, bad_value
from compress.models.conditions import Conditions
from compress.models.meta import meta_model
from compress.models.outline import Outline

WIDTH = 256
"""Of the guidance scale's embedding, as published latent consistency models have it."""


def check_guidance(guidance: tuple[float, float], student: Any, teacher: Any) -> None:
    """Refuses what has no guidance or has it already; models may be on the meta device.

    Raises:
        UserError: With what would be right.
    """
    low, high = guidance
    check_unguided(guidance, teacher)
    if low < high and not _has_time_embedding(student):
        expected = f"one scale, as [{high:g}, {high:g}]: a {type(student).__name__} takes no guidance scale as an input"
        raise bad_value("guidance", list(guidance), expected)


def check_prompted(outline: Outline) -> None:
    """Refuses a pipeline without prompts.

    Raises:
        UserError: It has no text encoder.
    """
    if outline.classes and not any(name.startswith("text_encoder") for name in outline.classes):
        raise UserError(f"guidance: {outline.kind} takes no prompt, so there is no guidance")


def check_unguided(guidance: tuple[float, float], teacher: Any) -> None:
    """Refuses a teacher, perhaps on the meta device, whose one pass is guided already.

    Raises:
        UserError: It is.
    """
    if teacher.config.get("time_cond_proj_dim") or teacher.config.get("guidance_embeds"):
        expected = "null, if the method allows it: one pass of this teacher gives its guided output already"
        raise bad_value("guidance", list(guidance), expected)


def takes_scale(model: Any) -> bool:
    """Whether the guidance scale is an input of a denoiser."""
    return bool(model.config.get("time_cond_proj_dim"))


@torch.no_grad()
def add_scale_input(model: Any, guidance: tuple[float, float]) -> None:
    """Gives a UNet the guidance scale as an input, in place; it computes the same until it is trained.

    Args:
        model: The denoiser; a transformer stays as it is.
        guidance: Lowest and highest scale to be trained. With one scale alone the input is without effect, so that
            no other counts; what a UNet had learned for that scale becomes a part of a bias.
    """
    if takes_scale(model):
        if guidance[0] == guidance[1]:
            _fix_scale(model.time_embedding, guidance[0])
        return
    if not _has_time_embedding(model):
        return
    weight = next(model.time_embedding.parameters())
    shape = meta_model(type(model), {**model.config, "time_cond_proj_dim": WIDTH}).time_embedding.cond_proj.weight.shape
    layer = nn.Linear(shape[1], shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(layer.weight)
    layer.weight.requires_grad_(weight.requires_grad)
    model.time_embedding.cond_proj = layer
    model.register_to_config(time_cond_proj_dim=WIDTH)


def kept_zeros(student: Any, keep: bool, guidance: tuple[float, float] | None) -> Zeros:
    """The weights that stay zero in a training: the student's own if asked, and the input for one scale alone."""
    layer = student.time_embedding.cond_proj if takes_scale(student) else None
    kept = [module for module in student.modules() if keep and module is not layer]
    if layer is not None and guidance is not None and guidance[0] == guidance[1]:
        kept.append(layer)
    return Zeros(kept)


def scale_embedding(scales: Tensor, width: int) -> Tensor:
    """What stock pipelines give a UNet for some guidance scales, ``(b,)``: ``(b, width)``."""
    from diffusers import LatentConsistencyModelPipeline

    embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    return embedding(None, scales - 1, embedding_dim=width)  # type: ignore[arg-type]


def empty_prompt(conditions: Conditions) -> Conditions:
    """What guidance points away from: the first row of the examples' conditions.

    Raises:
        UserError: The model takes no prompts.
    """
    if not conditions.rows:
        raise UserError("guidance: the model takes no prompt, so there is no guidance: expected null")
    return conditions.rows_of(slice(1))


def _fix_scale(embedding: Any, scale: float) -> None:
    """Moves what the input gives for a scale into the bias of the time embedding's first layer."""
    layer, first = embedding.cond_proj, embedding.linear_1
    if layer.weight.is_meta:
        return
    shift = layer(scale_embedding(torch.tensor([scale]), layer.in_features).to(layer.weight))
    last = [module for module in first.modules() if isinstance(module, nn.Linear)][-1]
    last.bias += (first(shift) - first(torch.zeros_like(shift)))[0]
    layer.weight.zero_()


def _has_time_embedding(model: Any) -> bool:
    return hasattr(model, "time_embedding") and "time_cond_proj_dim" in model.config
