"""Width pruning inside a transformer's blocks: hidden channels of the feed-forward and heads of cross-attention.

The residual stream keeps its width. Every block loses the same number, as a stock config has one key for all blocks;
the channels and heads to remove are chosen per block by magnitude. The denoiser's family lists the config keys (see
``widths`` of :class:`compress.models.families.Family`). SANA has both keys. If the model's width determines
feed-forward and heads, use :mod:`compress.prune.depth` to remove whole blocks instead.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, bad_value
from compress.stage import Stage, StageContext, StageReport, one_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from compress.models.inputs import Inputs
    from compress.models.outline import Outline

STAGE = Stage(version=1, tag="pruned")

ALIGNED = 64  # fused kernels are fastest at multiples of this


@dataclass(frozen=True)
class Config:
    """How much to remove from every block; at least one share must be above 0.

    Attributes:
        feed_forward: Share of the hidden channels of the feed-forward to remove, in [0, 1).
        heads: Share of the heads of cross-attention to remove, in [0, 1).
        multiple: The new hidden width is a multiple of this, at least 1; None: 64 from 256 channels on, else 1.
    """

    feed_forward: float = 0.25
    heads: float = 0.0
    multiple: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        for key in ("feed_forward", "heads"):
            if not 0 <= getattr(self, key) < 1:
                raise bad_value(key, getattr(self, key), "a number in [0, 1)")
        if not self.feed_forward and not self.heads:
            raise bad_value("feed_forward", self.feed_forward, "a number in (0, 1) if heads=0, to remove something")
        if self.multiple is not None and self.multiple < 1:
            raise bad_value("multiple", self.multiple, "a whole number of at least 1, or null")


@dataclass(frozen=True)
class TransformerWidthReport:
    """A narrower transformer and what was done to get it.

    Attributes:
        transformer: The new, smaller model; the input model is unchanged.
        channels: Name of a feed-forward to the indices of its kept hidden channels, ascending.
        heads: Name of a cross-attention to the indices of its kept heads, ascending.
        config_before: Old values of the config keys that change.
        config_after: New values of the same keys.
        params_before: Number of parameters of the input model.
        params_after: Number of parameters of the new model.
        macs_before: Multiply-accumulates of one pass of the input model.
        macs_after: Multiply-accumulates of one pass of the new model.
        modules: Number of layers in the narrowed parts.
        share_params: Share of the input model's parameters in these parts, in [0, 1].
        share_macs: Share of the input model's multiply-accumulates in these parts, in [0, 1].
    """

    transformer: "nn.Module"
    channels: Mapping[str, list[int]]
    heads: Mapping[str, list[int]]
    config_before: dict[str, Any]
    config_after: dict[str, Any]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    modules: int
    share_params: float
    share_macs: float

    def __repr__(self) -> str:
        params, macs = self.params_after / self.params_before, self.macs_after / self.macs_before
        return one_line(self, self.modules, params=f"{params:.2f}x", macs=f"{macs:.2f}x")


def prune_transformer_width(
    transformer: "nn.Module", config: Config = Config(), *, inputs: "Inputs | None" = None
) -> TransformerWidthReport:
    """Remove the hidden channels and heads of smallest magnitude; the result is a stock model with a new config.

    Args:
        transformer: Any float weights; stays unchanged. Its family must have config keys for the widths to prune.
        config: See :class:`Config`.
        inputs: Arguments of the forward pass used to count multiply-accumulates; None: inputs at the model's own size.

    Raises:
        UserError: No config key sets the width, a share removes nothing or everything, or the weights are not finite
            floats.
    """
    from compress.models.inputs import example_inputs
    from compress.models.macs import count_macs
    from compress.models.meta import checked_weights, filled, meta_model

    changes = _changes(config, transformer)
    left: Any = meta_model(type(transformer), {**_settings(transformer), **changes})
    weights = {**dict(transformer.named_buffers()), **checked_weights(transformer)}
    channels, heads = {}, {}
    feed_forwards, attentions = _feed_forwards(transformer), _cross_attentions(transformer)
    for name, part in _feed_forwards(left).items() if config.feed_forward else ():
        channels[name] = _narrow_feed_forward(weights, name, part.conv_point.in_channels)
    for name, part in _cross_attentions(left).items() if config.heads else ():
        heads[name] = _remove_heads(weights, name, attentions[name].heads, part.heads)
    filled(left, lambda key: weights[key].detach().clone())
    left.train(transformer.training).requires_grad_(any(p.requires_grad for p in transformer.parameters()))

    inputs = inputs or example_inputs(transformer)
    before, after = count_macs(transformer, inputs), count_macs(left, inputs)
    touched = {name: part for name, part in {**feed_forwards, **attentions}.items() if name in {**channels, **heads}}
    params = sum(p.numel() for p in transformer.parameters())
    return TransformerWidthReport(
        transformer=left,
        channels=channels,
        heads=heads,
        config_before={key: _settings(transformer)[key] for key in changes},
        config_after=changes,
        params_before=params,
        params_after=sum(p.numel() for p in left.parameters()),
        macs_before=before.total,
        macs_after=after.total,
        modules=sum(hasattr(layer, "weight") for part in touched.values() for layer in part.modules()),
        share_params=sum(p.numel() for part in touched.values() for p in part.parameters()) / params,
        share_macs=sum(before.by_module[name] for name in touched) / before.total,
    )


def check(config: Config, denoiser: "nn.Module", outline: "Outline | None" = None) -> "nn.Module":
    """Build the pruned transformer on the meta device from a meta-device model.

    Raises:
        UserError: See :func:`prune_transformer_width`.
    """
    from compress.models.meta import meta_model

    return meta_model(type(denoiser), {**_settings(denoiser), **_changes(config, denoiser)})


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Replace the pipeline's transformer with its pruned version; see :func:`prune_transformer_width`."""
    from compress.models import denoiser, set_denoiser
    from compress.models.inputs import captured_inputs

    report = prune_transformer_width(denoiser(pipeline), config, inputs=captured_inputs(pipeline))
    set_denoiser(pipeline, report.transformer)
    left_out = ("transformer", "channels", "share_params", "share_macs")
    details = {key: value for key, value in vars(report).items() if key not in left_out}
    coverage = {"params": report.share_params, "macs": report.share_macs, "modules": report.modules, "skipped": {}}
    return StageReport(coverage=coverage, details={"config": asdict(config), **details})


def _settings(transformer: Any) -> dict[str, Any]:
    return dict(transformer.config)


def _feed_forwards(transformer: "nn.Module") -> dict[str, Any]:
    from diffusers.models.transformers.sana_transformer import GLUMBConv

    return {name: module for name, module in transformer.named_modules() if isinstance(module, GLUMBConv)}


def _cross_attentions(transformer: "nn.Module") -> dict[str, Any]:
    from diffusers.models.attention_processor import Attention

    modules = transformer.named_modules()
    return {name: module for name, module in modules if isinstance(module, Attention) and module.is_cross_attention}


def _changes(config: Config, transformer: Any) -> dict[str, Any]:
    """The config keys that change, with their new values; raises the errors of :func:`prune_transformer_width`."""
    from compress.models.families import family_of

    family, changes = family_of(transformer), {}
    widths = family.widths if family else {}
    for name in ("feed_forward", "heads"):
        share = getattr(config, name)
        if share and name not in widths:
            raise UserError(
                f"{name}={share:g}: no config key of {type(transformer).__name__} sets this width alone, so no stock "
                "model could express the result; prune=depth removes whole blocks of a transformer"
            )
    if config.feed_forward:
        conv = next(iter(_feed_forwards(transformer).values())).conv_point
        multiple = config.multiple or (ALIGNED if conv.in_channels >= 4 * ALIGNED else 1)
        hidden = _left("feed_forward", config.feed_forward, conv.in_channels, multiple, "hidden channels")
        ratio = hidden / conv.out_channels
        # The model truncates the product to an integer, and rounding may have put it just below ``hidden``.
        exact = int(ratio * conv.out_channels) == hidden
        changes[widths["feed_forward"]] = ratio if exact else math.nextafter(ratio, math.inf)
    if config.heads:
        if transformer.config.get("qk_norm") == "layer_norm_across_heads":
            raise UserError(f"heads={config.heads:g}: qk_norm=layer_norm_across_heads ties all heads; use heads=0")
        key = widths["heads"]
        changes[key] = _left("heads", config.heads, transformer.config[key], 1, "heads of cross-attention")
    return changes


def _left(key: str, share: float, size: int, multiple: int, what: str) -> int:
    """How many of ``size`` to keep: the nearest multiple.

    Raises:
        UserError: The result is 0 or ``size``.
    """
    left = multiple * round((1 - share) * size / multiple)
    if not 0 < left < size:
        raise bad_value(
            key, share, f"a share that removes and leaves some of {size} {what}, in multiples of {multiple}"
        )
    return left


def _narrow_feed_forward(weights: "dict[str, Tensor]", name: str, count: int) -> list[int]:
    """Keep the hidden channels of largest magnitude in a gated feed-forward of three convolutions.

    Hidden channel i is value i times gate i. Both are outputs of ``conv_depth``, applied to ``conv_inverted``: value i
    is channel i, and gate i is channel ``hidden + i``. The score is the product of the magnitudes of value, gate and
    reader, so it is 0 if one of them is 0.

    Args:
        weights: State dict, changed in place.
        name: Name of the feed-forward.
        count: Number of channels to keep.

    Returns:
        Indices of the kept channels, ascending.
    """
    import torch

    point = f"{name}.conv_point.weight"
    writes = _squares(weights, f"{name}.conv_depth.weight") * (
        _squares(weights, f"{name}.conv_inverted.weight") + _squares(weights, f"{name}.conv_inverted.bias")
    ) + _squares(weights, f"{name}.conv_depth.bias")
    value, gate = writes.chunk(2)
    kept = _largest(value * gate * weights[point].double().square().sum((0, 2, 3)), count)
    rows = torch.cat([kept, kept + len(value)])
    for layer in ("conv_inverted", "conv_depth"):
        _select(weights, f"{name}.{layer}", rows)
    weights[point] = weights[point][:, kept]
    return kept.tolist()


def _remove_heads(weights: "dict[str, Tensor]", name: str, heads: int, count: int) -> list[int]:
    """Keep the heads of largest magnitude in an attention; the score is value weights times output weights.

    Args:
        weights: State dict, changed in place.
        name: Name of the attention.
        heads: Number of heads.
        count: Number of heads to keep.

    Returns:
        Indices of the kept heads, ascending.
    """
    out = f"{name}.to_out.0.weight"
    reads = weights[out].double().square().sum(0)
    writes = _squares(weights, f"{name}.to_v.weight") + _squares(weights, f"{name}.to_v.bias")
    kept = _largest(reads.view(heads, -1).sum(1) * writes.view(heads, -1).sum(1), count)
    channels = kept.new_tensor(range(len(reads))).view(heads, -1)[kept].flatten()
    for side in ("q", "k"):
        norm = f"{name}.norm_{side}.weight"
        if norm in weights and len(weights[norm]) == len(reads):  # one root mean square over all heads
            energy = _squares(weights, f"{name}.to_{side}.weight") + _squares(weights, f"{name}.to_{side}.bias")
            # Corrects the mean for the removed heads, estimated from the weights; exact for heads of zeros.
            factor = (energy[channels].mean() / energy.mean()).sqrt()
            weights[norm] = (weights[norm][channels] * factor).to(weights[norm].dtype)
    for side in ("q", "k", "v"):
        _select(weights, f"{name}.to_{side}", channels)
    weights[out] = weights[out][:, channels]
    return kept.tolist()


def _squares(weights: "Mapping[str, Tensor]", key: str) -> Any:
    """Sum of squares of each row, float64; 0 if the weight does not exist."""
    return weights[key].double().square().reshape(len(weights[key]), -1).sum(1) if key in weights else 0.0


def _largest(scores: "Tensor", count: int) -> "Tensor":
    """Indices of the ``count`` largest scores, ascending; ties go to the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _select(weights: "dict[str, Tensor]", layer: str, rows: "Tensor") -> None:
    for key in (f"{layer}.weight", f"{layer}.bias"):
        if key in weights:
            weights[key] = weights[key][rows]
