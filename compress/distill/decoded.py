"""The teacher's decoder as a loss sees it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compress.distill.alignment import tapped
from compress.models import denoiser
from compress.models.families import family_of
from compress.models.inputs import own_size
from compress.models.latents import is_narrow, unscaled

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def decoder_of(
    teacher: "DiffusionPipeline", height: int | None = None, width: int | None = None
) -> Callable[[Tensor], list[Tensor]]:
    """A function from clean latents, as the denoiser takes them, to what the frozen decoder makes of them.

    Args:
        teacher: Its VAE is on the device of the training.
        height: Of the pictures in pixels; None: the model's own. Packed latents do not tell it.
        width: As ``height``.

    Returns:
        From ``(b, ...)`` to the outputs of the decoder's up blocks and the picture in [-1, 1], each ``(b, c, h, w)``;
        for a pipeline without a VAE the latents alone, which are the picture.
    """
    pipeline: Any = teacher
    vae = getattr(pipeline, "vae", None)
    size = own_size(teacher) if height is None or width is None else (height, width)
    if vae is None:
        return lambda latents: [latents]
    if is_narrow(vae):
        vae = copy.deepcopy(vae).float()
    packed = getattr(family_of(denoiser(teacher)), "packed", False)
    blocks = [f"decoder.up_blocks.{i}" for i in range(len(getattr(vae.decoder, "up_blocks", ())))]

    def decode(latents: Tensor) -> list[Tensor]:
        if packed:
            latents = pipeline._unpack_latents(latents, *size, pipeline.vae_scale_factor)
        with tapped(vae, blocks) as features, _frozen(vae):
            picture = vae.decode(unscaled(vae, latents).to(vae.dtype), return_dict=False)[0]
        return [*features.values(), picture]

    return decode


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model's parameters without gradients for the passes within."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)
