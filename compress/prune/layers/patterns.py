"""Selection of layers by name patterns."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    from torch import nn


def check_patterns(key: str, patterns: Sequence[str]) -> None:
    """Raise UserError if a pattern is empty or not a string."""
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise bad_value(key, patterns, 'a list of patterns of module names, such as ["mid_block.*"]')


def choose_layers(
    denoiser: "nn.Module",
    include: Sequence[str],
    skip: Sequence[str],
    unfit: "Callable[[str, nn.Module], str | None]",
) -> "tuple[dict[str, nn.Module], dict[str, str]]":
    """The selected Conv2d and Linear layers, and the skipped ones with the reason.

    Args:
        denoiser: With float weights.
        include: Shell patterns of the names of layers to select.
        skip: Shell patterns of the names of layers to exclude; takes precedence over ``include``.
        unfit: Returns why a layer cannot be selected; None: it can.

    Raises:
        UserError: A pattern matches no layer, or no layer is selected.
    """
    from torch import nn

    every = {name: module for name, module in denoiser.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for key, patterns in (("include", include), ("skip", skip)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in every):
                raise bad_value(key, pattern, f"a pattern of layer names, such as {', '.join(list(every)[:3])}")
    skipped: dict[str, str] = {}
    for name, module in every.items():
        asked = next((pattern for pattern in skip if fnmatchcase(name, pattern)), None)
        if asked is not None:
            skipped[name] = f"asked for by skip: {asked}"
        elif not any(fnmatchcase(name, pattern) for pattern in include):
            skipped[name] = "not in include"
        elif (why := unfit(name, module)) is not None:
            skipped[name] = why
    chosen = {name: module for name, module in every.items() if name not in skipped}
    if not chosen:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise bad_value("include", list(include), f"patterns that leave a Conv2d or Linear ({reasons})")
    return chosen, skipped


def check_finite(layers: "Mapping[str, nn.Module]") -> None:
    """Raise UserError if a weight is NaN or infinite."""
    import torch

    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise UserError(
                f"{name} has weights that are NaN or infinite, from the model or from a training that diverged"
            )
