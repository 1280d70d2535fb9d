"""Trains the autoencoder of the embedded teacher: 64 px images to 16 x 16 x 4 latents and back."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tools.emoji.images import load_images
from tools.emoji.loop import LoopConfig, train


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape and the training of an ``AutoencoderKL``.

    Attributes:
        images: The parquet file of images.
        widths: Channels of each resolution; the image is halved between two.
        latent_channels: Channels of the latents.
        kl_weight: Weight of the Kullback-Leibler term beside the mean squared error.
        shift: Images are shifted by up to this many pixels, and mirrored half of the time.
        loop: See :class:`tools.emoji.loop.LoopConfig`.
    """

    images: str = "embedded:emoji/emoji.parquet"
    widths: tuple[int, ...] = (32, 64, 96)
    latent_channels: int = 4
    kl_weight: float = 1e-6
    shift: int = 3
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(1200, 32, 8e-4, ema_decay=0.995, save_every=300, schedule_steps=1700)
    )


def train_autoencoder(config: AutoencoderConfig, out: Path) -> dict[str, object]:
    """Trains and saves to ``out / "vae"``; returns the record of the loop with the held-out PSNR in dB.

    The scaling factor is one over the standard deviation of the latents, as in Rombach et al. 2022 (section G).
    """
    torch.manual_seed(config.loop.seed)
    images, rows = load_images(config.images)
    held = torch.tensor([r["split"] != "train" for r in rows])
    training, testing = images[~held], images[held]
    model = _model(config).to(memory_format=torch.channels_last)

    def loss(image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        posterior = model.encode(image).latent_dist
        latents = posterior.mean + posterior.std * noise
        error = (model.decode(latents).sample - image).pow(2).mean()
        return error + config.kl_weight * posterior.kl().mean()

    def step(index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        batch = _augment(training[index], config.shift, generator)
        side = batch.shape[-1] // 2 ** (len(config.widths) - 1)
        noise = torch.randn(len(index), config.latent_channels, side, side, generator=generator)
        return loss(batch, noise)

    def evaluate() -> dict[str, float]:
        return {"held_out_psnr": held_out_psnr(model, testing)}

    record = train(model, step, len(training), config.loop, out, evaluate)
    model = model.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        latents = torch.cat([model.encode(b).latent_dist.mean for b in (training / 127.5 - 1).split(64)])
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    model.half().save_pretrained(out / "vae")
    return record


def _model(config: AutoencoderConfig) -> AutoencoderKL:
    count = len(config.widths)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        block_out_channels=config.widths,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=16,
        sample_size=64,
    )
    # Start with little noise in the latents: at a log-variance of 0 it would be larger than what they carry untrained.
    torch.nn.init.constant_(model.quant_conv.bias[config.latent_channels :], -6.0)
    return model


def _augment(images: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """From uint8 ``(n, 3, h, w)`` to floats in [-1, 1], mirrored and shifted at random with white borders."""
    mirror = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirror[:, None, None, None], images.flip(-1), images)
    dx, dy = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
    padded = torch.nn.functional.pad(images, (shift,) * 4, value=255)
    size = images.shape[-1]
    moved = padded[:, :, shift + dy : shift + dy + size, shift + dx : shift + dx + size]
    return (moved / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def held_out_psnr(model: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, after rounding to 8 bits."""
    values = []
    for batch in images.split(64):
        decoded = model.decode(model.encode(batch / 127.5 - 1).latent_dist.mean).sample
        rounded = ((decoded + 1) * 127.5).round().clamp(0, 255)
        error = (rounded - batch.float()).pow(2).mean((1, 2, 3))
        values.append(10 * torch.log10(255**2 / error))
    return torch.cat(values).mean().item()
