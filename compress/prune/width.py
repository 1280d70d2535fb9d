"""Width pruning: removes channels of a ``UNet2DConditionModel`` or ``UNet2DModel``, level by level.

A stock config has one width per resolution level, so every layer of a level is pruned to the same width. The channels
to remove are chosen separately for each group of coupled channels (see :mod:`compress.prune.channels.groups`), by an
importance of :mod:`compress.prune.importance`.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.data.calibration import CalibrationConfig, calibrate
from compress.errors import UserError, bad_value
from compress.models import set_denoiser
from compress.prune.channels.fit import ReconstructConfig, reconstructed
from compress.prune.channels.report import Pruner, PruneReport
from compress.prune.channels.target import Target
from compress.prune.importance import make_scorer, needs_calibration, parse
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
    from torch import nn

    from compress.data.calibration import Calibration
    from compress.models.inputs import Inputs
    from compress.models.outline import Outline
    from compress.prune.importance.score import Scorer
    from compress.prune.sensitivity.plan import Planner

STAGE = Stage(version=4, keeps_names=True, tag="pruned")


@dataclass(frozen=True)
class SensitivityConfig:
    """How the sensitivity of levels is measured; used only with a target.

    Attributes:
        ratios: Shares of channels to remove from one level at a time, each in (0, 1).
        examples: Number of calibration examples on which the prediction error is measured, at least 1.
    """

    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    examples: int = 8

    def __post_init__(self) -> None:
        """Checks the range.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if not self.ratios or not all(0 < ratio < 1 for ratio in self.ratios):
            raise bad_value("ratios", list(self.ratios), "numbers in (0, 1), at least one")
        if self.examples < 1:
            raise bad_value("examples", self.examples, "a whole number of at least 1")


@dataclass(frozen=True)
class Config:
    """What to prune, and by which importance.

    Attributes:
        ratio: Share of the channels to remove, in (0, 1); or a list of one share in [0, 1) per resolution level, the
            level of the highest resolution first, not all of them 0. None: what the target needs, without one 0.25.
        target: Remaining share of the cost; ratios are chosen by each level's measured sensitivity. Ignored if
            ``ratio`` is set.
        importance: Selects the channels to remove: a name, or a mapping of ``name`` and its keys, see
            :mod:`compress.prune.importance`. Stored as the ``Config`` of its family.
        heads: What attention loses. ``"narrow"``: channels of every head; the change of the attention scale is folded
            into the query. ``"remove"``: whole heads. ``"auto"``: the mode whose widths are nearer to the ratio; for a
            target of latency, see :func:`compress.prune.channels.widths.fast_shape`.
        multiple: Every new width is a multiple of this, at least 1, besides norm groups and heads; None: 64 (for fused
            kernels) if all levels have 256 channels or more, else 1, and for a target of latency at least 16.
        calibration: Examples for importances that need them, and for sensitivity.
        sensitivity: How sensitivity is measured.
        reconstruct: Whether and how the remaining layers are fitted to what they gave before.
    """

    ratio: Any = None
    target: Target = Target()
    importance: Any = "l2"
    heads: str = "auto"
    multiple: int | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    reconstruct: ReconstructConfig = ReconstructConfig()

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if isinstance(self.asked, (list, tuple)):
            ok = all(_is_number(r) and 0 <= r < 1 for r in self.asked) and any(self.asked)
            expected = "numbers in [0, 1), one per level, not all 0"
        else:
            ok = _is_number(self.asked) and 0 < self.asked < 1
            expected = "a number in (0, 1), or a list of one per level"
        if not ok:
            raise bad_value("ratio", self.ratio, expected)
        if self.heads not in ("auto", "narrow", "remove"):
            raise bad_value("heads", self.heads, "auto, narrow or remove")
        if self.multiple is not None and self.multiple < 1:
            raise bad_value("multiple", self.multiple, "a whole number of at least 1, or null")
        object.__setattr__(self, "importance", parse(self.importance))

    @property
    def asked(self) -> Any:
        """The ratio to prune by where nothing is planned."""
        return 0.25 if self.ratio is None else self.ratio

    @property
    def planned(self) -> bool:
        """Whether a target decides."""
        return self.ratio is None and self.target.goal is not None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def prune_width(
    unet: "UNet2DConditionModel | UNet2DModel",
    config: Config = Config(),
    *,
    calibration: "Calibration | None" = None,
    seed: int = 0,
    inputs: "Inputs | None" = None,
) -> PruneReport:
    """Remove the least important channels; the result is a stock UNet with smaller ``block_out_channels``.

    A channel's score covers all layers that torch-pruning's dependency graph couples (DepGraph, Fang et al. 2023,
    arXiv:2301.12900). Within a group, every norm group keeps the same number of channels, and so does every attention
    head, so that each norm group and head contains channels of one old norm group or head.

    Args:
        unet: Any float weights; stays unchanged. Its blocks must be those of Stable Diffusion (1.x, 2.x, XL) or DDPM.
        config: See :class:`Config`.
        calibration: Examples; required if :func:`needs_examples` is true.
        seed: Seed of random choices.
        inputs: Arguments of the forward pass that a target counts or times; None: inputs at the UNet's own size, of one
            row.

    Raises:
        UserError: The architecture is unsupported, weights are not finite, the ratio changes no width, no widths meet
            the target, or examples are missing.
    """
    if calibration is None and needs_examples(config):
        raise UserError(f"importance={config.importance.name}: examples are needed: give calibration=calibrate(...)")
    report = _prune(unet, config, _planner(unet, config, inputs), calibration, seed)
    return report if calibration is None else reconstructed(unet, report, config.reconstruct, calibration)


def needs_examples(config: Config) -> bool:
    """Whether pruning with this config requires calibration examples."""
    return bool(needs_calibration(config.importance) or config.planned or config.reconstruct.examples)


def _planner(
    unet: "UNet2DConditionModel | UNet2DModel", config: Config, inputs: "Inputs | None" = None
) -> "Planner | None":
    """The planner of a target; None without a target. Raises UserError if no widths meet it."""
    if not config.planned:
        return None
    from compress.prune.sensitivity.plan import Planner

    return Planner(unet, config.target, *shape_options(unet, config), inputs)


def shape_options(unet: "UNet2DConditionModel | UNet2DModel", config: Config) -> tuple[str, int | None]:
    """``heads`` and ``multiple`` for a UNet: those of the config, or what kernels like for a target of latency."""
    from compress.prune.channels.widths import check_blocks, fast_shape

    if not config.planned or config.target.latency is None:
        return config.heads, config.multiple
    check_blocks(unet.config)
    return fast_shape(unet.config, config.heads, config.multiple)


def make_planner(pipeline: "DiffusionPipeline", config: Config) -> "Planner | None":
    """The planner of a pipeline's UNet; None without a target.

    Raises:
        UserError: No widths meet the target, or the engine cannot run here.
    """
    from compress.models.inputs import captured_inputs
    from compress.prune.stopwatch import own_inputs

    inputs = None
    if config.planned:
        inputs = captured_inputs(pipeline) if config.target.latency is None else own_inputs(pipeline)
    return _planner(pipeline.unet, config, inputs)


def _prune(
    unet: "UNet2DConditionModel | UNet2DModel",
    config: Config,
    planner: "Planner | None",
    calibration: "Calibration | None",
    seed: int,
) -> PruneReport:
    prune = pruner(unet, config, make_scorer(config.importance, calibration, seed))
    if planner is None:
        return prune(config.asked)
    from compress.prune.sensitivity.error import UnchangedPrediction

    assert calibration is not None
    sensitivity = config.sensitivity
    plan = planner.plan(prune, UnchangedPrediction(calibration.spread(sensitivity.examples)), sensitivity.ratios)
    return replace(prune(plan.ratios), plan=plan)


def pruner(unet: "UNet2DConditionModel | UNet2DModel", config: Config, scorer: "Scorer") -> Pruner:
    """A function from a ratio, or one per level, to the pruned UNet.

    Args:
        unet: Stays unchanged.
        config: Its ``ratio`` and ``target`` are ignored.
        scorer: Scorer of its importance.
    """
    from compress.prune.channels.rebuild import Narrower

    narrower = Narrower(unet, *shape_options(unet, config))
    return lambda ratio: narrower.prune(ratio, scorer)


def check(config: Config, denoiser: "nn.Module", outline: "Outline") -> "nn.Module | None":
    """Build the pruned denoiser on the meta device; None with a target, as examples then determine the widths.

    Raises:
        UserError: See :func:`prune_width`.
    """
    from compress.prune.channels import widths
    from compress.prune.channels.proxy import meta_model
    from compress.prune.channels.rebuild import check_fixed

    unet: Any = _checked_class(denoiser)
    widths.check_blocks(unet.config)
    if config.planned and config.target.latency is not None:
        _check_latency(unet, config)
        return None
    if _planner(unet, config) is not None:
        return None
    asked = widths.level_ratios(config.asked, list(unet.config.block_out_channels))
    changes = widths.choose_shape(unet.config, asked, config.heads, config.multiple).changes
    time_embedding_dim = unet.time_embedding.linear_1.out_features
    left = meta_model(type(unet), {**unet.config, **changes, "time_embedding_dim": time_embedding_dim})
    check_fixed(unet, left)
    return left


def _check_latency(unet: "UNet2DConditionModel | UNet2DModel", config: Config) -> None:
    """Checks what can be known of a target of latency before weights are loaded, which is nothing of seconds."""
    from compress.prune.channels.latency import narrower_choices
    from compress.prune.stopwatch import check_engine

    check_engine(config.target.engine)
    narrower_choices(unet, *shape_options(unet, config))


def _checked_class(denoiser: object, owner: str = "this one") -> "UNet2DConditionModel | UNet2DModel":
    from diffusers import UNet2DConditionModel, UNet2DModel

    if not isinstance(denoiser, (UNet2DConditionModel, UNet2DModel)):
        found = type(denoiser).__name__ if denoiser is not None else "no unet"
        raise UserError(
            f"prune method width needs a pipeline with a UNet2DConditionModel or UNet2DModel; {owner} has {found}: "
            "prune=depth takes whole blocks of it, and without pruning the stage is left out, as by ~stages.prune"
        )
    return denoiser


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Replace ``pipeline.unet`` with its pruned version; see :func:`prune_width`."""
    unet = _checked_class(getattr(pipeline, "unet", None), type(pipeline).__name__)
    planner = make_planner(pipeline, config)  # may raise, so before examples are encoded
    calibration = None
    if needs_calibration(config.importance) or planner is not None:
        calibration = calibrate(pipeline, context.data.train, config.calibration, context.seed)
    report = _prune(unet, config, planner, calibration, context.seed)
    if config.reconstruct.examples:
        examples = calibrate(pipeline, context.data.train, config.reconstruct.of(config.calibration), context.seed)
        report = reconstructed(unet, report, config.reconstruct, examples)
    set_denoiser(pipeline, report.unet)
    left_out = ("unet", "skipped", "plan", "outputs", "scales")
    details = {key: value for key, value in vars(report).items() if key not in left_out}
    details["plan"] = asdict(report.plan) if report.plan else None
    coverage = {
        "params": report.share_params,
        "macs": report.share_macs,
        "modules": report.modules,
        "skipped": report.skipped,
    }
    if calibration is not None:
        details["calibration"] = calibration.source
    return StageReport(coverage=coverage, details={"config": asdict(config), **details})
