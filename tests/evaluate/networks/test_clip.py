"""Embeddings of a CLIP model against its own forward pass."""

import json

import pytest
import torch

from compress.errors import UserError
from compress.evaluate.networks.clip import load_clip
from tests.evaluate.parts import tiny_clip


def test_embeddings_are_those_of_the_models_own_pass(tmp_path):
    clip = load_clip(tiny_clip(tmp_path), name="tiny")
    images = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = ["a cat", "a red dog", "sun", "heart " * 30, "a cat"]
    seen, texts = clip(images), clip.text(captions)
    assert seen.shape == texts.shape == (5, 8)
    assert seen.dtype == texts.dtype == torch.float32
    text = clip.tokenizer(captions[1], return_tensors="pt")
    inputs = clip.processor(images=images[1].permute(1, 2, 0).numpy(), return_tensors="pt")
    with torch.no_grad():
        expected = clip.model(**text, **inputs).logits_per_image / clip.model.logit_scale.exp()
    cosine = torch.nn.functional.cosine_similarity(seen[1:2], texts[1:2])
    assert float(cosine) == pytest.approx(float(expected), abs=1e-5)
    assert torch.equal(texts[0], texts[4])
    assert not torch.allclose(texts[0], texts[1])


def test_images_of_several_sizes_at_once(tmp_path):
    clip = load_clip(tiny_clip(tmp_path))
    several = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((16, 16), (40, 17), (9, 33))]
    together = clip(several)
    for one, found in zip(several, together, strict=True):
        torch.testing.assert_close(clip(one[None])[0], found)


def test_hash_is_that_of_the_weights(tmp_path):
    clip = load_clip(tiny_clip(tmp_path))
    assert clip.sha256 == load_clip(str(tmp_path)).sha256
    changed = load_clip(str(tmp_path))
    changed.model.logit_scale.data += 1
    assert changed.sha256 != clip.sha256


def test_a_folder_without_a_whole_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.clip=.*cannot load a CLIP model"):
        load_clip(str(tmp_path))
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    tiny_clip(tmp_path)
    weights = load_file(file)
    weights.pop("visual_projection.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="incomplete CLIP model, visual_projection.weight is missing"):
        load_clip(str(tmp_path))


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    tiny_clip(tmp_path)
    for file in tmp_path.iterdir():
        if file.name not in ("config.json", "model.safetensors", "preprocessor_config.json"):
            file.unlink()
    with pytest.raises(UserError, match=r"its tokenizer has .* tokens, the model .* tokenizer.json or vocab.json"):
        load_clip(str(tmp_path))


def test_a_cut_file_of_weights_is_named(tmp_path):
    tiny_clip(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"evaluate\.clip=.*cannot load a CLIP model"):
        load_clip(str(tmp_path))


def test_the_preprocessing_is_told_apart(tmp_path):
    first = load_clip(tiny_clip(tmp_path)).preprocessing
    assert first == load_clip(str(tmp_path)).preprocessing
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    assert load_clip(str(tmp_path)).preprocessing != first
