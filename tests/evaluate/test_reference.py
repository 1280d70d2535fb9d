"""Features of real images: made, kept, checked."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors import safe_open

from compress.assets import resolve
from compress.data import DataConfig, load_data
from compress.data.calibration import CalibrationConfig, calibrate
from compress.data.examples import encode_examples
from compress.data.white import on_white
from compress.errors import UserError
from compress.evaluate import EvaluateConfig
from compress.evaluate.images import ImageFiles
from compress.evaluate.networks import Networks
from compress.evaluate.networks.inception import Inception
from compress.evaluate.reference import (
    DataImages,
    data_reference,
    features,
    features_hash,
    folder_reference,
    write_reference,
)
from tests.evaluate.parts import TinyInception, tiny_clip, tiny_data
from tests.tiny import tiny_pipeline

SIZE = (16, 16)


class Failing:
    """Stands for a network that must not be needed."""

    name, sha256, preprocessing = TinyInception.name, TinyInception.sha256, "tensorflow1"

    def __call__(self, images):
        raise AssertionError("images are looked at again")


@pytest.fixture
def config(tmp_path):
    return EvaluateConfig(reference_images=6, clip=tiny_clip(tmp_path / "clip"), clip_name="tiny")


def with_inception(config, network=None):
    networks = Networks(config)
    networks.inception = network or TinyInception()
    return networks


def test_images_of_the_data_are_cropped_to_the_generated_ones_size():
    images = DataImages(tiny_data(), [0, 1], (8, 8))[:]
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.uint8
    same = DataImages(tiny_data(), [1], SIZE)[:]
    assert same[0, :, 2, 3].tolist() == list(tiny_data().train[1]["image"].getpixel((3, 2)))


def test_transparent_images_show_white_in_every_place(tmp_path):
    half = np.full((16, 16, 4), (200, 0, 0, 255), np.uint8)
    half[:, 8:, 3] = 0  # its right half is transparent, and red below
    image = Image.fromarray(half)
    image.save(tmp_path / "half.png")
    data = tiny_data(1)
    data = replace(data, train=Dataset.from_dict({"image": [image], "text": ["a cat"]}, data.train.features))
    expected = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    expected[:, :, :8] = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None]
    assert torch.equal(DataImages(data, [0], SIZE)[:][0], expected)
    assert torch.equal(ImageFiles([tmp_path / "half.png"])[0:1][0], expected)
    rows = Dataset.from_dict({"image": [on_white(image)], "text": ["a cat"]}, data.train.features)
    both, pipeline, one = (data.train, rows), tiny_pipeline(), CalibrationConfig(examples=1)
    assert torch.equal(*(encode_examples(pipeline, found).latents for found in both))
    assert torch.equal(*(calibrate(pipeline, found, one, seed=0).latents for found in both))


def test_the_file_of_the_data_is_written_and_read(tmp_path, config):
    data, network = tiny_data(), TinyInception()
    file = tmp_path / "reference.safetensors"
    write_reference(data, file, 8, SIZE, seed=1, network=network)
    with safe_open(file, "pt") as stored:
        indices, saved = stored.get_tensor("indices"), stored.get_tensor("features")
    assert len(set(indices.tolist())) == 8
    assert saved.dtype == torch.float16
    expected = features(DataImages(data, indices.tolist(), SIZE), network, 3)
    torch.testing.assert_close(saved.float(), expected, atol=1e-3, rtol=1e-3)

    data = replace(data, reference=str(file))
    found = data_reference(data, config, SIZE, with_inception(config, Failing()))
    assert found.name == "the training images (reference.safetensors)"
    assert torch.equal(found.features["inception"], saved[:6].float())
    assert found.sha256["inception"] == features_hash(saved[:6].float())
    # The other networks see the same images.
    networks = with_inception(config)
    seen = networks.clip(DataImages(data, indices[:6].tolist(), SIZE)[:])
    torch.testing.assert_close(found.features["clip"], seen)


@pytest.mark.parametrize("change", [{"size": (8, 8)}, {"reference_images": 100}, {"fid_resize": "clean"}])
def test_the_file_does_not_fit_other_images_or_another_resize(change, tmp_path, config):
    file = tmp_path / "reference.safetensors"
    write_reference(tiny_data(), file, 8, SIZE, network=TinyInception())
    data = replace(tiny_data(), reference=str(file))
    change = dict(change)
    size = change.pop("size", SIZE)
    config = replace(config, **change)
    found = data_reference(data, config, size, with_inception(config))
    assert found.name == "the run's own training images"
    assert len(found.features["inception"]) == (12 if config.reference_images == 100 else 6)


def test_computed_features_are_kept(tmp_path, config):
    data, cache = tiny_data(), tmp_path / "cache"
    first = data_reference(data, config, (8, 8), with_inception(config), cache)
    assert len(list(cache.iterdir())) == 2
    again = data_reference(data, config, (8, 8), with_inception(config, Failing()), cache)
    assert first.sha256 == again.sha256
    other = data_reference(data, config, SIZE, with_inception(config), cache)
    assert other.sha256["inception"] != first.sha256["inception"]
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match="damaged .*; delete it"):
        data_reference(data, config, SIZE, with_inception(config), cache)


def test_a_file_of_other_data_or_damaged_is_refused(tmp_path, config):
    data, file = tiny_data(), tmp_path / "reference.safetensors"
    write_reference(data, file, 8, SIZE, network=TinyInception())
    data, networks = replace(data, reference=str(file)), with_inception(config)
    for text in ([*reversed(data.text)], data.text[:3]):
        with pytest.raises(UserError, match=r"made from other images.*data\.reference=null"):
            data_reference(replace(data, text=text), config, SIZE, networks)
    file.write_bytes(file.read_bytes()[:-10])
    for path in (file, tmp_path / "none"):
        with pytest.raises(UserError, match="cannot read reference features"):
            data_reference(replace(data, reference=str(path)), config, SIZE, networks)


def test_a_folder_is_known_by_its_images(tmp_path, config):
    data, folder, cache = tiny_data(), tmp_path / "images", tmp_path / "cache"
    folder.mkdir()
    for index in range(1, 8):
        data.train[index]["image"].save(folder / f"{index}.png")
    config = replace(config, reference_images=None)
    first = folder_reference(folder, config, with_inception(config), cache)
    assert first.name == "the images of images"
    expected = TinyInception()(DataImages(data, range(1, 8), SIZE)[:])
    torch.testing.assert_close(first.features["inception"], expected)
    again = folder_reference(folder, config, with_inception(config, Failing()), cache)
    assert again.sha256 == first.sha256
    fewer = folder_reference(folder, replace(config, reference_images=4), with_inception(config), cache)
    assert len(fewer.features["inception"]) == 4
    fitted = folder_reference(folder, config, with_inception(config), cache, squeeze=(8, 8))
    assert fitted.sha256["inception"] != first.sha256["inception"]
    Image.new("RGB", SIZE).save(folder / "3.png")
    with pytest.raises(AssertionError, match="looked at again"):
        folder_reference(folder, config, with_inception(config, Failing()), cache)


EMBEDDED = Path(resolve("embedded:emoji/inception.safetensors"))


def test_embedded_reference_is_what_the_network_gives():
    data = load_data(DataConfig("embedded:emoji/emoji.parquet"))
    config = EvaluateConfig(clip=None)
    found = data_reference(data, config, (64, 64), Networks(config))
    assert found.name == "the training images (inception.safetensors)"
    assert found.features["inception"].shape == (768, 2048)
    some = [0, 1, 500, 767]
    with safe_open(EMBEDDED, "pt") as file:
        indices = file.get_tensor("indices")[some].tolist()
    expected = Inception()(DataImages(data, indices, (64, 64))[:])
    torch.testing.assert_close(found.features["inception"][some], expected, atol=2e-3, rtol=2e-3)
