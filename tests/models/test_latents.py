"""Latents between an autoencoder and a denoiser."""

import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from PIL import Image
from pipelines import PIPELINES

from compress.distill.decoded import decoder_of
from compress.distill.decoder import decoded
from compress.errors import UserError
from compress.models.latents import check_latents, encode_images, scaled, unscaled


@pytest.mark.parametrize("statistics", [False, True])
def test_latents_are_decoded_as_the_pipeline_does(statistics):
    pipeline = PIPELINES["sdxl"]()
    if statistics:  # as Playground 2.5 has them
        pipeline.vae.register_to_config(latents_mean=[-1.6, 1.9, -1.4, 2.5], latents_std=[8.5, 5.9, 6.5, 5.2])
    latents, pixels = (
        pipeline("a cat", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type=kind).images
        for kind in ("latent", "pt")
    )
    torch.testing.assert_close(decoded(pipeline.vae, latents), 2 * pixels - 1, atol=1e-5, rtol=0)
    *_, picture = decoder_of(pipeline)(latents)
    torch.testing.assert_close(picture.clamp(-1, 1), 2 * pixels - 1, atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled(pipeline.vae, unscaled(pipeline.vae, latents)), latents)


def test_a_narrow_autoencoder_encodes_and_decodes_in_float32():
    pipeline = PIPELINES["sdxl"]()
    picture = [Image.new("RGB", (16, 16), "red")]
    expected = encode_images(pipeline, picture, 16, 16)
    pipeline.vae.half()
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.fill_(6e4)  # its outputs overflow in float16 and are normalized after
    found = encode_images(pipeline, picture, 16, 16)
    assert found.isfinite().all() and pipeline.vae.dtype == torch.float16 and found.shape == expected.shape
    assert decoder_of(pipeline)(found)[-1].dtype == torch.float32 and pipeline.vae.dtype == torch.float16
    pipeline.vae.register_to_config(force_upcast=False)
    with pytest.raises(UserError, match="the autoencoder gives NaN or infinity in float16: use precision=bf16"):
        encode_images(pipeline, picture, 16, 16)


def test_packed_latents_are_decoded_at_the_size_of_the_training():
    pipeline = PIPELINES["flux"]()
    picture = [Image.new("RGB", (32, 16), "red")]
    latents = encode_images(pipeline, picture, 16, 32)
    assert decoder_of(pipeline, 16, 32)(latents)[-1].shape == (1, 3, 16, 32)


def test_an_autoencoder_of_another_name_is_refused():
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=4)
    denoiser = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    with pytest.raises(UserError, match="LDMPipeline: images cannot be encoded with its vqvae: expected a pipeline"):
        check_latents(LDMPipeline(vqvae, denoiser, DDIMScheduler()))
