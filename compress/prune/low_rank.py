"""Low-rank pruning: replaces the weights of Conv2d and Linear layers with products of two smaller weights.

A Linear becomes two: one to r channels, and one from r channels to the outputs. A Conv2d, seen as a matrix of outputs
by everything else, becomes a convolution of the same kernel size to r channels, followed by a 1x1 convolution (Zhang et
al. 2016, arXiv:1505.06798). This is the best approximation of that matrix at rank r. The alternative, a vertical and a
horizontal convolution (Jaderberg et al. 2014, arXiv:1405.3866), assumes separable kernels.

No stock config can express the result, so its checkpoint contains a small model file; see
:mod:`compress.models.compressed_model`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, bad_value
from compress.models.quantized import is_quantized
from compress.prune.channels.target import TOLERANCE, Target
from compress.prune.layers.patterns import check_finite, check_patterns, choose_layers
from compress.stage import Stage, StageContext, StageReport, one_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
    from torch import nn

    from compress.models.inputs import Inputs
    from compress.models.outline import Outline
    from compress.models.shapes import Shaped
    from compress.prune.layers.ranks import Matrix

STAGE = Stage(version=1, tag="pruned")


@dataclass(frozen=True)
class Config:
    """Which layers to factor, and at which rank.

    Attributes:
        energy: Minimum share of the weight's energy (sum of squared singular values) that each layer keeps, in (0, 1].
            Ignored if ``target`` is set.
        target: Remaining share of the cost, met within 2 %. Ranks minimize the sum of the layers' lost shares of
            energy: one threshold on the energy lost per cost saved applies to all layers.
        multiple: Every rank is a multiple of this, at least 1.
        include: Shell patterns of the names of layers to factor. The default selects the layers inside blocks. The
            others (first and last layer, time and text embeddings) are small, and all features pass through them.
        skip: Shell patterns of the names of layers to exclude; takes precedence over ``include``.
    """

    energy: float = 0.9
    target: Target = Target()
    multiple: int = 1
    include: list[str] = field(default_factory=lambda: ["*block*"])
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        self.target.check_counted("low_rank")
        if not 0 < self.energy <= 1:
            raise bad_value("energy", self.energy, "a number in (0, 1]")
        if self.multiple < 1:
            raise bad_value("multiple", self.multiple, "a whole number of at least 1")
        for key in ("include", "skip"):
            check_patterns(key, getattr(self, key))


@dataclass(frozen=True)
class LowRankLayer:
    """A factored layer.

    Attributes:
        rank: Rank of the product.
        of: Full rank of the weight.
        energy: Share of the weight's energy that is kept.
        params: Parameters of its weight before and after.
    """

    rank: int
    of: int
    energy: float
    params: tuple[int, int]


@dataclass(frozen=True)
class LowRankReport:
    """A UNet with factored layers and what was done to get it.

    Attributes:
        unet: The new model; the input model is unchanged.
        layers: Factored layers, by name.
        skipped: Other Conv2d and Linear layers to the reason.
        params_before: Number of parameters of the input model.
        params_after: Number of parameters of the new model.
        share_params: Share of the input model's parameters that are in factored weights, in [0, 1].
        share_macs: Share of the input model's multiply-accumulates in factored layers; None if the denoiser's inputs
            are unknown.
        left: Remaining share of the cost that the target counts; None without a target.
    """

    unet: "Shaped"
    layers: Mapping[str, LowRankLayer]
    skipped: Mapping[str, str]
    params_before: int
    params_after: int
    share_params: float
    share_macs: float | None
    left: float | None

    def __repr__(self) -> str:
        return one_line(self, len(self.layers), params=f"{self.params_after / self.params_before:.2f}x")


def prune_low_rank(
    unet: "UNet2DConditionModel | UNet2DModel", config: Config = Config(), *, inputs: "Inputs | None" = None
) -> LowRankReport:
    """Factor the weights of Conv2d and Linear layers where that reduces the cost.

    Args:
        unet: Any float weights; stays unchanged. Layers that are already factored are skipped.
        config: See :class:`Config`.
        inputs: Arguments of the forward pass used to count multiply-accumulates; None: inputs at the UNet's own size.

    Raises:
        UserError: The denoiser's class is unsupported, weights are quantized or not finite, a pattern matches nothing,
            no ranks meet the target, or no layer can be factored.
    """
    from compress.models.shapes import shaped
    from compress.prune.layers import ranks

    chosen, skipped = _layers(unet, config)
    check_finite(chosen)
    macs = _macs(unet, inputs)
    total = sum(parameter.numel() for parameter in unet.parameters())
    matrices, saving, whole = _matrices(chosen, macs, total, config)
    lost = {name: ranks.lost_energy(layer.weight) for name, layer in chosen.items()}
    if saving is None:
        found, left_alone = ranks.by_energy(matrices, lost, config.energy, config.multiple)
    else:
        found, left_alone = ranks.by_cost(matrices, lost, saving, config.multiple)
    if not found:
        raise UserError(_nothing(left_alone, config))
    layers, shapes, weights = {}, {}, dict(unet.state_dict())
    for name, rank in found.items():
        weight = weights.pop(f"{name}.weight")
        weights[f"{name}.reduce.weight"], weights[f"{name}.expand.weight"] = ranks.factors(weight, rank)
        if f"{name}.bias" in weights:
            weights[f"{name}.expand.bias"] = weights.pop(f"{name}.bias")
        shapes[name] = {"in": weight.shape[1], "out": weight.shape[0], "rank": rank}
        matrix = matrices[name]
        after = rank * (matrix.inputs + matrix.outputs)
        layers[name] = LowRankLayer(rank, matrix.full, 1 - float(lost[name][rank]), (weight.numel(), after))
    new = shaped(unet, shapes, {name: weight.clone() for name, weight in weights.items()})
    left = None
    if saving is not None:
        left = 1 - sum(matrices[name].cost - matrices[name].at(rank) for name, rank in found.items()) / whole
        _check_met(left, config.target)
    return LowRankReport(
        unet=new,
        layers=layers,
        skipped=skipped | left_alone,
        params_before=total,
        params_after=sum(parameter.numel() for parameter in new.parameters()),
        share_params=sum(layer.params[0] for layer in layers.values()) / total,
        share_macs=None if macs is None else sum(macs[name] for name in layers) / macs[""],
        left=left,
    )


def check(config: Config, denoiser: "nn.Module", outline: "Outline") -> None:
    """Reject what is impossible for any weights of this denoiser; returns nothing, as weights determine the ranks.

    Raises:
        UserError: See :func:`prune_low_rank`.
    """
    chosen, _ = _layers(denoiser, config)
    _matrices(chosen, _macs(denoiser), sum(parameter.numel() for parameter in denoiser.parameters()), config)


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Replace the pipeline's denoiser with one that has factored layers; see :func:`prune_low_rank`."""
    from compress.models import denoiser, set_denoiser
    from compress.models.inputs import captured_inputs

    inputs = captured_inputs(pipeline)
    report = prune_low_rank(denoiser(pipeline), config, inputs=inputs)  # type: ignore[arg-type]
    set_denoiser(pipeline, report.unet)
    ranks = {name: [layer.rank, layer.of, round(layer.energy, 6)] for name, layer in report.layers.items()}
    energies = [layer.energy for layer in report.layers.values()]
    return StageReport(
        coverage={
            "params": report.share_params,
            "macs": report.share_macs,
            "modules": len(report.layers),
            "skipped": dict(report.skipped),
        },
        details={
            "config": asdict(config),
            "params_before": report.params_before,
            "params_after": report.params_after,
            "left": report.left,
            "energy": {"least": min(energies), "mean": sum(energies) / len(energies)},
            "ranks": ranks,
        },
    )


def _layers(unet: "nn.Module", config: Config) -> "tuple[dict[str, nn.Module], dict[str, str]]":
    """The selected layers, and the skipped ones with the reason."""
    from compress.models.shapes import SHAPEABLE

    if type(unet) not in SHAPEABLE:
        raise UserError(
            f"prune method low_rank factors the layers of UNet2DConditionModel and UNet2DModel; this denoiser is a "
            f"{type(unet).__name__}"
        )
    if is_quantized(unet):
        raise UserError("the denoiser is quantized: factor its float weights, then quantize them")
    shapes: Any = unet.config.get("layers", {})  # type: ignore[union-attr, operator]
    products = {name for name, shape in shapes.items() if "rank" in shape}
    return choose_layers(unet, config.include, config.skip, partial(_unfit, products))


def _unfit(products: set[str], name: str, layer: "nn.Module") -> str | None:
    if name.rpartition(".")[0] in products:
        return "already factored"
    return "a grouped convolution" if getattr(layer, "groups", 1) > 1 else None


def _macs(unet: Any, inputs: "Inputs | None" = None) -> "Mapping[str, float] | None":
    """Multiply-accumulates of one pass by module; ``""`` is the total. None: the UNet's inputs are unknown."""
    from compress.models.inputs import example_inputs
    from compress.models.macs import count_macs

    try:
        inputs = inputs or example_inputs(unet)
    except UserError:
        return None
    return count_macs(unet, inputs).by_module


def _matrices(
    chosen: "Mapping[str, nn.Module]", macs: "Mapping[str, float] | None", params: int, config: Config
) -> "tuple[dict[str, Matrix], float | None, float]":
    """The layers with their cost in the target's unit, the cost to save (None without a target), and the total cost.

    Raises:
        UserError: The target is out of reach even at the smallest ranks.
    """
    from compress.prune.layers.ranks import Matrix, most_saved

    unit, share = config.target.goal or ("params", None)
    if unit == "macs" and macs is None:
        raise bad_value("target.macs", share, "null: the inputs of this denoiser besides latents are unknown")
    counts = macs if unit == "macs" and macs is not None else {n: m.weight.numel() for n, m in chosen.items()}
    whole = counts[""] if unit == "macs" else params
    matrices = {
        name: Matrix(len(module.weight), module.weight[0].numel(), counts[name]) for name, module in chosen.items()
    }
    if share is None:
        return matrices, None, whole
    least = 1 - most_saved(matrices, config.multiple) / whole
    if least > share * (1 + TOLERANCE):
        raise bad_value(
            f"target.{unit}",
            share,
            f"at least {math.ceil(1000 * least) / 1000}: rank {config.multiple} in each of the {len(matrices)} "
            f"selected layers leaves {least:.3f} of this denoiser's {unit}",
        )
    return matrices, (1 - share) * whole, whole


def _check_met(left: float, target: Target) -> None:
    assert target.goal is not None
    unit, share = target.goal
    if abs(left / share - 1) > TOLERANCE:
        raise bad_value(
            f"target.{unit}", share, f"about {left:.3f}, the nearest share that ranks of this multiple reach"
        )


def _nothing(left_alone: Mapping[str, str], config: Config) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in list(left_alone.items())[:3])
    return f"energy={config.energy:g}: no layer can be factored at a lower cost ({reasons}, ...)"
