"""The Inception network and its input, against the published preprocessing written out anew."""

import numpy as np
import pytest
import torch
from PIL import Image

from compress.evaluate.networks.inception import Inception, resize_clean, resize_like_tensorflow1
from compress.evaluate.networks.inception_file import find_inception

SIZES = [(64, 64), (48, 80), (299, 299), (512, 400)]


def images(size: tuple[int, int], n: int = 1) -> torch.Tensor:
    """Noise with smooth color, so that aliasing and clipping both show."""
    generator = torch.Generator().manual_seed(size[0])
    rough = torch.rand(n, 3, *size, generator=generator)
    smooth = torch.nn.functional.interpolate(torch.rand(n, 3, 3, 3, generator=generator), size, mode="bilinear")
    return (255 * (0.4 * rough + 0.6 * smooth)).round().byte()


def bilinear_of_tensorflow1(image: np.ndarray) -> np.ndarray:
    """``tf.image.resize_bilinear(align_corners=False)`` of TensorFlow 1 in numpy, one output row at a time."""
    height, width = image.shape[:2]
    result = np.empty((299, 299, 3))
    for row in range(299):
        top = row * height / 299
        above, below = image[int(top)], image[min(int(top) + 1, height - 1)]
        line = above + (below - above) * (top - int(top))
        for column in range(299):
            left = column * width / 299
            first, second = line[int(left)], line[min(int(left) + 1, width - 1)]
            result[row, column] = first + (second - first) * (left - int(left))
    return result


def bicubic_of_pillow(image: np.ndarray) -> np.ndarray:
    """clean-fid's resize: Pillow's bicubic of each channel in float, clipped."""
    channels = [Image.fromarray(image[..., index].astype(np.float32)) for index in range(3)]
    large = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(large, axis=-1).clip(0, 255)


RESIZES = {
    "tensorflow1": (resize_like_tensorflow1, bilinear_of_tensorflow1),
    "clean": (resize_clean, bicubic_of_pillow),
}


@pytest.mark.parametrize("size", [*SIZES, (5, 7), (700, 31)])
@pytest.mark.parametrize("kind", list(RESIZES))
def test_resize_is_the_published_one(kind, size):
    ours, theirs = RESIZES[kind]
    image = images(size)
    large = ours(image.float())
    assert large.shape == (1, 3, 299, 299)
    expected = theirs(image[0].permute(1, 2, 0).numpy().astype(np.float64))
    np.testing.assert_allclose(large[0].permute(1, 2, 0).numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("kind", list(RESIZES))
def test_features_are_those_of_the_published_preprocessing(kind):
    network = Inception(resize=kind)
    plain = torch.jit.load(str(find_inception())).eval()
    several = [images(size)[0] for size in SIZES]
    large = np.stack([RESIZES[kind][1](one.permute(1, 2, 0).numpy().astype(np.float64)) for one in several])
    with torch.no_grad(), torch.jit.optimized_execution(False):
        expected = plain((torch.from_numpy(large).permute(0, 3, 1, 2).float() - 128) / 128)
    found = network(several)
    assert found.shape == (4, 2048)
    assert found.dtype == torch.float32
    assert 0.05 < expected.mean() < 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.1
    # The same images as a batch of one size
    torch.testing.assert_close(network(several[0][None]), found[:1], atol=1e-4, rtol=1e-4)


def test_the_two_resizes_differ_where_a_image_is_made_smaller():
    large = images((598, 598)).float()
    assert (resize_clean(large) - resize_like_tensorflow1(large)).abs().max() > 20
