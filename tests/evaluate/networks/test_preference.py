"""Preference models: PickScore's formula on a tiny CLIP, and the packages of the others."""

import sys
from types import ModuleType

import pytest
import torch

from compress.errors import UserError
from compress.evaluate.networks.preference import PickScore, load_preference
from tests.evaluate.parts import tiny_clip

CAPTIONS = ["a cat", "a red dog"]


def images():
    return torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pickscore_is_the_scaled_cosine(tmp_path):
    model = PickScore(tiny_clip(tmp_path))
    found = model(images(), CAPTIONS)
    clip = model.clip
    text = clip.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    seen = clip.processor(images=[one.permute(1, 2, 0).numpy() for one in images()], return_tensors="pt")
    with torch.no_grad():
        expected = clip.model(**text, **seen).logits_per_image.diagonal()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "package"), [("imagereward", "image-reward"), ("hpsv2", "hpsv2")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    for module in ("ImageReward", "hpsv2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"evaluate.preference={name}: needs the package {package}"):
        load_preference(name)


def test_the_packages_are_asked_image_by_image(monkeypatch):
    class Reward(torch.nn.Module):
        def score(self, text, image):
            return len(text) + image.getpixel((3, 2))[1] / 1000

    def load(name, device):
        assert (name, device) == ("ImageReward-v1.0", "cpu")
        return Reward()

    def score(image, text, hps_version):
        assert hps_version == "v2.1"
        return [Reward().score(text, image)]

    for name, function in (("ImageReward", load), ("hpsv2", score)):
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    green = images()[:, 1, 2, 3] / 1000
    expected = torch.tensor([len(caption) for caption in CAPTIONS]) + green
    for name in ("imagereward", "hpsv2"):
        torch.testing.assert_close(load_preference(name)(images(), CAPTIONS), expected)
