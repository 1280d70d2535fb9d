"""Importances, which select the channels to remove: one module per family.

A family has ``Config``, ``scorer``, ``CALIBRATED`` (whether it looks at examples), ``COMPARABLE`` (whether its scores
estimate a rise of the loss, so that those of different layers compare), and ``NAMES`` if it serves others than its own.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress.config.values import build, nearest
from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    from compress.data.calibration import Calibration
    from compress.prune.importance.score import Scorer


@cache
def families() -> dict[str, ModuleType]:
    """Name of an importance to the module of its family: all modules here that have a scorer."""
    stems = [found.name for found in pkgutil.iter_modules(__path__)]
    modules = {stem: importlib.import_module(f"{__name__}.{stem}") for stem in stems}
    return {
        name: module
        for stem, module in modules.items()
        if hasattr(module, "scorer")
        for name in getattr(module, "NAMES", (stem,))
    }


def parse(value: Any) -> Any:
    """The ``Config`` of an importance.

    Args:
        value: Its name, a mapping of its ``name`` and its keys, or a ``Config``.

    Raises:
        UserError: An unknown name or key, or a value of the wrong type or range.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        if getattr(value, "name", None) in families():
            return value
        raise bad_value("importance", value, f"one of {', '.join(families())}, or a mapping with that as name")
    name = value.get("name")
    if name is None:
        raise UserError(f"importance.name is missing: expected one of {', '.join(families())}")
    if name not in families():
        near = nearest(str(name), list(families()))
        raise UserError(f"importance={name}: no such importance{near}; known: {', '.join(families())}")
    return build(families()[name].Config, value, "importance")


def needs_calibration(config: Any) -> bool:
    """Whether an importance requires calibration examples."""
    return families()[config.name].CALIBRATED


def is_comparable(config: Any) -> bool:
    """Whether scores of different layers compare as they are."""
    return families()[config.name].COMPARABLE


def make_scorer(config: Any, calibration: "Calibration | None", seed: int) -> "Scorer":
    """The scorer of an importance.

    Args:
        config: The result of :func:`parse`.
        calibration: Denoiser and examples; may be None if :func:`needs_calibration` is false.
        seed: The run's seed, for random scores.
    """
    return families()[config.name].scorer(config, calibration, seed)
