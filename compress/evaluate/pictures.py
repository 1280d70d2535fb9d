"""Pictures to score, in memory or on disk: looked at in slices, so that a large set need not fit into memory."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
COLOR = ("RGB", "RGBA", "RGBX", "P")  # modes of Pillow that hold three colors, or a palette of them
END = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}  # what a whole file has near its end
READERS = min(8, os.cpu_count() or 1)


class Pictures(Protocol):
    """Any number of uint8 RGB pictures; a tensor ``(n, 3, height, width)`` is one, :class:`PictureFiles` another."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: slice, /) -> "torch.Tensor | list[torch.Tensor]":
        """``(b, 3, height, width)``, or a list of ``(3, height, width)`` where the sizes differ."""


class PictureFiles:
    """Pictures on disk, read in threads when they are asked for.

    Pixels are taken as they are stored, as in every published FID: the orientation that EXIF may ask for is not
    applied. Transparent pictures are laid on white.

    Args:
        files: In the order wanted, at least one.
        key: The config key they came from, for messages.
        fit: Height and width to which pictures are brought, cropped around their center and resized (Lanczos); None
            leaves every picture as it is.
        squeeze: Not to crop them for that but to change their shape, by a bicubic filter as is usual for COCO.

    Attributes:
        transparent: How many pictures are laid on white.
        sizes: ``(height, width)`` of each file.

    Raises:
        UserError: A file is no picture, is cut off, moves, or has no three colors. Headers and endings are read, pixels
            only where an ending looks wrong.
    """

    def __init__(
        self, files: Sequence[Path], key: str = "images", fit: tuple[int, int] | None = None, squeeze: bool = False
    ) -> None:
        self.files, self.key, self.fit, self.squeeze = list(files), key, fit, squeeze
        if not self.files:
            raise UserError(f"{key}: there are no pictures")
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(self._header, self.files))
        self.sizes = [size for size, _ in found]
        self.transparent = sum(transparent for _, transparent in found)

    @cached_property
    def sha256(self) -> str:
        """Hash of the files' contents, in their order."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, chosen: slice, /) -> "torch.Tensor | list[torch.Tensor]":
        """Reads some pictures; see :class:`Pictures`.

        Raises:
            UserError: A file cannot be read after all.
        """
        import torch

        with ThreadPoolExecutor(READERS) as pool:
            pictures = list(pool.map(self._read, self.files[chosen]))
        if pictures and all(picture.shape == pictures[0].shape for picture in pictures):
            return torch.stack(pictures)
        return pictures

    def _header(self, file: Path) -> tuple[tuple[int, int], bool]:
        """Height and width, and whether the picture may be transparent."""
        from PIL import Image

        try:
            with Image.open(file) as picture:
                self._check_kind(file, picture)
                transparent = picture.mode == "RGBA" or "transparency" in picture.info
                size = (picture.height, picture.width)
                if not _ends_well(file, picture.format):
                    picture.load()  # an unusual ending or a cut file; only its pixels tell
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self._unreadable(file, error) from error
        return size, transparent

    def _check_kind(self, file: Path, picture: "Image") -> None:
        if picture.mode not in COLOR:
            raise UserError(f"{self.key}: {file} is not RGB but {_kind(picture.mode)}: convert it or take it away")
        if picture.format != "MPO" and getattr(picture, "is_animated", False):  # MPO: a camera's JPEG and its preview
            raise UserError(f"{self.key}: {file} is an animation: a single picture is expected")

    def _read(self, file: Path) -> "torch.Tensor":
        import numpy as np
        import torch
        from PIL import Image, ImageOps

        try:
            with Image.open(file) as opened:
                picture = on_white(opened)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self._unreadable(file, error) from error
        if self.fit is not None and (picture.height, picture.width) != self.fit:
            if self.squeeze:
                picture = picture.resize(self.fit[::-1], Image.Resampling.BICUBIC)
            else:
                picture = ImageOps.fit(picture, self.fit[::-1], Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

    def _unreadable(self, file: Path, error: Exception) -> UserError:
        return UserError(f"{self.key}: {file} cannot be read as a picture ({error}): repair it or take it away")


class Part:
    """Some pictures of a larger set, one after the other.

    Args:
        pictures: The larger set.
        chosen: Their places.
    """

    def __init__(self, pictures: Pictures, chosen: range) -> None:
        self.pictures, self.chosen = pictures, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, chosen: slice, /) -> "torch.Tensor | list[torch.Tensor]":
        """See :class:`Pictures`."""
        places = self.chosen[chosen]
        return self.pictures[places.start : places.stop]


def picture_files(folder: str | Path, key: str = "images") -> list[Path]:
    """All PNG, JPEG and WebP files in a folder and in its folders, in the order of their names.

    Raises:
        UserError: There is no such folder, or no picture in it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise bad_value(key, folder, "an existing folder of pictures")
    files = [
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise bad_value(key, folder, f"a folder with pictures ({', '.join(SUFFIXES)}), but there is none in it")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def on_white(picture: "Image") -> "Image":
    """A picture as RGB; what is transparent shows white."""
    from PIL import Image

    if picture.mode == "RGBA" or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _ends_well(file: Path, kind: str | None) -> bool:
    """Whether a file's last bytes, or for WebP its length, are those of a whole one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if kind == "WEBP":
            return int.from_bytes(stream.read(8)[4:], "little") + 8 <= size
        stream.seek(max(0, size - 64))
        return END.get(kind or "", b"") in stream.read()


def _kind(mode: str) -> str:
    """What a mode of Pillow is, in words."""
    if mode in ("1", "L", "LA", "La", "F") or mode.startswith("I"):
        return f"gray, with one channel (mode {mode})"
    return mode
