"""Finds images that cannot be decoded."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from compress.data.white import on_white
from compress.system.progress import bar

if TYPE_CHECKING:
    from datasets import Dataset

READERS = min(8, os.cpu_count() or 1)
CHUNK = 64  # images held encoded at once for each reader


def unreadable(rows: "Dataset") -> dict[int, str]:
    """Decodes every image in threads.

    Args:
        rows: Their column ``image`` is of type ``datasets.Image(decode=False)``.

    Returns:
        The rows whose image cannot be decoded as RGB, and why.
    """
    found: dict[int, str] = {}
    images = rows.select_columns("image")
    with bar() as progress, ThreadPoolExecutor(READERS) as pool:
        task = progress.add_task(f"checking {len(rows)} images", total=len(rows))
        for start in range(0, len(rows), CHUNK * READERS):
            encoded = images[start : start + CHUNK * READERS]["image"]
            for index, why in enumerate(pool.map(_problem, encoded), start):
                if why is not None:
                    found[index] = why
            progress.update(task, completed=start + len(encoded))
    return found


def _problem(encoded: dict[str, Any] | None) -> str | None:
    import datasets

    if encoded is None or not (encoded.get("bytes") or encoded.get("path")):
        return "no image"
    path = encoded.get("path")
    if encoded.get("bytes") is None and not os.path.isfile(str(path)):
        return "no such file"
    try:
        on_white(datasets.Image().decode_example(encoded))
    except Exception as error:  # noqa: BLE001 - decoders of damaged files fail in many ways
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return "no image of a known format" if "cannot identify" in text else text
    return None
