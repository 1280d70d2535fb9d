"""The block-removed architectures of BK-SDM, with the weights of the layers they keep.

Kim et al. 2023, "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", https://arxiv.org/abs/2305.15798,
section 3.1. Of the 859.5 million parameters of Stable Diffusion 1.x, they keep 579.4, 482.3 and 323.4 million.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from compress.errors import UserError
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from torch import nn

    from compress.models.inputs import Inputs
    from compress.models.outline import Outline
    from compress.prune.blocks.subject import DepthReport
    from compress.prune.blocks.unet import UNetBlocks

STAGE = Stage(version=1, tag="pruned")


@dataclass(frozen=True)
class Config:
    """Which architecture.

    Attributes:
        size: ``"base"`` keeps the first layer of each down block and the first and last layer of each up block.
            ``"small"`` also removes the mid block. ``"tiny"`` also removes the level of the lowest resolution.
    """

    size: Literal["base", "small", "tiny"] = "base"


def prune_bk_sdm(
    unet: "UNet2DConditionModel", size: Literal["base", "small", "tiny"] = "base", *, inputs: "Inputs | None" = None
) -> "DepthReport":
    """Remove the blocks that BK-SDM removes; the result is a stock UNet.

    Args:
        unet: Any float weights; stays unchanged. Must have Stable Diffusion's blocks, with any number of layers per
            level.
        size: See :class:`Config`.
        inputs: Arguments of the forward pass used to count multiply-accumulates; None: inputs at the model's own size.

    Raises:
        UserError: The architecture is unsupported, weights are not finite, a level cannot be removed, or there is
            nothing to remove.
    """
    from compress.models.inputs import example_inputs
    from compress.prune.blocks.subject import Subject
    from compress.prune.blocks.unet import UNetBlocks

    _check_class(unet)
    subject = Subject(unet, inputs or example_inputs(unet))
    assert isinstance(subject.blocks, UNetBlocks)
    left, skipped = reduced(subject.blocks, size)
    return subject.report(left, skipped=skipped)


def check(config: Config, denoiser: "nn.Module", outline: "Outline") -> "nn.Module":
    """Build the pruned denoiser on the meta device from a meta-device model.

    Raises:
        UserError: See :func:`prune_bk_sdm`.
    """
    from compress.models.meta import meta_model
    from compress.prune.blocks.unet import read_unet

    _check_class(denoiser)
    left, _ = reduced(read_unet(dict(denoiser.config)), config.size)  # type: ignore[arg-type]
    return meta_model(type(denoiser), left.config())


def _check_class(denoiser: object) -> None:
    from diffusers import UNet2DConditionModel

    if type(denoiser) is not UNet2DConditionModel:  # a subclass may have layers of other shapes
        found = type(denoiser).__name__
        raise UserError(f"BK-SDM is an architecture of UNet2DConditionModel; this denoiser is a {found}")


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Replace ``pipeline.unet`` with the BK-SDM architecture; see :func:`prune_bk_sdm`."""
    from compress.models import denoiser, set_denoiser
    from compress.models.inputs import captured_inputs
    from compress.prune.blocks.subject import stage_report

    report = prune_bk_sdm(denoiser(pipeline), config.size, inputs=captured_inputs(pipeline))
    set_denoiser(pipeline, report.denoiser)
    return stage_report(report, config)


def reduced(blocks: "UNetBlocks", size: str) -> tuple["UNetBlocks", dict[str, str]]:
    """Remove the blocks that BK-SDM removes.

    Returns:
        The remaining blocks, and a map from each part that could not be reduced to the reason.

    Raises:
        UserError: No stock config can express the result, or nothing would be removed.
    """
    left = replace(
        blocks,
        down=tuple(layers[:1] for layers in blocks.down),
        up=tuple((layers[0], layers[-1]) if len(layers) > 1 else layers for layers in blocks.up),
        mid=blocks.mid if size == "base" else (),
    )
    if size == "tiny":
        if len(blocks.down) < 2:
            raise UserError("size=tiny: this UNet has one level, which must stay")
        left = left.without_level()
    if left == blocks:
        raise UserError(f"size={size}: this UNet has nothing that BK-SDM removes: its levels have one layer each")
    if reason := left.problem():
        raise UserError(f"size={size}: no stock config can express the result for this UNet: {reason}")
    skipped = {f"layers of level {i}": "there is one" for i, layers in enumerate(blocks.down) if len(layers) < 2}
    if size != "base" and not blocks.mid:
        skipped["mid_block"] = "there is none"
    return left, skipped
