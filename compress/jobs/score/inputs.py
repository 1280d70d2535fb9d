"""The inputs of ``recipe=score``: images of two folders, paired or not, and their captions."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError, bad_value
from compress.evaluate.captions import read_captions, some
from compress.evaluate.images import ImageFiles, image_files, reduced_size

if TYPE_CHECKING:
    from compress.jobs.score import ScoreConfig

LEAST = 5  # images in a set, the least for an interval

logger = logging.getLogger(__name__)


def inputs(config: "ScoreConfig") -> tuple[ImageFiles, ImageFiles | None, list[str] | None]:
    """The images of both folders and the captions, checked as far as possible without decoding an image.

    Raises:
        UserError: An image, a caption or a pair is missing or wrong; the message names the key and the file.
    """
    files = image_files(config.images, "images")
    root = Path(config.images).expanduser()
    names = [file.relative_to(root).as_posix() for file in files]
    captions = None if config.captions is None else read_captions(config.captions, names)
    others = None if config.reference is None else image_files(config.reference, "reference")
    if config.paired and others is not None:
        others = _pair(names, others, config)
    images = ImageFiles(files, "images")
    reference = None if others is None else ImageFiles(others, "reference")
    if config.evaluate.resize is not None:
        size = _reduced_size(config.evaluate.resize, images)
        images = images.squeezed(size)
        reference = None if reference is None else reference.squeezed(size)
    for key, folder, found in (("images", config.images, images), ("reference", config.reference, reference)):
        if found is not None and len(found) < LEAST:
            raise bad_value(key, folder, f"at least {LEAST} images, but there are {len(found)}")
        if found is not None and found.transparent:
            words = "%s: images with an alpha channel are composited on white: %d of %d"
            logger.warning(words, key, found.transparent, len(found))
    if config.paired and reference is not None:
        _check_sizes(images, reference, config)
    return images, reference, captions


def _pair(names: Sequence[str], others: Sequence[Path], config: "ScoreConfig") -> list[Path]:
    """The reference's files in the order of the images, matched by name without the ending."""
    root = Path(str(config.reference)).expanduser()
    theirs = _by_stem([(file.relative_to(root).as_posix(), file) for file in others], "reference")
    ours = _by_stem([(name, Path(name)) for name in names], "images")
    if alone := [name for name in ours if name not in theirs]:
        raise UserError(
            f"paired=true: {len(alone)} of {len(ours)} of the images have none of that name in reference: "
            f"{some(alone)} (reference has {len(theirs)}: {some(list(theirs))})"
        )
    if alone := [name for name in theirs if name not in ours]:
        raise UserError(
            f"paired=true: {len(alone)} of {len(theirs)} images of reference have none of that name in images: "
            f"{some(alone)}"
        )
    return [theirs[name] for name in ours]


def _by_stem(files: Sequence[tuple[str, Path]], key: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, file in files:
        stem = name.rpartition(".")[0]
        if stem in found:
            raise UserError(f"paired=true: {key} has two images named {stem}, with different endings; one is expected")
        found[stem] = file
    return found


def _reduced_size(side: int, images: ImageFiles) -> tuple[int, int]:
    """What the images of both folders are brought to, as a run brings them that samples the first ones itself."""
    (height, width), *more = sorted(set(images.sizes))
    if more:
        raise bad_value("evaluate.resize", side, f"null, since images has images of {len(more) + 1} different sizes")
    if side > min(height, width):
        raise bad_value("evaluate.resize", side, f"at most {min(height, width)}, the shorter side of the images")
    return reduced_size(height, width, side)


def _check_sizes(images: ImageFiles, reference: ImageFiles, config: "ScoreConfig") -> None:
    from compress.evaluate.metrics.paired import WINDOW

    wanted = [name for name in ("ssim", "ms_ssim") if config.evaluate.wants(name)]
    for file, (height, width) in zip(images.files, images.sizes, strict=True):
        if wanted and min(height, width) < WINDOW:
            raise UserError(
                f"paired=true: {file} has {width}x{height} pixels, and SSIM needs sides of at least {WINDOW}: take it "
                f"away, or give evaluate.leave_out=[{','.join(wanted)}]"
            )
    for ours, theirs, a, b in zip(images.files, reference.files, images.sizes, reference.sizes, strict=True):
        if a != b:
            raise UserError(
                f"paired=true: {ours} has {a[1]}x{a[0]} pixels, {theirs} {b[1]}x{b[0]}: pairs have to be of one size"
            )
