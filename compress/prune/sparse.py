"""Unstructured and n:m pruning: sets the weights of smallest magnitude to zero; every layer keeps its shape.

Importance is magnitude (Han et al. 2015, arXiv:1506.02626). NVIDIA's sparse tensor cores support the 2:4 pattern
(Mishra et al. 2021, arXiv:2104.08378). Importances that need examples, as in Wanda and SparseGPT, are not implemented.

The result is a stock checkpoint with zeros in it, with the same file size and speed. The report gives the size with
only the nonzero weights stored; docs/pruning.md explains how to run 2:4 linear layers on sparse tensor cores.
Distillation afterwards keeps the zeros.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.errors import UserError, bad_value
from compress.models.quantized import is_quantized
from compress.models.sparsity import SparseLayer, least_of_groups, set_zero, smallest
from compress.prune.layers.patterns import check_finite, check_patterns, choose_layers
from compress.stage import Stage, StageContext, StageReport, one_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from compress.models.inputs import Inputs
    from compress.models.outline import Outline

STAGE = Stage(
    version=1,
    zeros=True,
    tag="pruned",
    limits=("Weights are zero, not gone: the files are no smaller, and plain kernels are no faster for it.",),
)

UNSTRUCTURED = "unstructured"
SHOWN = 5  # layers listed in the details: those with the most and fewest zeros, and the most weight lost


@dataclass(frozen=True)
class Config:
    """Which weights become zero.

    Attributes:
        pattern: ``unstructured``, or ``n:m`` such as ``2:4``: of m neighbors along a layer's inputs, keep at most n.
        sparsity: Share of the weights set to zero, in (0, 1); None: 1 - n/m for n:m, else 0.5.
        scope: ``layer``: this share of each layer; ``global``: of all layers, in one ranking. n:m requires ``layer``.
        include: Shell patterns of the names of layers to prune. The default selects the layers inside blocks. The
            others (first and last layer, time and text embeddings) are small, and all features pass through them.
        skip: Shell patterns of the names of layers to exclude; takes precedence over ``include``.
    """

    pattern: str = UNSTRUCTURED
    sparsity: float | None = None
    scope: str = "layer"
    include: list[str] = field(default_factory=lambda: ["*block*"])
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if self.pattern != UNSTRUCTURED and self.groups is None:
            raise bad_value("pattern", self.pattern, f"{UNSTRUCTURED}, or n:m with 0 < n < m, such as 2:4")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise bad_value("sparsity", self.sparsity, "a number in (0, 1)")
        if self.scope not in ("layer", "global"):
            raise bad_value("scope", self.scope, "layer or global")
        if self.groups is not None:
            share = 1 - self.groups[0] / self.groups[1]
            if self.sparsity is not None and abs(self.sparsity - share) > 1e-6:
                raise bad_value(
                    "sparsity", self.sparsity, f"null or {share:g}, which is what pattern={self.pattern} leaves"
                )
            if self.scope == "global":
                raise bad_value("scope", self.scope, f"layer: pattern={self.pattern} is decided within each group")
        for key in ("include", "skip"):
            check_patterns(key, getattr(self, key))

    @property
    def groups(self) -> tuple[int, int] | None:
        """``(n, m)`` of the pattern; None: unstructured or invalid."""
        found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", self.pattern)
        numbers = (int(found[1]), int(found[2])) if found else (0, 0)
        return numbers if 0 < numbers[0] < numbers[1] else None

    @property
    def asked(self) -> float:
        """The share of the weights to set to zero."""
        if self.groups is not None:
            return 1 - self.groups[0] / self.groups[1]
        return 0.5 if self.sparsity is None else self.sparsity


@dataclass(frozen=True)
class SparseReport:
    """What :func:`prune_sparse` did.

    Attributes:
        layers: Selected layers, by name.
        skipped: Conv2d and Linear layers that were not pruned, to the reason.
        params: Share of the denoiser's parameters that are in the weights of changed layers, in [0, 1].
        macs: Share of the multiply-accumulates in these layers; None if the denoiser's inputs are unknown.
        sparsity: Share of zeros in the weights of the selected layers.
        sparsity_denoiser: These zeros over all parameters of the denoiser.
        emptied: Layers whose weights are all zero; they output only their bias.
        bytes: Bytes of the denoiser's parameters and buffers.
        sparse_bytes: The same with only nonzero values stored, plus one bit per weight; see
            :func:`compress.evaluate.cost.sparsity.packed_bytes`.
    """

    layers: Mapping[str, SparseLayer]
    skipped: Mapping[str, str]
    params: float
    macs: float | None
    sparsity: float
    sparsity_denoiser: float
    emptied: list[str]
    bytes: int
    sparse_bytes: int

    def __repr__(self) -> str:
        return one_line(self, len(self.layers), zeros=self.sparsity)


def prune_sparse(denoiser: "nn.Module", config: Config = Config(), *, inputs: "Inputs | None" = None) -> SparseReport:
    """Set the weights of smallest magnitude to zero, in place and without separate masks.

    Args:
        denoiser: Any denoiser with float weights; its Conv2d and Linear layers are pruned.
        config: See :class:`Config`.
        inputs: Keyword arguments of the forward pass used to count multiply-accumulates; None: inputs at the model's
            own size, if they are known.

    Raises:
        UserError: The weights are quantized or not finite, a pattern matches no Conv2d or Linear, or no layer is
            selected. The denoiser is unchanged in this case.
    """
    import torch

    from compress.evaluate.cost.size import memory_bytes
    from compress.evaluate.cost.sparsity import packed_bytes
    from compress.models.inputs import known_inputs
    from compress.models.macs import count_macs

    if is_quantized(denoiser):
        raise UserError("the denoiser is quantized: prune its float weights, then quantize it; zeros stay zero")
    chosen, skipped = _choose(denoiser, config)
    check_finite(chosen)
    inputs = inputs or known_inputs(denoiser)
    by_layer = count_macs(denoiser, inputs).by_module if inputs else {}
    layers = {}
    with torch.no_grad():
        for name, mask in zip(chosen, _masks(chosen, config), strict=True):
            layers[name] = set_zero(chosen[name].weight, mask)
    changed = [name for name, layer in layers.items() if layer.changed]
    skipped |= {name: "already has as many zeros" for name in layers if name not in changed}
    zeros = sum(layer.zeros for layer in layers.values())
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    return SparseReport(
        layers=layers,
        skipped=skipped,
        params=sum(layers[name].weights for name in changed) / total,
        macs=sum(by_layer.get(name, 0) for name in changed) / by_layer[""] if by_layer else None,
        sparsity=zeros / sum(layer.weights for layer in layers.values()),
        sparsity_denoiser=zeros / total,
        emptied=[name for name, layer in layers.items() if layer.zeros == layer.weights],
        bytes=memory_bytes(denoiser),
        sparse_bytes=sum(packed_bytes(tensor) for tensor in (*denoiser.parameters(), *denoiser.buffers())),
    )


def check(config: Config, denoiser: "nn.Module", outline: "Outline") -> "nn.Module":
    """Reject patterns that fit no layer; returns the same denoiser, as every layer keeps its shape.

    Raises:
        UserError: See :func:`prune_sparse`.
    """
    _choose(denoiser, config)
    return denoiser


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Set weights of the pipeline's denoiser to zero in place; see :func:`prune_sparse`."""
    from compress.models import denoiser
    from compress.models.inputs import captured_inputs

    report = prune_sparse(denoiser(pipeline), config, inputs=captured_inputs(pipeline))
    layers = report.layers

    def first(key: str, reverse: bool = True) -> dict[str, float]:
        order = sorted(layers, key=lambda name: getattr(layers[name], key), reverse=reverse)
        return {name: getattr(layers[name], key) for name in order[:SHOWN]}

    return StageReport(
        coverage={
            "params": report.params,
            "macs": report.macs,
            "modules": sum(layer.changed > 0 for layer in layers.values()),
            "skipped": dict(report.skipped),
        },
        details={
            "pattern": config.pattern,
            "scope": config.scope,
            "sparsity_asked": config.asked,
            "sparsity": report.sparsity,
            "sparsity_denoiser": report.sparsity_denoiser,
            "bytes": report.bytes,
            "sparse_bytes": report.sparse_bytes,
            "most_zeros": first("sparsity"),
            "least_zeros": first("sparsity", reverse=False),
            "most_lost": first("lost"),
            "emptied": report.emptied,
            "zeros": {name: [layer.zeros, layer.weights] for name, layer in layers.items()},
        },
    )


def _choose(denoiser: "nn.Module", config: Config) -> tuple[dict[str, "nn.Module"], dict[str, str]]:
    """The selected layers, and the skipped ones with the reason; see :func:`choose_layers`."""

    def unfit(name: str, module: "nn.Module") -> str | None:
        inputs = module.weight.shape[1]  # type: ignore[index,union-attr]
        if config.groups is None or inputs % config.groups[1] == 0:
            return None
        return f"{inputs} inputs, not a multiple of {config.groups[1]}"

    return choose_layers(denoiser, config.include, config.skip, unfit)


def _masks(chosen: "Mapping[str, nn.Module]", config: Config) -> "Iterator[Tensor]":
    """For each layer, a mask that is true where the weight becomes zero."""
    weights = [module.weight for module in chosen.values()]
    if config.groups is not None:
        yield from (least_of_groups(weight, *config.groups) for weight in weights)
    elif config.scope == "global":
        yield from smallest(weights, round(config.asked * sum(weight.numel() for weight in weights)))
    else:
        yield from (smallest([weight], round(config.asked * weight.numel()))[0] for weight in weights)
