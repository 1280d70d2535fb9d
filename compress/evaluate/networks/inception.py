"""The Inception network of FID and the two ways to resize images to its input."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.evaluate.networks.inception_file import INCEPTION_SHA256, find_inception
from compress.runtime import resolve

SIDE = 299
NAME = "pt_inception-2015-12-05"


def resize_like_tensorflow1(images: Tensor, side: int = SIDE) -> Tensor:
    """Bilinear resize with TensorFlow 1's coordinates, which every FID published before clean-fid uses.

    Output pixel ``i`` is at ``i * size / side`` of the input: no half-pixel shift and no antialiasing. The last row and
    column are repeated at the border.

    Args:
        images: Float, ``(n, channels, height, width)``.
        side: Height and width of the result in pixels.

    Returns:
        Float, ``(n, channels, side, side)``.
    """
    rows = _weights(images.shape[2], side, images)
    columns = _weights(images.shape[3], side, images)
    return rows @ images @ columns.T


def resize_clean(images: Tensor, side: int = SIDE) -> Tensor:
    """Bicubic resize with antialiasing as by Pillow in float, clipped to [0, 255], not rounded.

    Parmar et al. 2022, https://arxiv.org/abs/2104.11222 ("clean-fid").

    Args:
        images: Float in [0, 255], ``(n, channels, height, width)``.
        side: Height and width of the result in pixels.

    Returns:
        Float, ``(n, channels, side, side)``.
    """
    if images.shape[2:] == (side, side):
        return images
    return torch.nn.functional.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 255)


RESIZES: dict[str, Callable[[Tensor], Tensor]] = {"tensorflow1": resize_like_tensorflow1, "clean": resize_clean}


def _weights(size: int, side: int, like: Tensor) -> Tensor:
    """The ``(side, size)`` interpolation matrix of one axis."""
    index = torch.arange(side)
    position = index.double() * size / side
    low = position.floor().long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    share = position - low
    weights = torch.zeros(side, size, dtype=torch.float64)
    weights[index, low] += 1 - share
    weights[index, high] += share
    return weights.to(like)


def _compiled(network: torch.jit.ScriptModule) -> Callable[[Tensor], Tensor]:
    """The network as OpenVINO runs it in float32: features equal to rounding, in a third of the time."""
    import openvino

    with torch.jit.optimized_execution(False):
        shape = openvino.PartialShape([-1, 3, SIDE, SIDE])
        model = openvino.convert_model(network, example_input=torch.zeros(1, 3, SIDE, SIDE), input=[shape])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0].copy())


class Inception(torch.nn.Module):
    """The network of FID (Heusel et al. 2017), https://arxiv.org/abs/1706.08500: 2048 features an image.

    Args:
        path: See :func:`compress.evaluate.networks.inception_file.find_inception`.
        device: Where to compute.
        resize: One of :data:`RESIZES`.

    Raises:
        UserError: The file is missing or has another hash.
    """

    num_features = 2048
    name = NAME
    sha256 = INCEPTION_SHA256

    def __init__(self, path: str = "auto", device: torch.device | str = "cpu", resize: str = "tensorflow1") -> None:
        super().__init__()
        network = torch.jit.load(str(find_inception(path)), map_location="cpu").eval().to(device)
        self.device = torch.device(device)
        frozen = torch.jit.freeze(network)
        self.network = _compiled(frozen) if resolve("auto", self.device) == "openvino" else frozen
        self.preprocessing = resize
        self.resize = RESIZES[resize]

    @torch.no_grad()
    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Features ``(b, 2048)``; see :class:`compress.evaluate.networks.Network`."""
        if isinstance(images, Tensor):
            large = self._large(images)
        else:
            large = torch.cat([self._large(image[None]) for image in images])
        # Optimization costs two slow passes for every new batch size, without a gain.
        with torch.jit.optimized_execution(False):
            return self.network((large - 128) / 128).float().cpu()

    def _large(self, images: Tensor) -> Tensor:
        return self.resize(images.to(self.device, torch.float32))
