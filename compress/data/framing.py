"""How training images are brought to the size of the model's: scaled, cropped, mirrored."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import bad_value

if TYPE_CHECKING:
    from PIL.Image import Image

CROPS = ("center", "random", "none")


@dataclass(frozen=True)
class Framing:
    """What of an image is trained on.

    Attributes:
        resize: Largest side of the training images in pixels; None: the model's own size.
        crop: ``center`` or ``random`` (one place for each image, by the seed) of the image scaled to cover the size; or
            ``none``, which changes its proportions instead.
        flip: Whether each image is used mirrored too, as another example.
    """

    resize: int | None = None
    crop: str = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if self.resize is not None and self.resize < 8:
            raise bad_value("resize", self.resize, "at least 8 pixels, or null for the model's own size")
        if self.crop not in CROPS:
            raise bad_value("crop", self.crop, " or ".join(CROPS))


def framed(image: "Image", framing: Framing, height: int, width: int, mirrored: bool, seed: int, row: int) -> "Image":
    """An image as it is encoded; a center crop is left to the pipeline's image processor.

    Args:
        image: RGB.
        framing: See :class:`Framing`.
        height: In pixels.
        width: In pixels.
        mirrored: Whether to mirror it.
        seed: Of random crops.
        row: Of the image, so that its crop depends on nothing else.
    """
    import torch
    from PIL import Image

    from compress.system.random import generator

    if framing.crop == "none":
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    elif framing.crop == "random":
        scale = max(width / image.width, height / image.height)
        large = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(large, Image.Resampling.LANCZOS)
        shares = torch.rand(2, generator=generator(seed, "crop", row)).tolist()
        left, top = (
            int(share * (has - kept + 1)) for share, has, kept in zip(shares, large, (width, height), strict=True)
        )
        image = image.crop((left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
