"""Depth pruning: removes whole blocks from a denoiser, starting with those that affect its prediction least.

The result is a stock model of the same class with fewer layers. BK-SDM (Kim et al. 2023, arXiv:2305.15798) introduced
the removal of blocks from Stable Diffusion's UNet, SSD-1B (Gupta et al. 2024, arXiv:2401.02677) that of transformer
layers. Both chose the blocks by hand.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from compress.data.calls import CallsConfig
from compress.errors import bad_value
from compress.prune.blocks import KINDS
from compress.runtime import check_engine_name
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from compress.data.calls import Call
    from compress.models.inputs import Inputs
    from compress.models.outline import Outline
    from compress.prune.blocks import Blocks
    from compress.prune.blocks.cost import BlockCosts
    from compress.prune.blocks.latency import BlockLatencies
    from compress.prune.blocks.subject import DepthReport, Subject

STAGE = Stage(version=2, tag="pruned")


@dataclass(frozen=True)
class DepthTarget:
    """Upper limits on the remaining cost, as shares in (0, 1), and a share of the latency; None: no limit.

    Attributes:
        params: Share of the parameters.
        macs: Share of the multiply-accumulates of one forward pass at the model's own size.
        latency: Share of the seconds of one forward pass, measured in ``engine`` and met within 5 %; alone.
        engine: ``auto`` or one of :data:`compress.runtime.ENGINES`, for ``latency``.
    """

    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        shares = self.shares()
        for key, share in shares.items():
            if not 0 < share < 1:
                raise bad_value(key, share, "the share to be left, a number in (0, 1), or null")
        if self.latency is not None and len(shares) > 1:
            raise bad_value("latency", self.latency, f"null where {next(iter(shares))} is given")
        check_engine_name(self.engine)

    def shares(self) -> dict[str, float]:
        """The limits that are set: ``params``, ``macs`` or ``latency`` to a share."""
        return {unit: share for unit, share in asdict(self).items() if unit != "engine" and share is not None}


@dataclass(frozen=True)
class Config:
    """What to remove and how much.

    Attributes:
        ratio: Minimum share of the parameters to remove, in (0, 1); ignored if ``target`` is set.
        target: Upper limits on the remaining cost; if params and macs are set, both apply.
        remove: Kinds of blocks that may be removed: ``layers`` (a resnet with its attention from a level's down block
            and one from its up block; a block of a transformer), ``attentions`` (all of a down or up block),
            ``transformer_layers`` (single layers of an attention that has several), ``mid_block`` (all of it, or all
            but one of its resnets), ``levels`` (the level of the lowest resolution).
        calibration: Denoiser calls on which effects are measured.
    """

    ratio: float = 0.25
    target: DepthTarget = field(default_factory=DepthTarget)
    remove: tuple[str, ...] = KINDS
    calibration: CallsConfig = field(default_factory=CallsConfig)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if not 0 < self.ratio < 1:
            raise bad_value("ratio", self.ratio, "a number in (0, 1)")
        if not self.remove or not set(self.remove) <= set(KINDS):
            raise bad_value("remove", list(self.remove), f"some of {', '.join(KINDS)}")

    def shares(self) -> dict[str, float]:
        """Upper limits on the remaining cost: ``params``, ``macs`` or ``latency`` to a share."""
        return self.target.shares() or {"params": 1 - self.ratio}


def prune_depth(
    denoiser: "nn.Module", calls: "Sequence[Call]", config: Config = Config(), *, inputs: "Inputs | None" = None
) -> "DepthReport":
    """Remove the blocks with the least measured effect on the prediction; returns a stock model of the same class.

    Args:
        denoiser: Any float weights; stays unchanged. A ``UNet2DConditionModel`` with Stable Diffusion's blocks (1.x,
            2.x, XL), or the transformer of PixArt, SANA, Stable Diffusion 3 or Flux.
        calls: Denoiser inputs and predictions; see :func:`compress.data.calls.record_calls`.
        config: See :class:`Config`; its ``calibration`` is not used here.
        inputs: Arguments of the forward pass that is counted or timed; None: those of the first call.

    Raises:
        UserError: The architecture is unsupported, weights are not finite, or no stock config reaches the target.
            Checked before anything is measured.
    """
    from compress.prune.blocks.subject import Subject

    subject = Subject(denoiser, inputs or calls[0].inputs)
    latencies = _latencies(subject, config, inputs or calls[0].inputs)
    return _prune(subject, calls, config, latencies)


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Replace the pipeline's denoiser with one that has fewer blocks; see :func:`prune_depth`."""
    from compress.data.calls import record_calls
    from compress.models import denoiser, set_denoiser
    from compress.models.inputs import captured_inputs
    from compress.prune.blocks.subject import Subject, stage_report
    from compress.prune.stopwatch import own_inputs

    subject = Subject(denoiser(pipeline), captured_inputs(pipeline))
    latencies = _latencies(subject, config, own_inputs(pipeline) if config.target.latency is not None else None)
    calls = record_calls(pipeline, context.data.text, config.calibration, context.seed)
    report = _prune(subject, calls, config, latencies)
    set_denoiser(pipeline, report.denoiser)
    return stage_report(report, config)


def check(config: Config, denoiser: "nn.Module", outline: "Outline") -> None:
    """Reject targets that no stock config reaches, using the architecture of a meta-device model.

    Raises:
        UserError: See :func:`prune_depth`.
    """
    from compress.models.inputs import known_inputs
    from compress.prune.blocks import read_blocks
    from compress.prune.blocks.cost import count_costs
    from compress.prune.stopwatch import check_engine

    check_engine(config.target.engine)
    blocks = read_blocks(denoiser)
    inputs = known_inputs(denoiser) if "macs" in config.shares() else None
    _check(blocks, count_costs(denoiser, blocks, inputs), config)


def check_teacher(config: Config, outline: "Outline") -> None:
    """Refuses a calibration that the pipeline cannot draw.

    Raises:
        UserError: See :func:`compress.models.call.check_steps`.
    """
    from compress.models.call import check_steps

    check_steps(outline.kind, outline.scheduler(), config.calibration.steps, "calibration.steps")


def _check(blocks: "Blocks", costs: "BlockCosts", config: Config) -> None:
    """Reject targets that no stock config reaches; the message gives the nearest reachable value."""
    from compress.prune.blocks.greedy import least_shares

    for unit, share in config.shares().items():
        if unit not in costs.by_part:
            least_shares(blocks, costs, config.remove, "params")  # raises if nothing can be removed at all
            continue
        least = least_shares(blocks, costs, config.remove, unit)[unit]
        if least <= share:
            continue
        why = f"removing all possible {', '.join(config.remove)} leaves {least:.3f} of this denoiser's {unit}"
        if unit in config.target.shares():
            raise bad_value(f"target.{unit}", share, f"at least {math.ceil(1000 * least) / 1000}: {why}")
        raise bad_value("ratio", config.ratio, f"at most {math.floor(1000 * (1 - least)) / 1000}: {why}")


def _latencies(subject: "Subject", config: Config, inputs: "Inputs | None") -> "BlockLatencies | None":
    """The latencies of blocks for a target of latency, else None; a target that cannot be met is refused."""
    if config.target.latency is None or inputs is None:
        _check(subject.blocks, subject.costs, config)
        return None
    from compress.prune.blocks.latency import BlockLatencies
    from compress.prune.stopwatch import Stopwatch

    latencies = BlockLatencies(subject, Stopwatch(subject.denoiser, inputs, config.target.engine))
    latencies.check(config.target.latency, config.remove)
    return latencies


def _prune(
    subject: "Subject", calls: "Sequence[Call]", config: Config, latencies: "BlockLatencies | None"
) -> "DepthReport":
    from compress.prune.blocks.greedy import search

    about = None
    if latencies is not None and config.target.latency is not None:
        found, about = latencies.search(calls, config.remove, config.target.latency)
    else:
        found = search(subject, calls, config.remove, config.shares())
    return replace(subject.report(found.blocks, found.removed, found.effects, found.skipped), latency=about)
