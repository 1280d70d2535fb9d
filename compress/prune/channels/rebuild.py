"""Prunes the groups of a UNet and builds the result as a stock model."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.inputs import Inputs, example_inputs
from compress.models.macs import count_macs
from compress.models.meta import checked_weights
from compress.prune.channels import groups as channels
from compress.prune.channels import time_embedding, widths
from compress.prune.channels.groups import Axis
from compress.prune.channels.proxy import UNet, add_shortcuts, meta_model
from compress.prune.channels.report import PruneReport
from compress.prune.importance.score import Scorer

# Extra embeddings and text projections do not affect the levels' widths; without them, the same inputs fit every UNet.
PLAIN = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "class_embeddings_concat": False,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
}


def prune_unet(
    unet: UNet, ratio: float | list[float], scorer: Scorer, heads: str = "auto", multiple: int | None = None
) -> PruneReport:
    """See :func:`compress.prune.width.prune_width`."""
    return Narrower(unet, heads, multiple).prune(ratio, scorer)


class Narrower:
    """Prunes a UNet to any ratios; results that do not depend on the ratios are cached.

    Args:
        unet: Stays unchanged; its weights must not change while this object is used.
        heads: See :class:`compress.prune.width.Config`.
        multiple: See :class:`compress.prune.width.Config`.

    Raises:
        UserError: Its blocks are of an unsupported architecture.
    """

    def __init__(self, unet: UNet, heads: str = "auto", multiple: int | None = None) -> None:
        self.unet, self.config, self.heads, self.multiple = unet, dict(unet.config), heads, multiple
        widths.check_blocks(self.config)
        self.widths = [int(width) for width in self.config["block_out_channels"]]
        self._found: dict[tuple[str, tuple[str, ...]], tuple[UNet, list[channels.Group]]] = {}

    def prune(self, ratio: float | list[float], scorer: Scorer) -> PruneReport:
        """The UNet with fewer channels.

        Args:
            ratio: Share of the channels to remove, or one share per level.
            scorer: Scores the channels of a group.

        Raises:
            UserError: The current widths are the possible ones nearest to the ratio, or the weights do not match the
                config or are not finite floats.
        """
        asked = widths.level_ratios(ratio, self.widths)
        shape = widths.choose_shape(self.config, asked, self.heads, self.multiple)
        weights = dict(self._weights)
        time_embedding_dim = self.unet.time_embedding.linear_1.out_features
        pruned = meta_model(type(self.unet), {**self.config, **shape.changes, "time_embedding_dim": time_embedding_dim})
        narrower = shape.widths[0] != self.widths[0]
        sinusoids = time_embedding.sinusoids(self.unet, pruned) if narrower else None
        plain, groups = self._coupled(pruned, shape.heads)
        _add_identities(plain, weights)
        keep = _choose(groups, plain, pruned, weights, scorer)
        narrow(weights, keep)
        scales = _query_scales(plain, pruned)
        for name, scale in scales.items():
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in weights:
                    weights[key] = weights[key] * scale
        touched = {name for (name, _), mask in keep.items() if not mask.all()}
        residual = 0.0
        if sinusoids:
            fitted, residual = time_embedding.refit(self.unet.time_embedding, *sinusoids)
            weights.update({f"time_embedding.{key}": value for key, value in fitted.state_dict().items()})
            touched.update({"time_embedding.linear_1", "time_embedding.linear_2"})
        _load(pruned, weights, self._weights)
        pruned.train(self.unet.training).requires_grad_(any(p.requires_grad for p in self.unet.parameters()))

        layers = {name: module for name, module in self.unet.named_modules() if name in touched}
        params = sum(p.numel() for p in self.unet.parameters())
        return PruneReport(
            unet=pruned,
            kept=kept_outputs(pruned, keep),
            kept_inside=kept_inside(pruned, keep),
            widths_before=self.widths,
            widths_after=shape.widths,
            ratios_asked=asked,
            ratios_achieved=[1 - new / old for new, old in zip(shape.widths, self.widths, strict=True)],
            heads=shape.heads,
            multiple=shape.multiple,
            params_before=params,
            params_after=sum(p.numel() for p in pruned.parameters()),
            modules=len(layers),
            share_params=sum(p.numel() for layer in layers.values() for p in layer.parameters()) / params,
            share_macs=share_of_macs(plain, self._macs, touched),
            norms_regrouped=regrouped(plain, keep),
            time_residual=residual,
            skipped={
                f"level {i}": f"stays {old} channels wide: the nearest width divisible by norm groups and heads"
                for i, (old, new, ratio) in enumerate(zip(self.widths, shape.widths, asked, strict=True))
                if ratio and old == new
            },
            outputs={name: mask.nonzero()[:, 0] for (name, side), mask in keep.items() if side == "out"},
            scales=scales,
        )

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return checked_weights(self.unet)

    @cached_property
    def _macs(self) -> Mapping[str, float]:
        plain, inputs = plain_unet(type(self.unet), self.config)
        return count_macs(plain, inputs).by_module

    def _coupled(self, pruned: UNet, heads: str) -> tuple[UNet, list[channels.Group]]:
        """A meta-device UNet with the shortcuts of the pruned one, and its groups of channels."""
        plain, inputs = plain_unet(type(self.unet), self.config)
        own = {name for name, _ in plain.named_modules()}
        add_shortcuts(plain, like=pruned)
        added = tuple(name for name, _ in plain.named_modules() if name not in own)
        if (heads, added) not in self._found:
            self._found[heads, added] = plain, channels.find_groups(plain, inputs, heads)
        return self._found[heads, added]


def plain_unet(cls: type[UNet], config: Mapping[str, Any]) -> tuple[UNet, Inputs]:
    """A meta-device UNet with the same levels and without extra embeddings, and inputs for it."""
    plain = {**config, **{key: value for key, value in PLAIN.items() if key in config}}
    if issubclass(cls, UNet2DConditionModel):
        text = config["cross_attention_dim"]
        plain["cross_attention_dim"] = text[0] if isinstance(text, (list, tuple)) else text or 1
    unet = meta_model(cls, plain)
    return unet, {**example_inputs(unet), "return_dict": False}


def _add_identities(plain: UNet, weights: dict[str, Tensor]) -> None:
    """Add identity weights for the added shortcuts."""
    for name, _ in plain.named_modules():
        if name.endswith(".conv_shortcut") and f"{name}.weight" not in weights:
            ones = torch.ones_like(weights[f"{name.rpartition('.')[0]}.conv1.bias"])
            weights[f"{name}.weight"] = ones.diag()[:, :, None, None]
            weights[f"{name}.bias"] = torch.zeros_like(ones)


def _choose(
    groups: list[channels.Group], plain: nn.Module, pruned: nn.Module, weights: dict[str, Tensor], scorer: Scorer
) -> dict[Axis, Tensor]:
    """Masks of the kept channels, by layer and axis."""
    keep: dict[Axis, Tensor] = {}
    for group in groups:
        # All channels of the first member's layer belong to the group.
        count = channels.axis_size(pruned, group.members[0].axis)
        if count == group.size:
            continue
        mark(keep, group, channels.choose(group, scorer(group, weights), count), plain)
    return keep


def mark(keep: dict[Axis, Tensor], group: channels.Group, mask: Tensor, unet: nn.Module) -> None:
    """Apply a group's mask of kept channels, shape ``(size,)``, to the masks of its layers."""
    for member in [*group.members, *group.followers]:
        axis = keep.setdefault(member.axis, torch.ones(channels.axis_size(unet, member.axis), dtype=torch.bool))
        axis[member.index] = mask[member.root]


def narrow(weights: dict[str, Tensor], keep: dict[Axis, Tensor]) -> None:
    """Remove the channels that are not kept from a state dict, in place."""
    for (name, side), mask in keep.items():
        keys = [f"{name}.weight", f"{name}.bias"] if side == "out" else [f"{name}.weight"]
        for key in keys:
            if key in weights:
                index = mask.nonzero()[:, 0].to(weights[key].device)
                weights[key] = weights[key].index_select(0 if side == "out" else 1, index)


def _query_scales(plain: UNet, pruned: UNet) -> dict[str, float]:
    """Factors of the queries of narrowed heads: attention divides by the square root of the head's smaller width."""
    scales = {}
    for name, module in plain.named_modules():
        if isinstance(module, Attention):
            narrower = pruned.get_submodule(name)
            old, new = module.inner_dim // module.heads, narrower.inner_dim // narrower.heads
            if new != old:
                scales[f"{name}.to_q"] = math.sqrt(new / old)
    return scales


def check_fixed(unet: UNet, pruned: UNet) -> None:
    """Reject widths that would change a layer outside the levels, whose channels cannot be chosen.

    Args:
        unet: The UNet to prune; may be on the meta device.
        pruned: A UNet with the new config; may be on the meta device.

    Raises:
        UserError: Names the weight.
    """
    levels = plain_unet(type(unet), unet.config)[0].state_dict()
    _check_shapes(pruned, {name: tensor for name, tensor in unet.state_dict().items() if name not in levels})


def _check_shapes(pruned: UNet, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in pruned.state_dict().items():
        if name in weights and weights[name].shape != tensor.shape:
            raise UserError(
                f"this UNet cannot be pruned to these widths: {name} would need shape {tuple(tensor.shape)} but has "
                f"{tuple(weights[name].shape)}; do not prune its level (a ratio of 0 in the list)"
            )


def _load(pruned: UNet, weights: dict[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Load the weights into the pruned UNet; copies those that are shared with the input model."""
    _check_shapes(pruned, weights)
    shared = {name for name, tensor in given.items() if weights[name] is tensor}
    own = {name: tensor.clone() if name in shared else tensor for name, tensor in weights.items()}
    pruned.load_state_dict(own, strict=True, assign=True)


def kept_outputs(unet: UNet, keep: dict[Axis, Tensor]) -> dict[str, list[int]]:
    """Indices of the kept output channels of each down, mid and up block."""
    blocks = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    blocks += ["mid_block"] if unet.mid_block is not None else []
    blocks += [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
    kept = {}
    for name in blocks:
        block = unet.get_submodule(name)
        samplers = next((s for s in ("downsamplers", "upsamplers") if getattr(block, s, None) is not None), None)
        layer = f"{name}.{samplers}.0.conv" if samplers else f"{name}.resnets.{len(block.resnets) - 1}.conv2"
        kept[name] = _kept(unet, keep, layer)
    return kept


def kept_inside(unet: UNet, keep: dict[Axis, Tensor]) -> dict[str, list[int]]:
    """Indices of the kept channels between the first and last layer of each attention block."""
    names = [name for name, module in unet.named_modules() if isinstance(module, Transformer2DModel)]
    return {name: _kept(unet, keep, f"{name}.proj_in") for name in names}


def _kept(unet: UNet, keep: dict[Axis, Tensor], layer: str) -> list[int]:
    """Indices of the kept output channels of a layer."""
    mask = keep.get((layer, "out"), torch.ones(channels.axis_size(unet, (layer, "out"))))
    return mask.nonzero()[:, 0].tolist()


def regrouped(plain: nn.Module, keep: dict[Axis, Tensor]) -> list[str]:
    """Norms in which a new group contains channels of another old group."""
    names = []
    for (name, _), mask in keep.items():
        norm = plain.get_submodule(name)
        if isinstance(norm, nn.GroupNorm):
            old = mask.nonzero()[:, 0] // (norm.num_channels // norm.num_groups)
            if not (old.view(norm.num_groups, -1) == torch.arange(norm.num_groups)[:, None]).all():
                names.append(name)
    return names


def share_of_macs(plain: nn.Module, macs: Mapping[str, float], touched: set[str]) -> float:
    """Share of the multiply-accumulates in the touched layers, and in attentions whose queries are touched."""
    total = sum(macs.get(name, 0) for name in touched)
    for name, module in plain.named_modules():
        if isinstance(module, Attention) and f"{name}.to_q" in touched:
            total += attention_macs(name, module, macs)
    return total / macs[""]


def attention_macs(name: str, attention: nn.Module, macs: Mapping[str, float]) -> float:
    """Multiply-accumulates of queries with keys and of scores with values, which belong to no layer."""
    return macs[name] - sum(macs.get(f"{name}.{part}", 0) for part, _ in attention.named_modules() if part)
