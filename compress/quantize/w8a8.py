"""int8 weights, and int8 inputs for the layers that cost the time: what integer arithmetic needs.

Weights as in :mod:`compress.quantize.int8`. An input x becomes q = round(x / s) + z in [0, 255], one step s and zero
point z for the layer, fixed beforehand (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 2). The range that
s and z come from is found on the inputs that the layer gets while the pipeline samples images: all timesteps, and both
passes of guidance (Q-Diffusion, Li et al. 2023, https://arxiv.org/abs/2302.04304, section 4).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.data.calls import CallsConfig, draw
from compress.errors import UserError, bad_value
from compress.models import denoiser
from compress.models.inputs import captured_inputs
from compress.models.quantized import Ranges, set_ranges
from compress.quantize.int8 import STAGE as INT8
from compress.quantize.int8 import quantize_weights
from compress.quantize.weights.apply import check_matches, check_patterns, choose_layers, stage_report
from compress.quantize.weights.scheme import Scheme
from compress.stage import StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.models.outline import Outline

STAGE = replace(
    INT8,
    usage=INT8.usage + " Stock diffusers computes with float activations; "
    "`compress.accelerate(pipeline)` computes in int8, with the ranges in `activation_ranges.safetensors`.",
    limits=("Without an engine that computes in int8 it saves memory and disk, and no time.",),
)

RANGES = ("absmax", "percentile", "mse")
FLOAT_INPUTS = (
    "conv_in",
    "conv_out",
    "time_embedding.*",
    "*.time_emb_proj",
    "proj_out",
    "*_embed*",
    "*embedder*",
    "norm_out*",
)
"""Layers with float inputs by default: the first sees the latents and the last writes them, so their rounding errors
reach the image undamped; what embeds the timestep is computed once for a whole image, and every layer depends on it."""

SAMPLES = 4096  # values that are kept of a layer's input at one call
SHRINK = 40  # ranges that are tried for the least squared error
TAIL = 1e-4  # share of the values beyond the range of "percentile", on either side


@dataclass(frozen=True)
class Config:
    """Keys of the stage.

    Attributes:
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        float_inputs: Patterns of modules with int8 weights whose inputs stay in float; None: :data:`FLOAT_INPUTS`.
        ranges: Of inputs: ``absmax`` (lowest to highest value seen), ``percentile`` (all but 0.01 % on either side) or
            ``mse`` (least squared error of rounding and clipping).
        calibration: The images that are sampled to see inputs.
    """

    skip: list[str] = field(default_factory=list)
    float_inputs: list[str] | None = None
    ranges: str = "mse"
    calibration: CallsConfig = field(default_factory=lambda: CallsConfig(examples=8, steps=20, side=None))

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        check_patterns("skip", self.skip)
        check_patterns("float_inputs", self.float_inputs or [])
        if self.ranges not in RANGES:
            raise bad_value("ranges", self.ranges, "one of " + ", ".join(RANGES))


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Finds the ranges of inputs and quantizes the pipeline's denoiser in place."""
    model = denoiser(pipeline)
    chosen = int8_inputs(model, config)
    with observed(chosen) as seen:
        draw(pipeline, context.data.text, config.calibration, context.seed)
    ranges = find_ranges(seen, config.ranges)
    report = quantize_weights(model, config.skip, captured_inputs(pipeline))
    set_ranges(model, ranges)
    return stage_report(
        report,
        Scheme(activations="static"),
        ranges=config.ranges,
        float_inputs=[name for name in report.modules if name not in ranges],
        int8_inputs=len(ranges),
    )


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses patterns that match no layer; every layer keeps its shape.

    Raises:
        UserError: See :func:`compress.quantize.int8.choose_layers`.
    """
    choose_layers(denoiser, config.skip)
    int8_inputs(denoiser, config)
    return denoiser


def int8_inputs(model: nn.Module, config: Config) -> dict[str, nn.Module]:
    """The layers with int8 inputs, by name."""
    layers, skipped = choose_layers(model, config.skip)
    check_matches("float_inputs", config.float_inputs or (), layers)
    patterns = FLOAT_INPUTS if config.float_inputs is None else config.float_inputs
    kept = {name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)}
    chosen = {name: layer for name, layer in layers.items() if name not in skipped and name not in kept}
    if not chosen:
        raise bad_value("float_inputs", config.float_inputs, "patterns that leave a layer with int8 inputs")
    return chosen


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
