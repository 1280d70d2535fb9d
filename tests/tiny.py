"""Tiny models of the real classes with random weights, built from configs: nothing is downloaded or trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "cat", "dog", "red", "heart", "emoji", "of", "in", "flat", "style", "tree", "sun")
TOKENS = 16  # tokens a caption is padded to


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch inside the block and leaves the generator outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows :data:`WORDS` as whole words and spells all others in bytes."""
    letters = sorted({letter for word in WORDS for letter in word} | set("abcdefghijklmnopqrstuvwxyz0123456789.,!-"))
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges: list[tuple[str, str]] = []
    for piece in [*letters, *(letter + "</w>" for letter in letters)]:
        vocabulary.setdefault(piece, len(vocabulary))
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # one chain of merges a word, from its first letters on
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def tiny_unet(
    widths: tuple[int, ...] = (32, 64),
    cross_attention_dim: int = 16,
    sample_size: int = 8,
    heads: int = 2,
    groups: int = 8,
    layers_per_block: int = 1,
    seed: int = 0,
) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion's architecture: cross-attention on all levels but the last, which is plain.

    Args:
        widths: Channels of each level, from the finest on.
        cross_attention_dim: Channels of the text tokens.
        sample_size: Side of the latents.
        heads: Attention heads of every attention (``attention_head_dim`` of Stable Diffusion 1.x).
        groups: Groups of every group norm.
        layers_per_block: ResNets in each down block; up blocks have one more.
        seed: Seed of the weights.
    """
    levels = len(widths)
    with seeded(seed):
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=4,
            out_channels=4,
            block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            layers_per_block=layers_per_block,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=heads,
            norm_num_groups=groups,
        )
    return unet.eval().requires_grad_(False)


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """An autoencoder from 16 px images to 8x8x4 latents."""
    with seeded(seed + 1):
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.5,
        )
    return vae.eval().requires_grad_(False)


def tiny_text_encoder(tokenizer: CLIPTokenizer, width: int = 16, seed: int = 0) -> CLIPTextModel:
    """A CLIP text encoder of two layers for the vocabulary of ``tokenizer``."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(seed + 2):
        return CLIPTextModel(config).eval().requires_grad_(False)


def tiny_pipeline(
    seed: int = 0,
    widths: tuple[int, ...] = (32, 64),
    cross_attention_dim: int = 16,
    unet: UNet2DConditionModel | None = None,
) -> StableDiffusionPipeline:
    """A stock Stable Diffusion pipeline with random weights that makes 16 px images, about 0.8 M parameters.

    Args:
        seed: Seed of all weights.
        widths: Channels of the UNet's levels.
        cross_attention_dim: Width of the text encoder and of the UNet's cross-attention.
        unet: A UNet to use in place of :func:`tiny_unet`.
    """
    tokenizer = tiny_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(tokenizer, cross_attention_dim, seed),
        tokenizer=tokenizer,
        unet=unet if unet is not None else tiny_unet(widths, cross_attention_dim, seed=seed),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
