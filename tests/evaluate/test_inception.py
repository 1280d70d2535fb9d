"""The Inception network, its input, and the features of real pictures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compress.assets import resolve
from compress.data import DataConfig, load_data
from compress.errors import UserError
from compress.evaluate import EvaluateConfig
from compress.evaluate.inception import (
    Inception,
    features,
    real_pictures,
    reference_features,
    resize_like_tensorflow1,
    write_reference,
)
from tests.evaluate.parts import TinyInception, tiny_data


@pytest.mark.parametrize("size", [(5, 7), (64, 64), (299, 299), (512, 400)])
def test_resize_is_tensorflow_1s(size):
    height, width = size
    picture = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(0))
    large = resize_like_tensorflow1(picture)
    assert large.shape == (1, 2, 299, 299)
    for y in (0, 1, 150, 297, 298):
        for x in (0, 77, 298):
            # legacy_bilinear of tf.image.resize_bilinear(align_corners=False), written out for one pixel
            top, left = y * height / 299, x * width / 299
            y0, x0 = int(top), int(left)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            above = picture[..., y0, x0] + (picture[..., y0, x1] - picture[..., y0, x0]) * (left - x0)
            below = picture[..., y1, x0] + (picture[..., y1, x1] - picture[..., y1, x0]) * (left - x0)
            torch.testing.assert_close(large[..., y, x], above + (below - above) * (top - y0), atol=1e-5, rtol=1e-5)
    if size == (299, 299):
        torch.testing.assert_close(large, picture)


def test_the_real_network():
    network = Inception()
    pictures = real_pictures(tiny_data(2, 64), [0, 1], (64, 64))
    found = network(pictures)
    assert found.shape == (2, 2048)
    assert found.dtype == torch.float32
    assert (found >= 0).all()  # averages after a ReLU
    assert 0.05 < found.mean() < 2
    one = network(pictures[1:])
    torch.testing.assert_close(found[1:], one, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found[0], found[1], atol=0.1)


def test_real_pictures_are_cropped_to_the_generated_ones_size():
    pictures = real_pictures(tiny_data(), [0, 1], (8, 8))
    assert pictures.shape == (2, 3, 8, 8)
    assert pictures.dtype == torch.uint8
    same = real_pictures(tiny_data(), [1], (16, 16))
    assert same[0, :, 2, 3].tolist() == list(tiny_data().train[1]["image"].getpixel((3, 2)))


def test_reference_is_written_read_and_checked(tmp_path):
    data, network, config = tiny_data(), TinyInception(), EvaluateConfig(reference_images=6)
    file = tmp_path / "reference.safetensors"
    write_reference(data, file, 8, (16, 16), seed=1, network=network)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.safetensors"]
    with safe_open(file, "pt") as stored:
        indices, saved = stored.get_tensor("indices"), stored.get_tensor("features")
    assert len(set(indices.tolist())) == 8
    assert saved.dtype == torch.float16
    expected = features(real_pictures(data, indices.tolist(), (16, 16)), network, 3)
    torch.testing.assert_close(saved.float(), expected, atol=1e-3, rtol=1e-3)

    data = replace(data, reference=str(file))
    found, info = reference_features(data, config, (16, 16), network=network)
    assert torch.equal(found, saved[:6].float())
    assert info == {"reference": "reference.safetensors", "n_reference": 6}
    # Pictures of another size, or more of them, are computed and kept.
    other, info = reference_features(data, config, (8, 8), tmp_path / "cache", network)
    assert info == {"reference": "training pictures", "n_reference": 6}
    again, _ = reference_features(data, config, (8, 8), tmp_path / "cache", network=None)  # no network is needed now
    assert torch.equal(other, again)
    assert not torch.equal(other, found)
    more, info = reference_features(data, replace(config, reference_images=100), (16, 16), network=network)
    assert len(more) == info["n_reference"] == 12


def test_reference_of_other_data_or_damaged_is_refused(tmp_path):
    data, config = tiny_data(), EvaluateConfig(reference_images=6)
    file = tmp_path / "reference.safetensors"
    write_reference(data, file, 8, (16, 16), network=TinyInception())
    data = replace(data, reference=str(file))
    with pytest.raises(UserError, match=r"made from other pictures.*data\.reference=null"):
        reference_features(replace(data, text=[*reversed(data.text)]), config, (16, 16))
    with pytest.raises(UserError, match="made from other pictures"):
        reference_features(replace(data, text=data.text[:3]), config, (16, 16))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="no readable file of reference features"):
        reference_features(data, config, (16, 16))
    with pytest.raises(UserError, match="no readable file of reference features"):
        reference_features(replace(data, reference=str(tmp_path / "none")), config, (16, 16))


EMBEDDED = Path(resolve("embedded:emoji/inception.safetensors"))


def test_embedded_reference_is_what_the_network_gives():
    data = load_data(DataConfig("embedded:emoji/emoji.parquet", split_column="split", reference=str(EMBEDDED)))
    stored, info = reference_features(data, EvaluateConfig(), (64, 64))
    assert info == {"reference": "inception.safetensors", "n_reference": 768}
    some = [0, 1, 500, 767]
    with safe_open(EMBEDDED, "pt") as file:
        indices = file.get_tensor("indices")[some].tolist()
    expected = Inception()(real_pictures(data, indices, (64, 64)))
    torch.testing.assert_close(stored[some], expected, atol=2e-3, rtol=2e-3)
