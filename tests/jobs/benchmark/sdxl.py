"""A tiny pipeline with the architecture of Stable Diffusion XL: two text encoders, one with a pooled embedding."""

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from tiny import TOKENS, seeded, tiny_text_encoder, tiny_tokenizer, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.prune.architectures import random_unet

POOLED = 10  # channels of the pooled embedding that the UNet of tests/prune/architectures.py takes


def tiny_sdxl_pipeline() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL with random weights that makes 16 px images."""
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=POOLED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(3):
        second = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer, width=4),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=random_unet("sdxl").eval().requires_grad_(False),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
