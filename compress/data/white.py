"""How an image of any mode becomes RGB: transparent pixels show white. Everything that looks at images uses this."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

ALPHA = ("RGBA", "LA", "PA", "RGBa")  # modes of Pillow with an alpha channel


def has_alpha(image: "Image") -> bool:
    """Whether an image may have transparent pixels."""
    return image.mode in ALPHA or "transparency" in image.info


def on_white(image: "Image") -> "Image":
    """An image as RGB, composited on white where it is transparent; of an animation, its current frame.

    Gray, palette and CMYK images are converted, 16 bits a channel are reduced to 8.

    Raises:
        ValueError: The image has 32 bits a channel, whose range is unknown.
    """
    from PIL import Image

    if image.mode.startswith("I;16"):
        import numpy as np

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a channel (mode {image.mode}), expected 8 or 16")
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
