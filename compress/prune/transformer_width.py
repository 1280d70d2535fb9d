"""Width pruning inside of a transformer's blocks: hidden channels of the feed-forward and heads of cross-attention.

What the blocks add to keeps its width, and every block loses as many, as a stock config has one key for all blocks;
*which* ones go is chosen for each block by magnitude. The family of a denoiser says which keys there are (see
``widths`` of :class:`compress.models.families.Family`). SANA has both; where feed-forward and heads follow from the
width of the model, whole blocks can go instead (:mod:`compress.prune.depth`).
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

ALIGNED = 64  # what fused kernels want a width to be a multiple of


@dataclass(frozen=True)
class Config:
    """How much goes from every block; not both shares 0.

    Attributes:
        feed_forward: Share of the hidden channels of the feed-forward to remove, in [0, 1).
        heads: Share of the heads of cross-attention to remove, in [0, 1).
        multiple: What the new hidden width is a multiple of, at least 1; None: 64 from 256 channels on, else 1.
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
            raise bad_value("feed_forward", self.feed_forward, "a number in (0, 1) where heads=0: nothing would go")
        if self.multiple is not None and self.multiple < 1:
            raise bad_value("multiple", self.multiple, "a whole number of at least 1, or null")


@dataclass(frozen=True)
class TransformerWidthReport:
    """A narrower transformer and what was done to get it.

    Attributes:
        transformer: The new, smaller model; the one given is left as it was.
        channels: Feed-forward to the indices of its hidden channels that are left, ascending.
        heads: Cross-attention to the indices of its heads that are left, ascending.
        config_before: What differs between the configs, before.
        config_after: The same, after.
        params_before: Number of parameters of the model given.
        params_after: Number of parameters of the new one.
        macs_before: Multiply-accumulates of a pass of the model given.
        macs_after: Multiply-accumulates of a pass of the new one.
        modules: Number of layers in the parts that became narrower.
        share_params: Share of the old parameters that sit in these parts, in [0, 1].
        share_macs: Share of the old multiply-accumulates done there.
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
    """Remove the hidden channels and heads of least magnitude; the result is a stock model with another config.

    Args:
        transformer: Any float weights; stays unchanged. Of a family with config keys for what is to be removed.
        config: See :class:`Config`.
        inputs: Arguments of the pass whose multiply-accumulates count; None: one at the model's own size.

    Raises:
        UserError: No config key can express it, the shares leave nothing or everything, or the weights are not finite
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
    """What would be left of a meta-device model, also on the meta device.

    Raises:
        UserError: See :func:`prune_transformer_width`.
    """
    from compress.models.meta import meta_model

    return meta_model(type(denoiser), {**_settings(denoiser), **_changes(config, denoiser)})


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Replace the pipeline's transformer by its narrower version; see :func:`prune_transformer_width`."""
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
    """The config keys that change, with their new values.

    Raises:
        UserError: See :func:`prune_transformer_width`.
    """
    from compress.models.families import family_of

    family, changes = family_of(transformer), {}
    widths = family.widths if family else {}
    for name in ("feed_forward", "heads"):
        share = getattr(config, name)
        if share and name not in widths:
            raise UserError(
                f"{name}={share:g}: no config key of {type(transformer).__name__} sets this width alone, so that no "
                "stock model could hold the result; prune=depth removes whole blocks of a transformer"
            )
    if config.feed_forward:
        conv = next(iter(_feed_forwards(transformer).values())).conv_point
        multiple = config.multiple or (ALIGNED if conv.in_channels >= 4 * ALIGNED else 1)
        hidden = _left("feed_forward", config.feed_forward, conv.in_channels, multiple, "hidden channels")
        ratio = hidden / conv.out_channels
        # The model takes the whole part of the product, which rounding may have put just below.
        exact = int(ratio * conv.out_channels) == hidden
        changes[widths["feed_forward"]] = ratio if exact else math.nextafter(ratio, math.inf)
    if config.heads:
        if transformer.config.get("qk_norm") == "layer_norm_across_heads":
            raise UserError(f"heads={config.heads:g}: qk_norm=layer_norm_across_heads ties all heads; use heads=0")
        key = widths["heads"]
        changes[key] = _left("heads", config.heads, transformer.config[key], 1, "heads of cross-attention")
    return changes


def _left(key: str, share: float, size: int, multiple: int, what: str) -> int:
    """How many of ``size`` are left: the nearest multiple.

    Raises:
        UserError: None, or all.
    """
    left = multiple * round((1 - share) * size / multiple)
    if not 0 < left < size:
        raise bad_value(
            key, share, f"a share that removes and leaves some of {size} {what}, in multiples of {multiple}"
        )
    return left


def _narrow_feed_forward(weights: "dict[str, Tensor]", name: str, count: int) -> list[int]:
    """Keeps the hidden channels of largest magnitude of a gated feed-forward of three convolutions.

    Hidden channel i is value i times gate i, and both come from ``conv_depth`` of ``conv_inverted``: value i is
    channel i there and gate i is channel ``hidden + i``. Its magnitude is that of value times gate times reader, so
    that it is 0 if one of them is.

    Args:
        weights: State dict; the feed-forward's become narrower.
        name: Of the feed-forward.
        count: How many are left.

    Returns:
        Their indices, ascending.
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
    """Keeps the heads of largest magnitude of an attention: what writes their values times what reads them.

    Args:
        weights: State dict; the attention's become narrower.
        name: Of the attention.
        heads: How many it has.
        count: How many are left.

    Returns:
        Their indices, ascending.
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
            # Undoes what the removed heads' absence changes in it, as far as weights tell: exact for heads of zeros.
            factor = (energy[channels].mean() / energy.mean()).sqrt()
            weights[norm] = (weights[norm][channels] * factor).to(weights[norm].dtype)
    for side in ("q", "k", "v"):
        _select(weights, f"{name}.to_{side}", channels)
    weights[out] = weights[out][:, channels]
    return kept.tolist()


def _squares(weights: "Mapping[str, Tensor]", key: str) -> Any:
    """Sum of squares of each row, float64; 0 where there is no such weight."""
    return weights[key].double().square().reshape(len(weights[key]), -1).sum(1) if key in weights else 0.0


def _largest(scores: "Tensor", count: int) -> "Tensor":
    """Indices of the largest, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _select(weights: "dict[str, Tensor]", layer: str, rows: "Tensor") -> None:
    for key in (f"{layer}.weight", f"{layer}.bias"):
        if key in weights:
            weights[key] = weights[key][rows]
