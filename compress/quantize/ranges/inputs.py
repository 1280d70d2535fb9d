"""Ranges of the inputs of layers, found while a pipeline samples images.

An input x becomes q = round(x / s) + z in [0, 255], one step s and zero point z for the layer, fixed beforehand (Jacob
et al. 2018, https://arxiv.org/abs/1712.05877, section 2). The range that s and z come from is found on what the layer
gets while images are sampled: all timesteps, and both passes of guidance (Q-Diffusion, Li et al. 2023,
https://arxiv.org/abs/2302.04304, section 4).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.data.calls import CallsConfig, draw
from compress.errors import UserError, bad_value
from compress.models.quantized import Ranges
from compress.quantize.weights.apply import check_matches, check_patterns, choose_layers
from compress.stage import StageContext

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RANGES = ("absmax", "percentile", "mse")
EDGES = (
    "conv_in",
    "conv_out",
    "time_embedding.*",
    "*.time_emb_proj",
    "proj_out",
    "*_embed*",
    "*embedder*",
    "norm_out*",
)
"""Layers that are rounded less by default: the first sees the latents and the last writes them, so their rounding
errors reach the image undamped; what embeds the timestep is computed once an image, and every layer depends on it."""

SAMPLES = 4096  # values that are kept of a layer's input at one call
SHRINK = 40  # ranges that are tried for the least squared error
TAIL = 1e-4  # share of the values beyond the range of "percentile", on either side


@dataclass(frozen=True)
class InputRanges:
    """Keys of a stage that finds ranges.

    Attributes:
        float_inputs: Patterns of modules whose inputs stay in float; None: :data:`EDGES`.
        ranges: ``absmax`` (lowest to highest value seen), ``percentile`` (all but 0.01 % on either side) or ``mse``
            (least squared error of rounding and clipping).
        smooth: Share of the spread of input channels that moves into the weights where a LayerNorm feeds linear layers
            alone, in [0, 1], see :mod:`compress.quantize.ranges.smooth`; None: nothing moves.
        calibration: The images that are sampled to see inputs.
    """

    float_inputs: list[str] | None = None
    ranges: str = "mse"
    smooth: float | None = None
    calibration: CallsConfig = field(default_factory=lambda: CallsConfig(examples=8, steps=20, side=None))

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        check_patterns("float_inputs", self.float_inputs or [])
        if self.ranges not in RANGES:
            raise bad_value("ranges", self.ranges, "one of " + ", ".join(RANGES))
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise bad_value("smooth", self.smooth, "a number from 0 to 1, or null")


def sampled_ranges(
    pipeline: "DiffusionPipeline", layers: Mapping[str, nn.Module], config: InputRanges, context: StageContext
) -> Ranges:
    """The ranges of layers of the pipeline's denoiser, with float weights, see :func:`find_ranges`."""
    with observed(layers) as seen:
        draw(pipeline, context.data.text, config.calibration, context.seed)
    return find_ranges(seen, config.ranges)


def int8_inputs(
    model: nn.Module, skip: Sequence[str] = (), float_inputs: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The layers with int8 inputs, by name.

    Args:
        model: Any model; it may be on the meta device.
        skip: Shell patterns of layers that stay in float.
        float_inputs: Of layers whose inputs stay in float; None: :data:`EDGES`.

    Raises:
        UserError: A pattern matches no layer, or no layer is left.
    """
    layers, skipped = choose_layers(model, skip)
    check_matches("float_inputs", float_inputs or (), layers)
    kept = matching(layers, EDGES if float_inputs is None else float_inputs)
    chosen = {name: layer for name, layer in layers.items() if name not in skipped and name not in kept}
    if not chosen:
        raise bad_value("float_inputs", float_inputs, "patterns that leave a layer with int8 inputs")
    return chosen


def matching(names: Mapping[str, Any], patterns: Sequence[str]) -> set[str]:
    """Names that match a pattern."""
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


@contextmanager
def observed(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Keeps values of the inputs of layers while the block runs.

    Yields:
        Name to one tensor a call, of up to :data:`SAMPLES` values, the lowest and the highest among them.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watcher(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().flatten()
            stride = max(1, -(-values.numel() // SAMPLES)) | 1  # odd, so that it does not hit the same channels
            seen[name].append(torch.cat([values[::stride], values.amin()[None], values.amax()[None]]).float().cpu())

        return hook

    handles = [layer.register_forward_pre_hook(watcher(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find_ranges(seen: Mapping[str, list[Tensor]], method: str) -> Ranges:
    """Lowest and highest value of each layer's int8 levels; 0 is always one of them.

    Args:
        seen: See :func:`observed`. A layer that was not called gets no range.
        method: One of :data:`RANGES`.

    Raises:
        UserError: A value is NaN or infinite.
    """
    found = {}
    for name, parts in seen.items():
        if not parts:
            continue
        values = torch.cat(parts)
        if not values.isfinite().all():
            raise UserError(f"the input of {name} is NaN or infinite while images are sampled: use precision=fp32")
        low, high = _RANGE[method](values)
        found[name] = (min(float(low), 0.0), max(float(high), 0.0))
    return found


def _absmax(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.amin(), values.amax()


def _percentile(values: Tensor) -> tuple[Tensor, Tensor]:
    ordered = values.sort().values
    out = int(TAIL * len(ordered))
    return ordered[out], ordered[-1 - out]


def _mse(values: Tensor) -> tuple[Tensor, Tensor]:
    """The range out of shrunken ones with the least squared error of the values."""
    from compress.runtime.fake import STEPS

    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    best, least = (low, high), float("inf")
    for part in range(SHRINK):
        share = 1 - part / (SHRINK + 8)
        step = ((high - low) * share / STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low * share / step).round()
        rounded = ((values / step).round() + zero).clamp(0, STEPS).sub(zero) * step
        error = float((rounded - values).square().mean())
        if error < least:
            best, least = (low * share, high * share), error
    return best


_RANGE = {"absmax": _absmax, "percentile": _percentile, "mse": _mse}
