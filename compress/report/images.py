"""Images in the forms they come in: uint8 tensors or arrays (3, height, width), or PIL images."""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def pixels(image: Any) -> "np.ndarray":
    """A copy of an image as a uint8 array (height, width, 3).

    Args:
        image: uint8 tensor or array of shape (3, height, width), or a PIL image.

    Raises:
        ValueError: It is none of these.
    """
    import numpy as np

    if hasattr(image, "convert"):
        return np.array(image.convert("RGB"))
    array = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"an image must be uint8 of shape (3, height, width), not {array.dtype} of {array.shape}")
    return array.transpose(1, 2, 0).copy()


def file_name(row: str) -> str:
    """The folder of a row's images: its name without what a path could not hold."""
    return re.sub(r"[^\w.-]", "_", row).lstrip(".") or "_"
