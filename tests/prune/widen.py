"""Give every channel of a UNet a twin: a wider model of the same function whose superfluous channels are known."""

import math

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

UNet = UNet2DConditionModel | UNet2DModel


class Layout:
    """Which channel of the small model each channel of the wide one is, and whether it is the original or the twin."""

    def __init__(self, source: Tensor, original: Tensor) -> None:
        self.source, self.original = source, original

    @classmethod
    def plain(cls, size: int) -> "Layout":
        return cls(torch.arange(size), torch.ones(size, dtype=torch.bool))

    @classmethod
    def twins(cls, size: int) -> "Layout":
        first = torch.rand(size) < 0.5
        return cls(torch.arange(size).repeat_interleave(2), torch.stack([first, ~first], 1).flatten())

    @classmethod
    def twin_heads(cls, size: int, head: int) -> "Layout":
        heads = cls.twins(size // head)
        inside = torch.arange(head)
        return cls((heads.source[:, None] * head + inside).flatten(), heads.original.repeat_interleave(head))

    def __add__(self, other: "Layout") -> "Layout":
        source = torch.cat([self.source, other.source + int(self.source.max()) + 1])
        return Layout(source, torch.cat([self.original, other.original]))

    @property
    def kept(self) -> list[int]:
        return self.original.nonzero()[:, 0].tolist()


class Widener:
    """Walks both models in the order of the forward pass; written without any dependency graph."""

    def __init__(self, small: UNet, wide: UNet, heads: str) -> None:
        self.small, self.wide, self.heads = small, wide, heads
        self.outputs: dict[str, list[int]] = {}

    def twins(self, name: str, size: int) -> Layout:
        """What becomes of the channels that a layer of the small model gives."""
        return Layout.twins(size)

    def scores_and_values(self, name: str, size: int, heads: int) -> tuple[Layout, Layout]:
        """The same for queries and keys of an attention, and for its values."""
        if self.heads == "remove":
            layout = Layout.twin_heads(size, size // heads)
            return layout, layout
        return Layout.twins(size), Layout.twins(size)

    def side_by_side(self, x: Layout, skip: Layout) -> Layout:
        return x + skip

    @torch.no_grad()
    def layer(self, name: str, into: Layout, out: Layout) -> None:
        small, wide = self.small.get_submodule(name), self.wide.get_submodule(name)
        weight = small.weight[out.source][:, into.source]
        mask = into.original.view(1, -1, *[1] * (weight.ndim - 2))
        wide.weight.copy_(weight * mask)
        if small.bias is not None:
            wide.bias.copy_(small.bias[out.source])

    @torch.no_grad()
    def norm(self, name: str, layout: Layout) -> None:
        small, wide = self.small.get_submodule(name), self.wide.get_submodule(name)
        wide.weight.copy_(small.weight[layout.source])
        wide.bias.copy_(small.bias[layout.source])

    def resnet(self, name: str, x: Layout) -> Layout:
        module = self.small.get_submodule(name)
        inner = self.twins(f"{name}.conv1", module.out_channels)
        out = x if module.conv_shortcut is None else self.twins(f"{name}.conv2", module.out_channels)
        self.norm(f"{name}.norm1", x)
        self.layer(f"{name}.conv1", x, inner)
        self.layer(f"{name}.time_emb_proj", Layout.plain(module.time_emb_proj.in_features), inner)
        self.norm(f"{name}.norm2", inner)
        self.layer(f"{name}.conv2", inner, out)
        if module.conv_shortcut is not None:
            self.layer(f"{name}.conv_shortcut", x, out)
        return out

    @torch.no_grad()
    def attention(self, name: str, x: Layout, context: Layout) -> None:
        small, wide = self.small.get_submodule(name), self.wide.get_submodule(name)
        size = small.to_q.out_features
        scores, values = self.scores_and_values(name, size, small.heads)
        self.layer(f"{name}.to_q", x, scores)
        self.layer(f"{name}.to_k", context, scores)
        if self.heads == "narrow":
            # The wide head divides by the square root of twice the width; the twins of the keys give nothing.
            for query, key in zip(wide.to_q.parameters(), wide.to_k.parameters(), strict=True):
                query.mul_(math.sqrt(2))
                key.mul_(scores.original.view(-1, *[1] * (key.ndim - 1)))
        self.layer(f"{name}.to_v", context, values)
        self.layer(f"{name}.to_out.0", values, x)

    def attend(self, name: str, x: Layout) -> None:
        if hasattr(self.small.get_submodule(name), "transformer_blocks"):
            self.transformer(name, x)
        else:
            self.norm(f"{name}.group_norm", x)
            self.attention(name, x, x)

    def transformer(self, name: str, x: Layout) -> None:
        module = self.small.get_submodule(name)
        inner = self.twins(f"{name}.proj_in", module.proj_in.weight.shape[0])
        self.norm(f"{name}.norm", x)
        self.layer(f"{name}.proj_in", x, inner)
        for i, block in enumerate(module.transformer_blocks):
            part = f"{name}.transformer_blocks.{i}"
            for j in (1, 2, 3):
                self.norm(f"{part}.norm{j}", inner)
            self.attention(f"{part}.attn1", inner, inner)
            self.attention(f"{part}.attn2", inner, Layout.plain(block.attn2.to_k.in_features))
            hidden = self.twins(f"{part}.ff", block.ff.net[2].in_features)
            self.layer(f"{part}.ff.net.0.proj", inner, hidden + hidden)
            self.layer(f"{part}.ff.net.2", hidden, inner)
        self.layer(f"{name}.proj_out", inner, x)

    @torch.no_grad()
    def time(self) -> None:
        if getattr(self.small, "add_embedding", None) is not None:
            self.wide.add_embedding.load_state_dict(self.small.add_embedding.state_dict())
        small, wide = self.small.time_embedding, self.wide.time_embedding
        wide.load_state_dict(small.state_dict() | {"linear_1.weight": wide.linear_1.weight})
        # With freq_shift 0 every other frequency of twice as many is one of the small model's.
        wide.linear_1.weight.zero_()
        wide.linear_1.weight[:, ::2] = small.linear_1.weight

    def block(self, name: str, x: Layout, skips: list[Layout], sampler: str) -> Layout:
        block = self.small.get_submodule(name)
        for i in range(len(block.resnets)):
            if sampler == "upsamplers":
                x = self.side_by_side(x, skips.pop())
            x = self.resnet(f"{name}.resnets.{i}", x)
            if hasattr(block, "attentions"):
                self.attend(f"{name}.attentions.{i}", x)
            if sampler == "downsamplers":
                skips.append(x)
        if getattr(block, sampler) is not None:
            conv = f"{name}.{sampler}.0.conv"
            out = self.twins(conv, self.small.get_submodule(conv).out_channels)
            self.layer(conv, x, out)
            x = out
            if sampler == "downsamplers":
                skips.append(x)
        self.outputs[name] = x.kept
        return x

    def run(self) -> None:
        small = self.small
        self.time()
        x = self.twins("conv_in", small.conv_in.out_channels)
        self.layer("conv_in", Layout.plain(small.conv_in.in_channels), x)
        skips = [x]
        for i in range(len(small.down_blocks)):
            x = self.block(f"down_blocks.{i}", x, skips, "downsamplers")
        if small.mid_block is not None:
            x = self.resnet("mid_block.resnets.0", x)
            for i, attention in enumerate(small.mid_block.attentions):
                if attention is not None:
                    self.attend(f"mid_block.attentions.{i}", x)
                x = self.resnet(f"mid_block.resnets.{i + 1}", x)
            self.outputs["mid_block"] = x.kept
        for i in range(len(small.up_blocks)):
            x = self.block(f"up_blocks.{i}", x, skips, "upsamplers")
        self.norm("conv_norm_out", x)
        self.layer("conv_out", x, Layout.plain(small.conv_out.out_channels))


def widen(small: UNet, heads: str = "narrow") -> tuple[UNet, dict[str, list[int]]]:
    """A UNet of twice the width and the same function, and which outputs of its blocks are originals.

    Args:
        small: The UNet to widen.
        heads: ``"narrow"``: its heads are twice as wide. ``"remove"``: it has twice as many.
    """
    wide = empty_wide(small, heads)
    walk = Widener(small, wide, heads)
    walk.run()
    return wide, walk.outputs


def empty_wide(small: UNet, heads: str) -> UNet:
    """The model that :func:`widen` fills; what it forgets is NaN."""
    config = {key: value for key, value in small.config.items() if not key.startswith("_")}
    config["block_out_channels"] = tuple(2 * width for width in config["block_out_channels"])
    config["time_embedding_dim"] = small.time_embedding.linear_1.out_features
    if heads == "remove" and isinstance(small, UNet2DConditionModel):
        given = config["attention_head_dim"]
        config["attention_head_dim"] = [2 * n for n in given] if isinstance(given, (list, tuple)) else 2 * given
    wide = type(small).from_config(config).eval()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.fill_(float("nan"))
    return wide


def randomize(denoiser: nn.Module) -> None:
    """Norms that are not the identity, as in a trained model."""
    with torch.no_grad():
        for module in denoiser.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RMSNorm)):
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                if getattr(module, "bias", None) is not None:
                    module.bias.uniform_(-0.5, 0.5)
