"""The layers of a ``UNet2DConditionModel``, and the stock config of a UNet with fewer layers.

A stock config sets, per level, the number of layers of the down block (the up block has one more), and per block
whether its layers have attention and with how many transformer layers. So a layer is removed from a level's down block
and up block together, the attentions of a block are removed together, and transformer layers one by one.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress.errors import UserError

KNOWN: dict[str, set[Any]] = {
    "down_block_types": {"DownBlock2D", "CrossAttnDownBlock2D"},
    "up_block_types": {"UpBlock2D", "CrossAttnUpBlock2D"},
    "mid_block_type": {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None},
    "dual_cross_attention": {False},
}
PER_LEVEL = (
    "block_out_channels",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
)


@dataclass(frozen=True)
class UNetLayer:
    """A resnet with its attention, by their names in the input model.

    Attributes:
        resnet: For example ``"down_blocks.0.resnets.1"``.
        reads: Channels of its two inputs: from the layer before, and from the skip connection (0 in a down block).
        attention: For example ``"down_blocks.0.attentions.1"``; None if it has no attention.
        transformer: Indices of the attention's remaining transformer layers, ascending.
    """

    resnet: str
    reads: tuple[int, int]
    attention: str | None = None
    transformer: tuple[int, ...] = ()


Layers = tuple[UNetLayer, ...]


@dataclass(frozen=True)
class UNetBlocks:
    """The remaining layers of a UNet.

    Attributes:
        given: Config of the input model.
        down: Layers of each level's down block, the level of the highest resolution first.
        up: Layers of each level's up block, in the same order of levels.
        mid: Layers of the mid block; the second one has the attention.
    """

    given: Mapping[str, Any]
    down: tuple[Layers, ...]
    up: tuple[Layers, ...]
    mid: Layers

    def config(self) -> dict[str, Any]:
        """See :class:`compress.prune.blocks.Blocks`."""
        levels = len(self.down)
        # Without private keys: from_config drops every key that "_use_default_values" lists, even if it is given.
        config = {key: value for key, value in self.given.items() if not key.startswith("_")}
        config |= {key: config[key][:levels] for key in PER_LEVEL if isinstance(config[key], (list, tuple))}
        config["down_block_types"] = [_attends(layers, "DownBlock2D") for layers in self.down]
        config["up_block_types"] = [_attends(layers, "UpBlock2D") for layers in reversed(self.up)]
        config["mid_block_type"] = _attends(self.mid, "UNetMidBlock2D") if self.mid else None
        config["layers_per_block"] = _squeezed([len(layers) for layers in self.down])
        return config | self._transformer_layers()

    def names(self) -> dict[str, str]:
        """See :class:`compress.prune.blocks.Blocks`."""
        found = _layer_names("mid_block", self.mid)
        top, given_top = len(self.up) - 1, len(self.given["block_out_channels"]) - 1
        for level, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            found |= _layer_names(f"down_blocks.{level}", down) | _layer_names(f"up_blocks.{top - level}", up)
            if level < top:
                found[f"down_blocks.{level}.downsamplers.0"] = f"down_blocks.{level}.downsamplers.0"
            if level > 0:
                found[f"up_blocks.{top - level}.upsamplers.0"] = f"up_blocks.{given_top - level}.upsamplers.0"
        return found

    def outputs(self) -> dict[str, str | None]:
        """See :class:`compress.prune.blocks.Blocks`."""
        first, top, given_top = read_unet(self.given), len(self.up) - 1, len(self.given["block_out_channels"]) - 1
        found: dict[str, str | None] = {}
        for level in range(top + 1):
            # A block ends with its sampler; the last down block and the last up block end with a layer.
            down, up = f"down_blocks.{level}", f"up_blocks.{given_top - level}"
            sampled = level < top or (top == given_top and _last(self.down[level]) == _last(first.down[level]))
            found[down] = down if sampled else None
            found[f"up_blocks.{top - level}"] = up if level or _last(self.up[0]) == _last(first.up[0]) else None
        if self.mid:
            found["mid_block"] = "mid_block" if _last(self.mid) == _last(first.mid) else None
        return found

    def problem(self) -> str | None:
        """See :class:`compress.prune.blocks.Blocks`."""
        widths = self.given["block_out_channels"][: len(self.down)]
        for level, (layers, got) in enumerate(zip(self.down, _down_reads(widths, self.down), strict=True)):
            if not layers and widths[level] != widths[max(level - 1, 0)]:
                return f"a layer from {widths[level - 1]} to {widths[level]} channels must stay"
            if reason := _mismatch(layers, got):
                return reason
        for layers, got in zip(self.up, _up_reads(widths, self.up), strict=True):
            if reason := _mismatch(layers, got):
                return reason
        tied = self._tied()
        if len({len(layer.transformer) for layer in tied}) > 1:
            names = " and ".join(str(layer.attention) for layer in tied)
            return f"one entry of transformer_layers_per_block sets {names}"
        return None

    def candidates(self, kinds: Collection[str]) -> Iterator[tuple[str, str, "UNetBlocks"]]:
        """See :class:`compress.prune.blocks.Blocks`."""
        if "layers" in kinds:
            yield from self._without_layers()
        if "attentions" in kinds:
            yield from self._without_attentions()
        if "transformer_layers" in kinds:
            yield from self._without_transformer_layers()
        if "mid_block" in kinds and self.mid:
            if len(self.mid) > 1:
                for layer in _plain(self.mid):
                    yield "mid_block", f"mid_block but for {layer.resnet}", replace(self, mid=(layer,))
            yield "mid_block", "mid_block", replace(self, mid=())
        if "levels" in kinds and len(self.down) > 1:
            name = f"level {len(self.down) - 1}"
            yield name, name, self.without_level()

    def without_level(self) -> "UNetBlocks":
        """Without the level of the lowest resolution and the mid block below it."""
        return replace(self, down=self.down[:-1], up=self.up[:-1], mid=())

    def _without_layers(self) -> Iterator[tuple[str, str, "UNetBlocks"]]:
        for level, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            for i, lower in enumerate(down):
                for j, upper in enumerate(up):
                    left = replace(
                        self,
                        down=_changed(self.down, level, down[:i] + down[i + 1 :]),
                        up=_changed(self.up, level, up[:j] + up[j + 1 :]),
                    )
                    yield f"layers of level {level}", f"{lower.resnet} and {upper.resnet}", left

    def _without_attentions(self) -> Iterator[tuple[str, str, "UNetBlocks"]]:
        for layers in (*self.down, *self.up):
            if any(layer.attention for layer in layers):
                name = f"attentions of {layers[0].resnet.partition('.resnets')[0]}"
                yield name, name, self._replaced(dict(zip(layers, _plain(layers), strict=True)))

    def _without_transformer_layers(self) -> Iterator[tuple[str, str, "UNetBlocks"]]:
        tied = self._tied()
        for layer in (layer for layers in (*self.down, self.mid, *self.up) for layer in layers):
            together = tied if layer in tied else (layer,)
            if len(layer.transformer) < 2 or layer != together[0]:
                continue
            for place in range(len(layer.transformer)):
                names = [f"{part.attention}.transformer_blocks.{part.transformer[place]}" for part in together]
                shorter = {
                    part: replace(part, transformer=part.transformer[:place] + part.transformer[place + 1 :])
                    for part in together
                }
                yield f"transformer layers of {layer.attention}", " and ".join(names), self._replaced(shorter)

    def _replaced(self, new: Mapping[UNetLayer, UNetLayer]) -> "UNetBlocks":
        def changed(layers: Layers) -> Layers:
            return tuple(new.get(layer, layer) for layer in layers)

        return replace(
            self, down=tuple(map(changed, self.down)), up=tuple(map(changed, self.up)), mid=changed(self.mid)
        )

    def _tied(self) -> Layers:
        """Layers that must have the same number of transformer layers, as a stock config has one entry for them.

        The first layer of the last down block and that of the mid block, if both have attention.
        """
        tied = tuple(layer for layer in (*self.down[-1][:1], *self.mid[1:]) if layer.attention)
        return tied if len(tied) > 1 else ()

    def _transformer_layers(self) -> dict[str, Any]:
        """The two config keys that set the number of transformer layers of the attentions."""
        down, up = [_depths(layers) for layers in self.down], [_depths(layers) for layers in self.up]
        mid = _depths(self.mid)
        given = self.given["transformer_layers_per_block"]
        given = given if isinstance(given, (list, tuple)) else [given] * len(down)
        here = [{*below, *above} for below, above in zip(down, up, strict=True)]
        here[-1] |= {*mid}
        if all(len(depths) < 2 for depths in here):
            unused = [entry if isinstance(entry, int) else 1 for entry in given]
            plain = [next(iter(depths), entry) for depths, entry in zip(here, unused, strict=False)]
            return {
                "transformer_layers_per_block": _squeezed(plain),
                "reverse_transformer_layers_per_block": None,
            }
        entries: list[Any] = [depths or 1 for depths in down]
        entries[-1] = down[-1] or (mid or [1])[0]
        return {
            "transformer_layers_per_block": entries,
            "reverse_transformer_layers_per_block": [depths or 1 for depths in reversed(up)],
        }


def read_unet(config: Mapping[str, Any]) -> UNetBlocks:
    """All layers of the UNet that a config describes.

    Raises:
        UserError: Its blocks are not Stable Diffusion's.
    """
    for key, known in KNOWN.items():
        values = config[key] if isinstance(config[key], (list, tuple)) else [config[key]]
        for value in values:
            if value not in known:
                names = ", ".join(sorted(str(name) for name in known))
                raise UserError(f"this UNet's blocks cannot be removed: its {key} is {value}; known: {names}")
    widths = list(config["block_out_channels"])
    levels = len(widths)
    counts = config["layers_per_block"]
    counts = list(counts) if isinstance(counts, (list, tuple)) else [counts] * levels
    depths = config["transformer_layers_per_block"]
    depths = list(depths) if isinstance(depths, (list, tuple)) else [depths] * levels
    up_depths = config["reverse_transformer_layers_per_block"] or depths[::-1]
    down_reads = _down_reads(widths, [[None] * count for count in counts])
    up_reads = _up_reads(widths, [[None] * (count + 1) for count in counts])
    down = [_block(f"down_blocks.{i}", config["down_block_types"][i], down_reads[i], depths[i]) for i in range(levels)]
    up = [
        _block(f"up_blocks.{b}", config["up_block_types"][b], up_reads[levels - 1 - b], up_depths[b])
        for b in reversed(range(levels))
    ]
    return UNetBlocks(config, tuple(down), tuple(up), _mid(config["mid_block_type"], widths[-1], depths[-1]))


def _block(name: str, block_type: str, reads: list[tuple[int, int]], depths: Any) -> Layers:
    layers = []
    for i, read in enumerate(reads):
        layer = UNetLayer(f"{name}.resnets.{i}", read)
        if "CrossAttn" in block_type:
            depth = depths if isinstance(depths, int) else depths[i]
            layer = replace(layer, attention=f"{name}.attentions.{i}", transformer=tuple(range(depth)))
        layers.append(layer)
    return tuple(layers)


def _mid(block_type: str | None, width: int, depths: Any) -> Layers:
    if block_type is None:
        return ()
    first = UNetLayer("mid_block.resnets.0", (width, 0))
    if "CrossAttn" not in block_type:
        return (first,)
    depth = depths if isinstance(depths, int) else depths[0]
    second = UNetLayer("mid_block.resnets.1", (width, 0), "mid_block.attentions.0", tuple(range(depth)))
    return (first, second)


def _down_reads(widths: list[int], blocks: Collection[Collection[Any]]) -> list[list[tuple[int, int]]]:
    """Input channels of each layer of the down blocks in a stock UNet with these widths and numbers of layers."""
    return [
        [(widths[level] if i else widths[max(level - 1, 0)], 0) for i in range(len(layers))]
        for level, layers in enumerate(blocks)
    ]


def _up_reads(widths: list[int], blocks: Collection[Collection[Any]]) -> list[list[tuple[int, int]]]:
    """The same for the up blocks, by level: from the layer before, and from the skip connection."""
    last = len(widths) - 1
    return [
        [
            (
                widths[level] if i else widths[min(level + 1, last)],
                widths[level] if i < len(layers) - 1 else widths[max(level - 1, 0)],
            )
            for i in range(len(layers))
        ]
        for level, layers in enumerate(blocks)
    ]


def _mismatch(layers: Layers, got: list[tuple[int, int]]) -> str | None:
    for layer, reads in zip(layers, got, strict=True):
        if layer.reads != reads:
            wanted, found = (" + ".join(str(width) for width in pair if width) for pair in (layer.reads, reads))
            return f"{layer.resnet} reads {wanted} channels and would get {found}"
    return None


def _attends(layers: Layers, plain: str) -> str:
    """The type of a block: ``plain``, or its counterpart with attention."""
    if not any(layer.attention for layer in layers):
        return plain
    return f"{plain}CrossAttn" if "Mid" in plain else f"CrossAttn{plain}"


def _plain(layers: Layers) -> Layers:
    """The same layers without attention."""
    return tuple(replace(layer, attention=None, transformer=()) for layer in layers)


def _last(layers: Layers) -> UNetLayer | None:
    return layers[-1] if layers else None


def _depths(layers: Layers) -> list[int]:
    return [len(layer.transformer) for layer in layers if layer.attention]


def _layer_names(block: str, layers: Layers) -> dict[str, str]:
    found = {f"{block}.resnets.{i}": layer.resnet for i, layer in enumerate(layers)}
    for i, layer in enumerate(layer for layer in layers if layer.attention):
        found[f"{block}.attentions.{i}"] = str(layer.attention)
        for j, old in enumerate(layer.transformer):
            found[f"{block}.attentions.{i}.transformer_blocks.{j}"] = f"{layer.attention}.transformer_blocks.{old}"
    return found


def _changed(blocks: tuple[Layers, ...], level: int, layers: Layers) -> tuple[Layers, ...]:
    return (*blocks[:level], layers, *blocks[level + 1 :])


def _squeezed(values: list[int]) -> int | list[int]:
    """One number if all are equal."""
    return values[0] if len(set(values)) == 1 else values
