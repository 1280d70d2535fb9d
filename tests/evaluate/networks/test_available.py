"""Networks that are missing are named before anything is loaded."""

import importlib.util

import pytest

from compress.errors import UserError
from compress.evaluate import EvaluateConfig, check
from compress.evaluate.config import check_available


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lpips": True}, "evaluate.lpips=true: needs the package torchvision"),
        ({"preference": ("imagereward",)}, "evaluate.preference=imagereward: needs the package image-reward"),
        ({"preference": ("pickscore", "hpsv2")}, "evaluate.preference=hpsv2: needs the package hpsv2"),
        ({"encoders": {"dino": "./nowhere"}}, "evaluate.encoders.dino=./nowhere: expected a folder"),
        ({"encoders": {"dino": "dinov2"}}, "evaluate.encoders.dino=dinov2: expected a folder"),
    ],
)
def test_what_is_missing_is_named(change, message, monkeypatch):
    found = importlib.util.find_spec
    missing = ("torchvision", "ImageReward", "hpsv2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(UserError) as caught:
        check(EvaluateConfig(**change))
    assert str(caught.value).startswith(message)


def test_what_is_there_or_on_the_hub_passes(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    encoders = {"local": str(tmp_path), "hub": "facebook/dinov2-large", "inside": "embedded:emoji/clip"}
    check_available(EvaluateConfig(encoders=encoders, lpips=True, preference=("hpsv2", "pickscore")))
