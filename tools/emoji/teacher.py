"""Trains the denoiser of the embedded teacher and puts the whole ``StableDiffusionPipeline`` together."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.emoji.images import load_images
from tools.emoji.loop import LoopConfig, train


@dataclass(frozen=True)
class TeacherConfig:
    """The shape and the training of the teacher's ``UNet2DConditionModel``.

    Attributes:
        images: The parquet file of images; only its ``train`` split is learned from.
        autoencoder: Folder of the trained ``AutoencoderKL``.
        clip: Folder of the trained ``emoji-clip``, whose text tower becomes the text encoder.
        widths: ``block_out_channels``; all levels but the last attend to the caption.
        layers_per_block: ResNets a level.
        heads: Attention heads, which Stable Diffusion 1.x calls ``attention_head_dim``.
        norm_groups: Groups of every GroupNorm.
        prompt_dropout: Share of captions replaced by the empty one, for classifier-free guidance (Ho & Salimans 2022).
        min_snr_gamma: Gamma of the loss weights of Hang et al. 2023.
        loop: See :class:`tools.emoji.loop.LoopConfig`.
    """

    images: str = "embedded:emoji/emoji.parquet"
    autoencoder: str = "build/emoji/autoencoder/vae"
    clip: str = "build/emoji/clip/text"
    widths: tuple[int, ...] = (64, 128, 192)
    layers_per_block: int = 1
    heads: int = 4
    norm_groups: int = 16
    prompt_dropout: float = 0.1
    min_snr_gamma: float = 5.0
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(4000, 64, 1e-3, ema_decay=0.999, save_every=400))


def train_teacher(config: TeacherConfig, out: Path) -> dict[str, object]:
    """Trains by noise prediction (Ho et al. 2020) in the latents; saves the pipeline to ``out / "pipeline"``."""
    torch.manual_seed(config.loop.seed)
    vae = AutoencoderKL.from_pretrained(config.autoencoder, torch_dtype=torch.float32)
    text_encoder, tokenizer = _text_encoder(config.clip)
    latents, states, empty = _encode(config.images, vae, text_encoder, tokenizer)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    unet = _unet(config, states.shape[-1])
    # On a CPU the fused attention's backward pass takes longer than the rest of the step together.
    unet.set_attn_processor(AttnProcessor())

    def loss(index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        clean, context = latents[index], states[index]
        dropped = torch.rand(len(index), generator=generator) < config.prompt_dropout
        context = torch.where(dropped[:, None, None], empty, context)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(0, 1000, (len(index),), generator=generator)
        snr = compute_snr(scheduler, t)
        weight = snr.clamp(max=config.min_snr_gamma) / snr
        predicted = unet(scheduler.add_noise(clean, noise, t), t, context, return_dict=False)[0].float()
        return ((predicted - noise).pow(2).mean((1, 2, 3)) * weight).mean()

    record = train(unet, loss, len(latents), config.loop, out)
    assemble(unet, vae, text_encoder, tokenizer).save_pretrained(out / "pipeline")
    return record


def assemble(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """A half-precision pipeline with Stable Diffusion's schedule."""
    scheduler = PNDMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text_encoder.half(), tokenizer=tokenizer, unet=unet.half(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _text_encoder(folder: str) -> tuple[CLIPTextModel, CLIPTokenizer]:
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    model = CLIPTextModel(CLIPTextConfig(**clip.config.text_config.to_dict()))
    prefix = "text_model." if hasattr(model, "text_model") else ""  # older versions of transformers nest it
    model.load_state_dict({prefix + name: value for name, value in clip.text_model.state_dict().items()})
    return model.eval(), CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def _encode(
    path: str, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled latents ``(n, 4, 16, 16)``, caption states ``(n, tokens, width)`` and those of the empty caption."""
    images, rows = load_images(path)
    chosen = [i for i, row in enumerate(rows) if row["split"] == "train"]
    means = [vae.encode(batch / 127.5 - 1).latent_dist.mean for batch in images[chosen].split(64)]
    captions = [rows[i]["text"] for i in chosen] + [""]
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = torch.cat([text_encoder(batch)[0] for batch in tokens.split(256)])
    return torch.cat(means) * vae.config.scaling_factor, states[:-1], states[-1]


def _unet(config: TeacherConfig, context: int) -> UNet2DConditionModel:
    crossed = len(config.widths) - 1
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=config.widths,
        layers_per_block=config.layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        cross_attention_dim=context,
        attention_head_dim=config.heads,
        norm_num_groups=config.norm_groups,
    )
