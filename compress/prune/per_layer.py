"""Per-layer width pruning: each width of a UNet is set separately, from one ranking of all channels.

No stock config can express the result, so its checkpoint contains a small model file, which stock diffusers loads with
``trust_remote_code=True`` (see :mod:`compress.models.compressed_model`).
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.data.calibration import CalibrationConfig, calibrate
from compress.errors import UserError, bad_value
from compress.models import set_denoiser
from compress.prune.channels.fit import ReconstructConfig, reconstructed
from compress.prune.channels.target import Target
from compress.prune.importance import make_scorer, needs_calibration, parse
from compress.prune.layers.report import PerLayerReport
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
    from torch import nn

    from compress.data.calibration import Calibration
    from compress.models.outline import Outline

STAGE = Stage(version=1, keeps_names=True, tag="pruned")

KINDS = ("resnet_inner", "ffn_inner", "attention", "residual")
"""Kinds of widths: inside a resnet, inside a feed-forward, of attention, and of the residual streams between layers."""

NORMALIZE = ("auto", "none", "mean", "max")
PER = ("channel", "cost")


@dataclass(frozen=True)
class Config:
    """What to prune, and by which importance.

    Attributes:
        ratio: Share of the parameters to remove, in (0, 1); the remaining share is met within 2 %. Ignored if
            ``target`` is set.
        target: Remaining share of the cost, met within 2 %.
        importance: See :class:`compress.prune.width.Config`.
        scope: The kinds of widths that may change, from :data:`KINDS`.
        normalize: What a channel's score is divided by to make layers comparable: the ``"mean"`` or the ``"max"`` of
            its group, or ``"none"``. ``"auto"``: none for scores that estimate a rise of the loss (taylor,
            diff_pruning, hessian), the mean for all others.
        per: What the summed scores of a slice are divided by: its number of channels (``"channel"``), or the ``"cost"``
            that removing it saves, in the unit of ratio or target.
        heads: What attention loses. ``"narrow"``: channels of every head; the change of the attention scale is folded
            into the query. ``"remove"``: whole heads.
        min_share: Minimum share that every width keeps, in [0, 1]. One channel of each norm group and each head (or one
            head) is always kept.
        multiple: Every new width is a multiple of this, at least 1; for narrowed heads, the width of each head. None: 8
            (for half-precision kernels) if all levels have 256 channels or more, else 1.
        calibration: Examples for importances that need them.
        reconstruct: Whether and how the remaining layers are fitted to what they gave before.
    """

    ratio: float = 0.25
    target: Target = Target()
    importance: Any = "l2"
    scope: tuple[str, ...] = KINDS
    normalize: str = "auto"
    per: str = "channel"
    heads: str = "narrow"
    min_share: float = 0.1
    multiple: int | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    reconstruct: ReconstructConfig = ReconstructConfig()

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        self.target.check_counted("per_layer")
        if not 0 < self.ratio < 1:
            raise bad_value("ratio", self.ratio, "the share of the parameters to remove, a number in (0, 1)")
        if not self.scope or not set(self.scope) <= set(KINDS):
            raise bad_value("scope", list(self.scope), f"a list of {', '.join(KINDS)}, at least one")
        for key, known in (("normalize", NORMALIZE), ("per", PER), ("heads", ("narrow", "remove"))):
            if getattr(self, key) not in known:
                raise bad_value(key, getattr(self, key), " or ".join(known))
        if not 0 <= self.min_share <= 1:
            raise bad_value("min_share", self.min_share, "a number in [0, 1]")
        if self.multiple is not None and self.multiple < 1:
            raise bad_value("multiple", self.multiple, "a whole number of at least 1, or null")
        object.__setattr__(self, "importance", parse(self.importance))

    @property
    def goal(self) -> tuple[str, float]:
        """The unit of the cost, and the share of it to keep."""
        return self.target.goal or ("params", 1 - self.ratio)


def prune_per_layer(
    unet: "UNet2DConditionModel | UNet2DModel",
    config: Config = Config(),
    *,
    calibration: "Calibration | None" = None,
    seed: int = 0,
) -> PerLayerReport:
    """Remove the least important channels of the whole UNet; layers of a level may end up with different widths.

    Channels are removed in slices, the smallest sets that keep norm groups and heads equally large: one channel of
    every norm group of a resnet's inner width, one hidden channel of a feed-forward, one channel of every head's
    queries, keys and values (or a whole head), and, of the streams between layers, as many channels of each as the
    norms over concatenations require. All slices of all widths are ranked together and removed in this order until the
    target is met.

    Args:
        unet: Any float weights; stays unchanged. Stock or shaped; its blocks must be those of Stable Diffusion (1.x,
            2.x, XL) or DDPM.
        config: See :class:`Config`.
        calibration: Examples; required if :func:`compress.prune.importance.needs_calibration` is true.
        seed: Seed of random choices.

    Raises:
        UserError: The architecture is unsupported, weights are not finite, no widths meet the target, or examples are
            missing.
    """
    from compress.models.meta import checked_weights
    from compress.prune.layers.remove import PerLayerPruner

    if calibration is None and (needs_calibration(config.importance) or config.reconstruct.examples):
        raise UserError(f"importance={config.importance.name}: examples are needed: give calibration=calibrate(...)")
    pruner = PerLayerPruner(unet, config)
    report = pruner.prune(checked_weights(unet), make_scorer(config.importance, calibration, seed))
    return report if calibration is None else reconstructed(unet, report, config.reconstruct, calibration)


def check(config: Config, denoiser: "nn.Module", outline: "Outline") -> None:
    """Reject what is impossible for any weights of this denoiser; returns nothing, as weights determine the widths.

    Raises:
        UserError: See :func:`prune_per_layer`.
    """
    from compress.prune.layers.remove import PerLayerPruner

    PerLayerPruner(_checked_class(denoiser), config)


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Replace ``pipeline.unet`` with its pruned version; see :func:`prune_per_layer`."""
    from compress.models.inputs import captured_inputs
    from compress.models.meta import checked_weights
    from compress.prune.layers.remove import PerLayerPruner

    unet = _checked_class(getattr(pipeline, "unet", None), type(pipeline).__name__)
    pruner = PerLayerPruner(unet, config, captured_inputs(pipeline))  # may raise, so before examples are encoded
    weights = checked_weights(unet)
    calibration = None
    if needs_calibration(config.importance):
        calibration = calibrate(pipeline, context.data.train, config.calibration, context.seed)
    report = pruner.prune(weights, make_scorer(config.importance, calibration, context.seed))
    if config.reconstruct.examples:
        examples = calibrate(pipeline, context.data.train, config.reconstruct.of(config.calibration), context.seed)
        report = reconstructed(unet, report, config.reconstruct, examples)
    set_denoiser(pipeline, report.unet)
    left_out = ("unet", "skipped", "widths", "outputs", "scales")
    details = {key: value for key, value in vars(report).items() if key not in left_out}
    details["widths"] = [asdict(width) for width in report.widths]
    for key in ("before", "after"):
        details[f"config_{key}"] = {
            f"{kind} channels": sum(getattr(width, key) for width in report.widths if width.kind == kind)
            for kind in config.scope
        }
    if calibration is not None:
        details["calibration"] = calibration.source
    coverage = {
        "params": report.share_params,
        "macs": report.share_macs,
        "modules": report.modules,
        "skipped": report.skipped,
    }
    return StageReport(coverage=coverage, details={"config": asdict(config), **details})


def _checked_class(denoiser: object, owner: str = "this one") -> "UNet2DConditionModel | UNet2DModel":
    from diffusers import UNet2DConditionModel, UNet2DModel

    if not isinstance(denoiser, (UNet2DConditionModel, UNet2DModel)):
        found = type(denoiser).__name__ if denoiser is not None else "no unet"
        raise UserError(
            f"prune method per_layer needs a pipeline with a UNet2DConditionModel or UNet2DModel; {owner} has {found}: "
            "prune=depth takes whole blocks of it, and without pruning the stage is left out, as by ~stages.prune"
        )
    return denoiser
