"""Encodes images as a model's latents."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UserError
from compress.models import denoiser
from compress.models.families import family_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image


OTHER_AUTOENCODERS = ("vqvae", "vqgan", "movq")


def check_latents(pipeline: Any) -> None:
    """Checks that the denoiser takes the autoencoder's latents.

    Raises:
        UserError: It does not, as an inpainting model, which also takes a mask and an image; or the autoencoder is not
            the pipeline's ``vae``.
    """
    check_autoencoder(type(pipeline).__name__, vars(pipeline))
    if getattr(pipeline, "vae", None) is not None:
        check_channels(type(pipeline).__name__, pipeline.vae.config, denoiser(pipeline))


def check_autoencoder(kind: str, names: Collection[str]) -> None:
    """What :func:`check_latents` checks, from the names of the components alone.

    Args:
        kind: Class of the pipeline, for the message.
        names: Of its components.

    Raises:
        UserError: See :func:`check_latents`.
    """
    if found := [name for name in OTHER_AUTOENCODERS if name in names]:
        raise UserError(f"{kind}: images cannot be encoded with its {found[0]}: expected a pipeline with a vae")


def check_channels(kind: str, vae: Mapping[str, Any], model: Any) -> None:
    """What :func:`check_latents` checks, from configs alone.

    Args:
        kind: Class of the pipeline, for the message.
        vae: Config of its autoencoder.
        model: Its denoiser, which may be on the meta device.

    Raises:
        UserError: See :func:`check_latents`.
    """
    packed = getattr(family_of(model), "packed", False)
    given, taken = vae["latent_channels"] * (4 if packed else 1), model.config["in_channels"]
    if given != taken:
        raise UserError(f"{kind}: the denoiser takes {taken} channels and its autoencoder gives {given}")


@torch.no_grad()
def encode_images(pipeline: "DiffusionPipeline", images: "Sequence[Image]", height: int, width: int) -> torch.Tensor:
    """Latents as the denoiser expects them, on the CPU: ``(b, c, h, w)``, or ``(b, n, c)`` where they are packed.

    The mode of the autoencoder's posterior, shifted and scaled by its config; pixels in [-1, 1] without an autoencoder.

    Args:
        pipeline: Its autoencoder is on any device.
        images: RGB, of any size; scaled and center-cropped.
        height: In pixels.
        width: In pixels.

    Raises:
        UserError: The autoencoder gives numbers that are not finite.
    """
    from diffusers.image_processor import VaeImageProcessor

    any_pipeline: Any = pipeline
    processor = getattr(pipeline, "image_processor", None) or VaeImageProcessor(vae_scale_factor=1)
    pixels = processor.preprocess(list(images), height=height, width=width, resize_mode="crop")
    vae = getattr(any_pipeline, "vae", None)
    if vae is None:
        return pixels
    with in_range(vae):
        encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        found = encoded.latent_dist.mode()
    else:
        found = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    latents = scaled(vae, found).cpu()
    if not latents.isfinite().all():
        raise UserError(f"the autoencoder gives NaN or infinity in {str(vae.dtype)[6:]}: use precision=bf16 or fp32")
    if getattr(family_of(denoiser(pipeline)), "packed", False):
        return any_pipeline._pack_latents(latents, *latents.shape)
    return latents


@contextmanager
def in_range(vae: Any) -> Iterator[None]:
    """Has a float16 VAE compute in float32 meanwhile if its config says that float16 overflows, as SDXL's does."""
    narrow = is_narrow(vae)
    if narrow:
        vae.float()
    try:
        yield
    finally:
        if narrow:
            vae.half()


def is_narrow(vae: Any) -> bool:
    """Whether a VAE is in float16 and its config says that this overflows."""
    return vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))


def scaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What a VAE encodes, ``(b, c, h, w)``, in the scale of the denoiser."""
    shift, scale = _scale(vae, latents)
    return (latents - shift) * scale


def unscaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents in the scale of the denoiser, ``(b, c, h, w)``, as a VAE decodes them."""
    shift, scale = _scale(vae, latents)
    return latents / scale + shift


def _scale(vae: Any, latents: torch.Tensor) -> tuple[Any, Any]:
    """Shift and factor from a VAE's latents to the denoiser's; for some models of SDXL's kind one for each channel."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, config.scaling_factor
    mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
    return mean, config.scaling_factor / std


def unpacked(pipeline: "DiffusionPipeline", latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Latents as the autoencoder sees them but for its scale: ``(b, c, h, w)``.

    Args:
        pipeline: Of the denoiser that takes the latents.
        latents: As the denoiser takes them, perhaps packed, ``(b, n, c)``.
        height: Of the images, in pixels.
        width: As ``height``.
    """
    any_pipeline: Any = pipeline
    if getattr(family_of(denoiser(pipeline)), "packed", False):
        return any_pipeline._unpack_latents(latents, height, width, any_pipeline.vae_scale_factor)
    return latents
