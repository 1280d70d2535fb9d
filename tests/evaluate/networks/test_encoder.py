"""Any image encoder: which of its outputs is taken, and what is refused."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from compress.errors import UserError
from compress.evaluate.networks.encoder import Encoder
from tests.evaluate.parts import tiny_clip
from tests.tiny import seeded

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def images():
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def saved(model, folder, processor=BitImageProcessorPil):
    model.save_pretrained(folder)
    processor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return Encoder(str(folder))


def prepared(encoder):
    shown = [image.permute(1, 2, 0).numpy() for image in images()]
    return encoder.processor(images=shown, return_tensors="pt")["pixel_values"]


def test_a_projection_is_used(tmp_path):
    with seeded(0):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZE, intermediate_size=32, projection_dim=6))
    encoder = saved(model, tmp_path, CLIPImageProcessorPil)
    with torch.no_grad():
        expected = model.eval()(prepared(encoder)).image_embeds
    torch.testing.assert_close(encoder(images()), expected)


def test_a_whole_clip_gives_its_image_embedding(tmp_path):
    encoder = Encoder(tiny_clip(tmp_path))
    assert encoder(images()).shape == (3, 8)
    assert encoder.sha256 != ""


def test_the_class_token_of_dinov2(tmp_path):
    with seeded(0):
        model = Dinov2Model(Dinov2Config(**SIZE)).eval()
    encoder = saved(model, tmp_path)
    with torch.no_grad():
        expected = model(prepared(encoder)).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(images()), expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    several = [images()[0], torch.zeros(3, 31, 19, dtype=torch.uint8)]
    torch.testing.assert_close(encoder(several)[0], expected[0])


def test_a_pooler_that_was_never_trained_is_not_used(tmp_path):
    with seeded(0):
        model = ViTForImageClassification(ViTConfig(**SIZE, intermediate_size=32)).eval()
    encoder = saved(model, tmp_path / "classifier")
    with torch.no_grad():
        expected = model.vit(prepared(encoder)).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(images()), expected)
    with seeded(0):
        pooled = ViTModel(ViTConfig(**SIZE, intermediate_size=32)).eval()
    encoder = saved(pooled, tmp_path / "pooled")
    with torch.no_grad():
        expected = pooled(prepared(encoder)).pooler_output
    torch.testing.assert_close(encoder(images()), expected)


def test_what_is_no_image_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.encoders\.dino=.*cannot load an image encoder"):
        Encoder(str(tmp_path / "nothing"), key="evaluate.encoders.dino")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**size, vocab_size=30)).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="evaluate.encoders="):
        Encoder(str(tmp_path / "text"))
    BitImageProcessorPil().save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="expected an image encoder, not a BertModel"):
        Encoder(str(tmp_path / "text"))


def test_missing_weights_are_no_random_ones(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(Dinov2Model(Dinov2Config(**SIZE)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="incomplete image encoder, layernorm.weight is missing"):
        Encoder(str(tmp_path))


def test_an_encoder_that_is_random_in_use_is_refused(tmp_path):
    with seeded(0):
        model = ViTMAEModel(ViTMAEConfig(**{**SIZE, "patch_size": 2}, intermediate_size=32))
    with pytest.raises(UserError, match="but ViTMAEModel gives random features"):
        saved(model, tmp_path)


def test_a_cut_file_of_weights_is_named(tmp_path):
    saved(Dinov2Model(Dinov2Config(**SIZE)), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot load an image encoder"):
        Encoder(str(tmp_path))
