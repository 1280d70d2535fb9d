"""Makes a text-to-image diffusion model smaller and faster, and measures what that cost.

``compress.load``, ``prune``, ``distill``, ``quantize``, ``evaluate``, ``accelerate`` and ``save`` are described in
:mod:`compress.api`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from compress.models.registration import register

if TYPE_CHECKING:
    from compress.api import accelerate as accelerate
    from compress.api import distill as distill
    from compress.api import evaluate as evaluate
    from compress.api import load as load
    from compress.api import prune as prune
    from compress.api import quantize as quantize
    from compress.api import save as save

__version__ = "0.1.0"
__all__ = ["accelerate", "distill", "evaluate", "load", "prune", "quantize", "save"]

register()


def __getattr__(name: str) -> Any:
    if name in ("accelerate", "load", "save"):
        return getattr(importlib.import_module("compress.api"), name)
    if name in __all__:
        return importlib.import_module(f"compress.{name}")  # a package that can be called
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
