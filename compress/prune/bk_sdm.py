"""The block-removed architectures of BK-SDM, with the weights of the layers they keep.

Kim et al. 2023, "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", https://arxiv.org/abs/2305.15798,
section 3.1. From Stable Diffusion 1.x they leave 579.4, 482.3 and 323.4 of 859.5 million parameters.
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
        size: ``"base"``: of every level, the first layer of its down block and the first and last of its up block.
            ``"small"``: without the mid block, too. ``"tiny"``: without the level of the lowest resolution, too.
    """

    size: Literal["base", "small", "tiny"] = "base"


def prune_bk_sdm(
    unet: "UNet2DConditionModel", size: Literal["base", "small", "tiny"] = "base", *, inputs: "Inputs | None" = None
) -> "DepthReport":
    """Remove the blocks that BK-SDM removes; the result is a stock UNet.

    Args:
        unet: Any float weights; stays unchanged. Of Stable Diffusion's blocks, with any number of layers in a level.
        size: See :class:`Config`.
        inputs: Arguments of the pass whose multiply-accumulates count; None: one at the model's own size.

    Raises:
        UserError: For blocks of an unsupported architecture, weights that are not finite, a level that cannot be
            removed, or if nothing would be.
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
    """What would be left of a denoiser without weights, also without weights.

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
    """Replace ``pipeline.unet`` by the architecture of BK-SDM; see :func:`prune_bk_sdm`."""
    from compress.models import denoiser, set_denoiser
    from compress.models.inputs import captured_inputs
    from compress.prune.blocks.subject import stage_report

    report = prune_bk_sdm(denoiser(pipeline), config.size, inputs=captured_inputs(pipeline))
    set_denoiser(pipeline, report.denoiser)
    return stage_report(report, config)


def reduced(blocks: "UNetBlocks", size: str) -> tuple["UNetBlocks", dict[str, str]]:
    """What BK-SDM leaves of a UNet's blocks.

    Returns:
        What is left, and where nothing could be removed to the reason.

    Raises:
        UserError: No stock config can express it, or nothing would be removed.
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
        raise UserError(f"size={size}: this UNet has nothing that BK-SDM removes: a level of it has one layer")
    if reason := left.problem():
        raise UserError(f"size={size}: no stock config can express that of this UNet: {reason}")
    skipped = {f"layers of level {i}": "there is one" for i, layers in enumerate(blocks.down) if len(layers) < 2}
    if size != "base" and not blocks.mid:
        skipped["mid_block"] = "there is none"
    return left, skipped
