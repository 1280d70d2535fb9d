"""A denoiser with its blocks and their costs, and the report of a removal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from compress.models.inputs import Inputs
from compress.models.meta import checked_weights
from compress.prune.blocks import Blocks, read_blocks
from compress.prune.blocks.assemble import assemble
from compress.prune.blocks.cost import count_costs
from compress.prune.stopwatch import MeasuredLatency
from compress.stage import StageReport, one_line


@dataclass(frozen=True)
class DepthReport:
    """A denoiser with fewer blocks and what was done to get it.

    Attributes:
        denoiser: The new, smaller model; the input model is unchanged.
        config_before: Old values of the config keys that change.
        config_after: New values of the same keys.
        params_before: Number of parameters of the input model.
        params_after: Number of parameters of the new model.
        macs_before: Multiply-accumulates of one pass of the input model.
        macs_after: Multiply-accumulates of one pass of the new model.
        modules: Number of removed layers with weights.
        blocks: Blocks and layers of the new model to those of the input model; None if another layer now produces a
            block's output.
        removed: Steps in order: ``name`` of the removed blocks, then ``error`` (relative error of the prediction),
            ``params`` and ``macs`` of the remaining model. Empty if nothing was measured.
        effects: Candidate to the relative error of the prediction without it alone. Empty if nothing was measured.
        skipped: Requested blocks that could not be removed to the reason.
        latency: What was measured for a target of latency; None for others.
    """

    denoiser: nn.Module
    config_before: dict[str, Any]
    config_after: dict[str, Any]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    modules: int
    blocks: dict[str, str | None]
    removed: list[dict[str, Any]] = field(default_factory=list)
    effects: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    latency: MeasuredLatency | None = None

    def __repr__(self) -> str:
        params, macs = self.params_after / self.params_before, self.macs_after / self.macs_before
        return one_line(self, self.modules, params=f"{params:.2f}x", macs=f"{macs:.2f}x")


class Subject:
    """A denoiser to remove blocks from.

    Args:
        denoiser: With float weights; stays unchanged.
        inputs: Arguments of the forward pass used to count multiply-accumulates.

    Raises:
        UserError: The architecture is unsupported, or the weights are not finite floats.
    """

    def __init__(self, denoiser: Any, inputs: Inputs) -> None:
        self.denoiser = denoiser
        self.model_class = type(denoiser)
        self.blocks = read_blocks(denoiser)
        self.weights = {**dict(denoiser.named_buffers()), **checked_weights(denoiser)}
        self.costs = count_costs(denoiser, self.blocks, inputs)

    def report(
        self,
        left: Blocks,
        removed: Sequence[Any] = (),
        effects: Mapping[str, float] | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> DepthReport:
        """Build the smaller model, with copied weights, and its report.

        Args:
            left: Remaining blocks.
            removed: The steps, as dataclasses.
            effects: See :class:`DepthReport`.
            skipped: See :class:`DepthReport`.
        """
        model = assemble(self.model_class, left, self.weights)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        model.train(self.denoiser.training).requires_grad_(any(p.requires_grad for p in self.denoiser.parameters()))
        before, after = self.costs.of(self.blocks), self.costs.of(left)
        old, new = self.blocks.config(), left.config()
        changed = [key for key in new if new[key] != old[key]]
        return DepthReport(
            denoiser=model,
            config_before={key: old[key] for key in changed},
            config_after={key: new[key] for key in changed},
            params_before=before["params"],
            params_after=after["params"],
            macs_before=before["macs"],
            macs_after=after["macs"],
            modules=_layers(self.denoiser) - _layers(model),
            blocks={**left.names(), **left.outputs()},
            removed=[asdict(step) for step in removed],
            effects=dict(effects or {}),
            skipped=dict(skipped or {}),
        )


def stage_report(report: DepthReport, config: Any) -> StageReport:
    """The stage's report; its coverage is the removed share."""
    details = {key: value for key, value in vars(report).items() if key not in ("denoiser", "skipped", "latency")}
    if report.latency is not None:
        details["latency"] = asdict(report.latency)
    coverage = {
        "params": 1 - report.params_after / report.params_before,
        "macs": 1 - report.macs_after / report.macs_before,
        "modules": report.modules,
        "skipped": report.skipped,
    }
    return StageReport(coverage=coverage, details={"config": asdict(config), **details})


def _layers(model: nn.Module) -> int:
    return sum(any(True for _ in module.parameters(recurse=False)) for module in model.modules())
