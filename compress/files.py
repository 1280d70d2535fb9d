"""Files that appear whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_with(file: Path) -> Iterator[Path]:
    """Gives a path beside ``file``; what was written there takes its place when the block ends well.

    The path begins with a dot and ends as ``file`` does, since writers choose a format by the ending.
    """
    beside = file.with_name(f".{uuid.uuid4().hex}-{file.name}")
    try:
        yield beside
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
