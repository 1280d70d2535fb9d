"""The embedded default is what it is said to be."""

from pathlib import Path

import pytest
import torch

from compress.assets import resolve
from tools.emoji.images import STYLES, load_images

ASSETS = Path(resolve("embedded:emoji"))


@pytest.fixture(scope="module")
def rows():
    return load_images("embedded:emoji/emoji.parquet")[1]


def test_all_of_it_fits_into_40_megabytes_without_a_pickle():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40e6
    assert {f.suffix for f in files} <= {".safetensors", ".parquet", ".json", ".txt", ".md", ".png"}


def test_held_out_pairs_are_seen_in_other_styles_and_held_out_concepts_in_none(rows):
    seen = {(row["style"], row["concept"]) for row in rows if row["split"] == "train"}
    pairs = [row for row in rows if row["split"] == "held_out_pair"]
    assert len(pairs) == 200
    for row in pairs:
        assert (row["style"], row["concept"]) not in seen
        assert any((style, row["concept"]) in seen for style in STYLES)
    unseen = {row["concept"] for row in rows if row["split"] == "held_out_concept"}
    assert len(unseen) == 40
    assert not unseen & {concept for _, concept in seen}


def test_unet_has_the_make_up_of_stable_diffusion():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(ASSETS / "pipeline" / "unet", torch_dtype=torch.float32)
    params = sum(p.numel() for p in unet.parameters())
    convolutions = sum(p.numel() for m in unet.modules() if isinstance(m, torch.nn.Conv2d) for p in m.parameters())
    assert 8e6 < params < 15e6
    assert convolutions > params / 2
    assert {"CrossAttnDownBlock2D", "DownBlock2D"} == set(unet.config.down_block_types)
    assert all(width % 64 == 0 for width in unet.config.block_out_channels)


def test_text_encoder_is_the_text_tower_of_emoji_clip():
    from transformers import CLIPModel, CLIPTextModel

    clip = CLIPModel.from_pretrained(ASSETS / "clip", dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(ASSETS / "pipeline" / "text_encoder", dtype=torch.float32)
    ids = torch.tensor([[0, 300, 301, 1]])
    assert torch.equal(encoder(ids)[0], clip.text_model(ids).last_hidden_state)


def test_teacher_draws_something_like_its_caption():
    """A few images only: the bars themselves are measured by ``python -m tools.emoji bars``."""
    from diffusers import StableDiffusionPipeline

    from compress.evaluate.config import EvaluateConfig
    from compress.evaluate.networks.clip import load_clip
    from compress.evaluate.sample import sample

    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "pipeline", torch_dtype=torch.float32)
    captions = ["red heart, noto emoji", "hot dog, fluent emoji", "grinning face, twemoji emoji", "tent, noto emoji"]
    images = sample(pipeline, captions, range(4), EvaluateConfig(steps=20, guidance=4.0, batch_size=4))
    clip = load_clip("embedded:emoji/clip")
    seen, texts = clip(images[:]), clip.text(captions)
    own = torch.nn.functional.cosine_similarity(seen, texts)
    other = torch.nn.functional.cosine_similarity(seen, texts.roll(-1, dims=0))
    assert own.mean() > other.mean() + 0.1
