"""The pictures of a page: the same prompt down a column, small enough for one file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.report.images import file_name

LOSSLESS = 128  # pixels; a larger picture is brought to LARGEST and compressed with loss
LARGEST = 256
MOST = 160  # pictures in a page


@dataclass(frozen=True)
class PictureGrid:
    """A grid of pictures.

    Attributes:
        prompts: Of the columns.
        rows: Name and a ``data:`` address for each column; empty where there is no picture.
        left_out: What the page has no room for, as a sentence; empty if nothing.
        small: Whether their pixels are shown enlarged.
    """

    prompts: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    left_out: str = ""
    small: bool = False


def gather(folders: Sequence[tuple[str, Path, str]], prompts: Sequence[str]) -> PictureGrid | None:
    """Reads the pictures that runs left; None if there are none.

    Args:
        folders: Name of a row, a run's folder, and the row's name in that run.
        prompts: Of the columns; those that are not known are numbered.
    """
    found = [(name, sorted((run / "images" / file_name(row)).glob("*.png"), key=_number)) for name, run, row in folders]
    found = [(name, files) for name, files in found if files]
    if not found:
        return None
    wide = max(len(files) for _, files in found)
    columns = min(wide, max(3, MOST // len(found)))
    kept = found[: MOST // columns]
    left = [f"{wide - columns} of {wide} prompts"] * (columns < wide)
    left += [f"{len(found) - len(kept)} of {len(found)} rows"] * (len(kept) < len(found))
    made = tuple((name, tuple(address(file) for file in files[:columns])) for name, files in kept)
    padded = tuple((name, row + ("",) * (columns - len(row))) for name, row in made)
    names = tuple(prompts[i] if i < len(prompts) else f"prompt {i + 1}" for i in range(columns))
    text = f"Not shown: {' and '.join(left)}." if left else ""
    return PictureGrid(names, padded, text, _side(kept[0][1][0]) <= LOSSLESS)


def address(file: Path) -> str:
    """A picture as a ``data:`` address: small ones to the bit, larger ones reduced."""
    from PIL import Image

    with Image.open(file) as image:
        if max(image.size) <= LOSSLESS:
            return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
        small = image.convert("RGB")
        small.thumbnail((LARGEST, LARGEST))
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _number(file: Path) -> int:
    return int(file.stem) if file.stem.isdigit() else 0


def _side(file: Path) -> int:
    from PIL import Image

    with Image.open(file) as image:
        return max(image.size)
