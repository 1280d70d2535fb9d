"""Images to score, in memory or on disk, read in slices so that a large set does not need to fit into memory."""

import copy
import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from compress.data.white import has_alpha, on_white
from compress.errors import UserError, bad_value
from compress.system.files import file_hash
from compress.system.progress import track

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
COLOR = ("RGB", "RGBA", "RGBX", "P")  # modes of Pillow that hold three colors, or a palette of them
FORMATS = ("PNG", "JPEG", "MPO", "WEBP")  # of Pillow; MPO is a camera's JPEG and its preview
OTHER = (".bmp", ".tif", ".tiff", ".gif", ".jfif", ".avif", ".heic", ".ppm")  # endings of images that are not read
READERS = min(8, os.cpu_count() or 1)

logger = logging.getLogger(__name__)


class Images(Protocol):
    """A sequence of uint8 RGB images; a tensor ``(n, 3, height, width)`` is one, :class:`ImageFiles` another."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: slice, /) -> "torch.Tensor | list[torch.Tensor]":
        """``(b, 3, height, width)``, or a list of ``(3, height, width)`` if the sizes differ."""


class ImageFiles:
    """Images on disk, read in threads on demand.

    EXIF orientation is not applied, as in every published FID. Transparent images are composited on white.

    Args:
        files: At least one, in order.
        key: Their config key, for messages.
        fit: Height and width to center-crop and resize (Lanczos) to; None for no change.
        squeeze: Whether to resize to ``fit`` without cropping (bicubic), as usual for COCO.

    Attributes:
        transparent: Number of images composited on white.
        sizes: ``(height, width)`` of each file.

    Raises:
        UserError: By its header, a file is not a supported image, is animated, or does not have three colors.
    """

    def __init__(
        self, files: Sequence[Path], key: str = "images", fit: tuple[int, int] | None = None, squeeze: bool = False
    ) -> None:
        self.files, self.key, self.fit, self.squeeze = list(files), key, fit, squeeze
        if not self.files:
            raise UserError(f"{key}: there are no images")
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(self._header, self.files))
        self.sizes = [size for size, _ in found]
        self._decoded: set[int] = set()
        self.transparent = sum(transparent for _, transparent in found)

    def squeezed(self, size: tuple[int, int]) -> "ImageFiles":
        """The same files, every image resized to a height and width without cropping."""
        found = copy.copy(self)
        found.fit, found.squeeze = size, True
        return found

    def verify(self, chosen: range | None = None) -> None:
        """Decodes images, each once, so that damage is found before any network runs.

        Args:
            chosen: Their indices; None for all.

        Raises:
            UserError: A file cannot be read; the message names the first.
        """
        every = range(len(self.files)) if chosen is None else chosen
        places = [index for index in every if index not in self._decoded]
        if not places:
            return
        files = [self.files[index] for index in places]
        shown = track(files, f"checking {len(files)} images of {self.key}")
        with ThreadPoolExecutor(READERS) as pool:
            for _ in zip(shown, pool.map(self._whole, files), strict=True):
                pass
        self._decoded.update(places)

    @cached_property
    def sha256(self) -> str:
        """Hash of the files' contents, in their order."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(bytes.fromhex(file_hash(file)))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, chosen: slice, /) -> "torch.Tensor | list[torch.Tensor]":
        """Reads some images; see :class:`Images`.

        Raises:
            UserError: A file cannot be read.
        """
        import torch

        with ThreadPoolExecutor(READERS) as pool:
            images = list(pool.map(self._read, self.files[chosen]))
        if images and all(image.shape == images[0].shape for image in images):
            return torch.stack(images)
        return images

    def _header(self, file: Path) -> tuple[tuple[int, int], bool]:
        """Height and width, and whether the image may be transparent."""
        from PIL import Image

        try:
            with Image.open(file) as image:
                self._check_kind(file, image)
                transparent = has_alpha(image)
                size = (image.height, image.width)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self._unreadable(file, error) from error
        return size, transparent

    def _whole(self, file: Path) -> None:
        self._decode(file)

    def _decode(self, file: Path) -> "Image":
        """As RGB."""
        from PIL import Image

        try:
            with Image.open(file) as opened:
                return on_white(opened)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self._unreadable(file, error) from error

    def _check_kind(self, file: Path, image: "Image") -> None:
        if image.format not in FORMATS:
            raise UserError(f"{self.key}: {file} is {image.format} despite its ending: convert it to PNG, JPEG or WebP")
        if image.mode not in COLOR:
            raise UserError(f"{self.key}: {file} is not RGB but {_kind(image.mode)}: convert it or remove it")
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise UserError(f"{self.key}: {file} is an animation: a single image is expected")

    def _read(self, file: Path) -> "torch.Tensor":
        import numpy as np
        import torch
        from PIL import Image, ImageOps

        image = self._decode(file)
        if self.fit is not None and (image.height, image.width) != self.fit:
            if self.squeeze:
                image = image.resize(self.fit[::-1], Image.Resampling.BICUBIC)
            else:
                image = ImageOps.fit(image, self.fit[::-1], Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _unreadable(self, file: Path, error: Exception) -> UserError:
        return UserError(f"{self.key}: {file} cannot be read as an image ({error}): repair it or remove it")


class ImageSlice:
    """A contiguous part of a larger set of images.

    Args:
        images: The larger set.
        chosen: Indices of the part.
    """

    def __init__(self, images: Images, chosen: range) -> None:
        self.images, self.chosen = images, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, chosen: slice, /) -> "torch.Tensor | list[torch.Tensor]":
        """See :class:`Images`."""
        places = self.chosen[chosen]
        return self.images[places.start : places.stop]


def image_files(folder: str | Path, key: str = "images") -> list[Path]:
    """All PNG, JPEG and WebP files in a folder and its subfolders, sorted by name.

    Raises:
        UserError: The folder does not exist or has no images.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise bad_value(key, folder, "an existing folder of images")
    files = [
        file
        for file in path.rglob("*")
        if file.suffix.lower() in (*SUFFIXES, *OTHER)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    others = [file for file in files if file.suffix.lower() in OTHER]
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if others:
        endings = ", ".join(sorted({file.suffix.lower() for file in others}))
        logger.warning("%s: %d images with unsupported endings are skipped (%s)", key, len(others), endings)
    if not files:
        raise bad_value(key, folder, f"a folder with images ({', '.join(SUFFIXES)}), but it has none")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def reduced_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width after resizing the shorter side to ``side`` pixels."""
    scale = side / min(height, width)
    return round(height * scale), round(width * scale)


def _kind(mode: str) -> str:
    """Description of a Pillow mode."""
    if mode in ("1", "L", "LA", "La", "F") or mode.startswith("I"):
        return f"gray, with one channel (mode {mode})"
    return mode
