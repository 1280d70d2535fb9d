"""Tiny stock pipelines of every architecture, with random weights and the config keys of published models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from tiny import TOKENS, WORDS, seeded, tiny_text_encoder, tiny_tokenizer, tiny_vae
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.prune.architectures import UNet, random_unet
from tests.prune.widen import randomize

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_STEPS: dict[str, Any] = {"set_alpha_to_one": False, "steps_offset": 1}
TEXT = 16  # channels of T5 and Gemma tokens


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer that knows :data:`tiny.WORDS` as whole words and spells all others in letters."""
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,!-"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = special + [("▁" + word, -2.0) for word in WORDS] + [(letter, -5.0) for letter in letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer that spells words in letters, and what is no letter in bytes."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


def clip_with_projection(tokenizer: CLIPTokenizer, width: int, pooled: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder of two layers that gives a pooled embedding of ``pooled`` channels."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=pooled,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with seeded(3):
        return CLIPTextModelWithProjection(config).eval().requires_grad_(False)


def t5_encoder(tokenizer: T5TokenizerFast, width: int = TEXT) -> T5EncoderModel:
    """A T5 encoder of two layers with the gated feed-forward of version 1.1."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with seeded(4):
        return T5EncoderModel(config).eval().requires_grad_(False)


def gemma(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """A Gemma 2 decoder of two layers."""
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=2 * TEXT, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=4096,
        initializer_range=0.2,
    )  # fmt: skip
    with seeded(5):
        return Gemma2Model(config).eval().requires_grad_(False)


def kl_autoencoder(levels: int = 2, **config: Any) -> AutoencoderKL:
    """An autoencoder that halves the side ``levels - 1`` times."""
    with seeded(1):
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 16)[-levels:],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=4,
            **config,
        )
    return vae.eval().requires_grad_(False)


def dc_autoencoder(channels: int) -> AutoencoderDC:
    """A deep-compression autoencoder, convolutions outside and linear attention inside, that divides the side by 32."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    widths, layers, scales = (4, 8, 8, 8, 16, 16), (0, 1, 1, 1, 1, 1), ((), (), (), (5,), (5,), (5,))
    with seeded(1):
        vae = AutoencoderDC(
            latent_channels=channels, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=layers,
            decoder_layers_per_block=layers, encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
            upsample_block_type="interpolate", downsample_block_type="Conv", decoder_norm_types="rms_norm",
            decoder_act_fns="silu", scaling_factor=0.41407,
        )  # fmt: skip
    return vae.eval().requires_grad_(False)


def unet(name: str, **changes: Any) -> UNet:
    """An architecture of ``tests/prune/architectures.py`` at twice its width, in evaluation mode."""
    with seeded(0):
        return random_unet(name, width=2, **changes).requires_grad_(False)


def transformer(make: Callable[..., nn.Module], **config: Any) -> Any:
    """A transformer in evaluation mode whose norms are not the identity."""
    with seeded(0):
        model = make(**config).eval().requires_grad_(False)
        randomize(model)
    return model


def text_to_image(cls: type, unet: UNet, scheduler: Any, **changes: Any) -> Any:
    """A pipeline with one CLIP text encoder that makes 16 px images."""
    tokenizer = tiny_tokenizer()
    return cls(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(tokenizer, unet.config.cross_attention_dim),
        tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **changes,
    )  # fmt: skip


def sd1() -> StableDiffusionPipeline:
    scheduler = PNDMScheduler(**SD_BETAS, **SD_STEPS, skip_prk_steps=True)
    return text_to_image(StableDiffusionPipeline, unet("sd 1.x"), scheduler)


def sd2() -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(**SD_BETAS, **SD_STEPS, clip_sample=False, prediction_type="v_prediction")
    return text_to_image(StableDiffusionPipeline, unet("sd 2.x"), scheduler)


def sdxl() -> StableDiffusionXLPipeline:
    tokenizer, width, pooled = tiny_tokenizer(), 8, 10  # the pooled embedding that the UNet takes has 10 channels
    denoiser = unet("sdxl", block_out_channels=(16, 32, 32), attention_head_dim=[2, 4, 4])
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer, width=denoiser.config.cross_attention_dim - width),
        text_encoder_2=clip_with_projection(tokenizer, width, pooled),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=denoiser,
        scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def inpainting() -> StableDiffusionInpaintPipeline:
    scheduler = PNDMScheduler(**SD_BETAS, **SD_STEPS, skip_prk_steps=True)
    return text_to_image(StableDiffusionInpaintPipeline, unet("inpainting"), scheduler)


def lcm() -> LatentConsistencyModelPipeline:
    scheduler = LCMScheduler(**SD_BETAS, steps_offset=1)
    return text_to_image(LatentConsistencyModelPipeline, unet("sd 1.x", time_cond_proj_dim=32), scheduler)


def ddpm() -> DDPMPipeline:
    denoiser = unet("ddpm", sample_size=16, flip_sin_to_cos=False, freq_shift=1)
    return DDPMPipeline(denoiser, DDPMScheduler(variance_type="fixed_large"))


def pixart(cls: type = PixArtAlphaPipeline, **vae: Any) -> Any:
    """The stock pipeline bins sizes to 256 px and more: latents of 32 x 32 and an autoencoder that divides by 8."""
    tokenizer = t5_tokenizer()
    denoiser = transformer(
        PixArtTransformer2DModel, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=4, cross_attention_dim=16, attention_bias=True, sample_size=32, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=TEXT,
    )  # fmt: skip
    return cls(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        vae=kl_autoencoder(levels=4, latent_channels=4, sample_size=256, **vae),
        transformer=denoiser,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    return pixart(PixArtSigmaPipeline, scaling_factor=0.13025)


def sana() -> SanaPipeline:
    """The stock pipeline bins sizes to 512 px and more: latents of 16 x 16."""
    tokenizer = gemma_tokenizer()
    denoiser = transformer(
        SanaTransformer2DModel, in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8,
        num_layers=3, num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=TEXT, mlp_ratio=2.5, attention_bias=False, sample_size=16, patch_size=1,
        norm_elementwise_affine=False, norm_eps=1e-6, interpolation_scale=None,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=3.0,
    )  # fmt: skip
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=gemma(tokenizer), vae=dc_autoencoder(8), transformer=denoiser,
        scheduler=scheduler,
    )  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    """Of version 3.5 medium: normed queries and keys, a second attention in the first blocks; 32 px images."""
    tokenizer, third = tiny_tokenizer(), t5_tokenizer()
    denoiser = transformer(
        SD3Transformer2DModel, sample_size=16, patch_size=2, in_channels=16, num_layers=4, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=2 * TEXT, caption_projection_dim=32, pooled_projection_dim=20,
        out_channels=16, pos_embed_max_size=24, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(
            latent_channels=16, sample_size=32, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip_with_projection(tokenizer, 8, 8),
        tokenizer=tokenizer,
        text_encoder_2=clip_with_projection(tokenizer, 12, 12),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5_encoder(third, 2 * TEXT),
        tokenizer_3=third,
    )  # fmt: skip


def flux() -> FluxPipeline:
    tokenizer, second = tiny_tokenizer(), t5_tokenizer()
    denoiser = transformer(
        FluxTransformer2DModel, patch_size=1, in_channels=64, num_layers=3, num_single_layers=4, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT, pooled_projection_dim=12, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip
    vae = kl_autoencoder(
        latent_channels=16, sample_size=32, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=tiny_text_encoder(tokenizer, width=12), tokenizer=tokenizer,
        text_encoder_2=t5_encoder(second), tokenizer_2=second, transformer=denoiser,
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Any]] = {
    "sd 1.x": sd1,
    "sd 2.x v": sd2,
    "sdxl": sdxl,
    "inpainting": inpainting,
    "lcm": lcm,
    "ddpm": ddpm,
    "pixart": pixart,
    "pixart sigma": pixart_sigma,
    "sana": sana,
    "sd3": sd3,
    "flux": flux,
}


def quiet(make: Callable[[], Any]) -> Callable[[], DiffusionPipeline]:
    def made() -> DiffusionPipeline:
        pipeline = make()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return made


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {name: quiet(make) for name, make in MAKERS.items()}


def arguments(name: str, prompt: str = "a cat") -> dict[str, Any]:
    """The arguments of a short call of a pipeline of :data:`PIPELINES`, but for the generator.

    None needs a size, but the stock defaults are large for some: Flux makes 128 x 128 latents, 4096 tokens, of any
    model, SANA resizes to 1024 px, and both PixArt and SANA map a size to one of a fixed list.
    """
    given: dict[str, Any] = {"num_inference_steps": 2}
    if name != "ddpm":
        given["prompt"] = prompt
    if name == "inpainting":
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        mask = np.zeros((16, 16), np.uint8)
        mask[4:12, 4:12] = 255
        given |= {"image": Image.fromarray(pixels), "mask_image": Image.fromarray(mask)}
    if name == "flux":
        given |= {"height": 32, "width": 32}
    if name in ("pixart", "pixart sigma", "sana"):
        given |= {"height": 64, "width": 64, "use_resolution_binning": False}
    return given


@torch.no_grad()
def sample(pipeline: DiffusionPipeline, name: str, prompt: str = "a cat", seed: int = 0) -> np.ndarray:
    """Calls a pipeline and returns its one image, (height, width, 3) in 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    return pipeline(**arguments(name, prompt), generator=generator, output_type="np").images[0]
