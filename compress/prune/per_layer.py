"""Per-layer-width width pruning: every part of a UNet gets a width of its own, from one ranking of all channels.

No stock config can express the result: its checkpoint carries a small model file, which stock diffusers loads with
``trust_remote_code=True`` (see :mod:`compress.models.shaped_unet`).
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.data.calibration import CalibrationConfig, calibrate
from compress.errors import UserError, bad_value
from compress.models import set_denoiser
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
"""Of widths: inside a resnet, inside a feed-forward, of attention, and of the streams between layers."""

NORMALIZE = ("auto", "none", "mean", "max")
PER = ("channel", "cost")


@dataclass(frozen=True)
class Config:
    """What to prune and by which measure.

    Attributes:
        ratio: Share of the parameters to remove, in (0, 1), met within 2 % of what is left. Counts where ``target``
            gives nothing.
        target: How much is to be left, met within 2 %.
        importance: See :class:`compress.prune.width.Config`.
        scope: The kinds of widths that may change, of :data:`KINDS`.
        normalize: What a channel's score is divided by, so that scores of different layers compare: the ``"mean"`` or
            the ``"max"`` of its group, or ``"none"``. ``"auto"``: none for scores that are a loss's rise (taylor,
            diff_pruning, hessian), the mean for all others.
        per: What the sum of the scores that leave together is divided by: their number (``"channel"``), or the
            ``"cost"`` that goes with them, in the unit that ratio or target count.
        heads: What attention gives up: ``"narrow"``: channels of every head, with the ratio of their scales folded into
            the query. ``"remove"``: whole heads.
        min_share: Share of itself that every width keeps at least, in [0, 1]; one channel of each norm group and each
            head (or one head) stays in any case.
        multiple: What every new width is a multiple of, at least 1, of narrowed heads each of them; None: 8 where all
            levels have 256 channels or more, as half-precision kernels want it, else 1.
        calibration: Examples for an importance that looks at what the UNet does with them.
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

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
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
        """What is counted, and the share of it that is to be left."""
        return self.target.goal or ("params", 1 - self.ratio)


def prune_per_layer(
    unet: "UNet2DConditionModel | UNet2DModel",
    config: Config = Config(),
    *,
    calibration: "Calibration | None" = None,
    seed: int = 0,
) -> PerLayerReport:
    """Remove the channels that matter least anywhere; the result is a UNet with shapes of its own.

    What leaves at once is the smallest slice that keeps norm groups and heads whole: one channel of every norm group
    of a resnet's inner width, one of a feed-forward's hidden channels, one channel of every head's queries, keys and
    values (or a whole head), and of the streams between the layers as many of each as keep the norms over
    concatenations whole. All slices of all widths stand in one ranking, and leave in its order until the target is met.

    Args:
        unet: Any float weights; stays unchanged. Stock or shaped; its blocks must be those of Stable Diffusion (1.x,
            2.x, XL), or of DDPM.
        config: See :class:`Config`.
        calibration: Examples, where :func:`compress.prune.importance.needs_calibration` says that they are needed.
        seed: Of what is drawn.

    Raises:
        UserError: For blocks of an unsupported architecture, weights that are not finite, a target that no widths meet,
            or examples that are missing.
    """
    from compress.models.meta import checked_weights
    from compress.prune.layers.remove import PerLayerPruner

    if calibration is None and needs_calibration(config.importance):
        raise UserError(f"importance={config.importance.name}: examples are needed: give calibration=calibrate(...)")
    pruner = PerLayerPruner(unet, config)
    return pruner.prune(checked_weights(unet), make_scorer(config.importance, calibration, seed))


def check(config: Config, denoiser: "nn.Module", outline: "Outline") -> None:
    """Refuses what cannot be done with a denoiser, whatever its weights are; what would be left of it they decide.

    Raises:
        UserError: See :func:`prune_per_layer`.
    """
    from compress.prune.layers.remove import PerLayerPruner

    PerLayerPruner(_checked_class(denoiser), config)


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Replace ``pipeline.unet`` by its pruned version; see :func:`prune_per_layer`."""
    from compress.models.inputs import captured_inputs
    from compress.models.meta import checked_weights
    from compress.prune.layers.remove import PerLayerPruner

    unet = _checked_class(getattr(pipeline, "unet", None), type(pipeline).__name__)
    pruner = PerLayerPruner(unet, config, captured_inputs(pipeline))  # before examples are encoded: it may refuse
    weights = checked_weights(unet)
    calibration = None
    if needs_calibration(config.importance):
        calibration = calibrate(pipeline, context.data.train, config.calibration, context.seed)
    report = pruner.prune(weights, make_scorer(config.importance, calibration, context.seed))
    set_denoiser(pipeline, report.unet)
    details = {key: value for key, value in vars(report).items() if key not in ("unet", "skipped", "widths")}
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
            f"prune method per_layer needs a pipeline with a UNet2DConditionModel or UNet2DModel; {owner} has {found}"
        )
    return denoiser
