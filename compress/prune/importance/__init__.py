"""Importances, which select the channels to remove: one module per family, each with ``Config`` and ``scorer``."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress.config.values import build, nearest
from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    from compress.data.calibration import Calibration
    from compress.prune.importance.score import Scorer

FAMILIES = {
    "l1": "magnitude",
    "l2": "magnitude",
    "random": "random",
    "activation": "activation",
    "taylor": "taylor",
    "diff_pruning": "diff_pruning",
    "hessian": "hessian",
}
"""Name of an importance to the module of its family."""


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
        if getattr(value, "name", None) in FAMILIES:
            return value
        raise bad_value("importance", value, f"one of {', '.join(FAMILIES)}, or a mapping with that as name")
    name = value.get("name")
    if name is None:
        raise UserError(f"importance.name is missing: expected one of {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        near = nearest(str(name), list(FAMILIES))
        raise UserError(f"importance={name}: no such importance{near}; known: {', '.join(FAMILIES)}")
    return build(_family(name).Config, value, "importance")


def needs_calibration(config: Any) -> bool:
    """Whether an importance requires calibration examples."""
    return _family(config.name).CALIBRATED


def make_scorer(config: Any, calibration: "Calibration | None", seed: int) -> "Scorer":
    """The scorer of an importance.

    Args:
        config: The result of :func:`parse`.
        calibration: Denoiser and examples; may be None if :func:`needs_calibration` is false.
        seed: The run's seed, for random scores.
    """
    return _family(config.name).scorer(config, calibration, seed)


def _family(name: str) -> ModuleType:
    return importlib.import_module(f"compress.prune.importance.{FAMILIES[name]}")
