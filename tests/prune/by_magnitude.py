"""Pruning by magnitude in one call, for tests."""

from typing import Any

from compress.prune.width import Config, PruneReport, prune_width


def prune_channels(unet: Any, ratio: Any = 0.25, importance: str = "l2", combine: str = "product") -> PruneReport:
    return prune_width(unet, Config(ratio, importance={"name": importance, "combine": combine}))
