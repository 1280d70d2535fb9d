"""The points of a grid: the overrides that each varies, and a folder named after them."""

import hashlib
import re
from collections.abc import Iterable, Sequence

LONGEST = 80  # characters of a folder name


def varied(overrides: Sequence[str], keys: Iterable[str]) -> list[str]:
    """The overrides of a point that differ between the points.

    Args:
        overrides: All overrides of the point.
        keys: Those that have several values in the grid.
    """
    return [override for key in keys for override in overrides if override.partition("=")[0] == key]


def folder_name(overrides: Sequence[str]) -> str:
    """A short folder name: ``ratio=0.4,seed=1``; a shortened one ends with a hash.

    Args:
        overrides: The overrides that differ between the points, at least one.
    """
    pairs = [override.partition("=")[::2] for override in overrides]
    # A choice is named by its group (prune@stages.prune=taylor), a key by its last name.
    keys = [key.lstrip("+~").partition("@")[0].replace("/", ".") for key, _ in pairs]
    last = [key.rpartition(".")[2] for key in keys]
    short = [end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)]
    values = [value.strip("'\"") for _, value in pairs]
    # The last name of a path.
    written = [re.sub(r"[^\w.+-]+", "_", value.rstrip("/").rpartition("/")[2]).strip("_") for value in values]
    name = ",".join(f"{key}={value}" for key, value in zip(short, written, strict=True))
    if written == values and len(name) <= LONGEST:
        return name
    digest = hashlib.sha256("\0".join(overrides).encode()).hexdigest()[:8]
    return f"{name[: LONGEST - 9]}-{digest}"
