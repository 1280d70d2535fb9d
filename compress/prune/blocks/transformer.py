"""The blocks of transformer denoisers, whose configs say how many there are."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Class -> module list -> config key of its length. Only those whose blocks do not depend on their place.
LISTS: dict[str, dict[str, str]] = {
    "PixArtTransformer2DModel": {"transformer_blocks": "num_layers"},
    "SD3Transformer2DModel": {"transformer_blocks": "num_layers"},
    "FluxTransformer2DModel": {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
}
DUAL = "dual_attention_layers"  # of SD3: places of the blocks that have a second self-attention


@dataclass(frozen=True)
class TransformerBlocks:
    """What is left of a transformer.

    Attributes:
        model_class: Its class.
        given: Config of the model given.
        left: Module list to the places of the blocks that are left of it, ascending.
    """

    model_class: str
    given: Mapping[str, Any]
    left: Mapping[str, tuple[int, ...]]

    def config(self) -> dict[str, Any]:
        """See :class:`compress.prune.blocks.Blocks`."""
        config = {key: value for key, value in self.given.items() if not key.startswith("_")}
        for name, key in LISTS[self.model_class].items():
            config[key] = len(self.left[name])
        if config.get(DUAL):
            config[DUAL] = tuple(i for i, old in enumerate(self.left["transformer_blocks"]) if old in config[DUAL])
        return config

    def names(self) -> dict[str, str]:
        """See :class:`compress.prune.blocks.Blocks`."""
        return {f"{name}.{i}": f"{name}.{old}" for name, left in self.left.items() for i, old in enumerate(left)}

    def outputs(self) -> dict[str, str | None]:
        """See :class:`compress.prune.blocks.Blocks`."""
        return {**self.names()}

    def problem(self) -> str | None:
        """See :class:`compress.prune.blocks.Blocks`."""
        for name, key in LISTS[self.model_class].items():
            if not self.left[name]:
                return f"{name} must keep a block"
            if "SD3" in self.model_class and self.left[name][-1] != self.given[key] - 1:
                return f"{name}.{self.given[key] - 1} gives no text features, which only the last block may"
        return None

    def candidates(self, kinds: Collection[str]) -> Iterator[tuple[str, str, "TransformerBlocks"]]:
        """See :class:`compress.prune.blocks.Blocks`; a block counts as a layer."""
        for name, left in self.left.items() if "layers" in kinds else ():
            for i, old in enumerate(left):
                rest = {**self.left, name: left[:i] + left[i + 1 :]}
                yield name, f"{name}.{old}", TransformerBlocks(self.model_class, self.given, rest)


def read_transformer(model_class: str, config: Mapping[str, Any]) -> TransformerBlocks:
    """All blocks of the transformer that a config describes."""
    left = {name: tuple(range(config[key])) for name, key in LISTS[model_class].items()}
    return TransformerBlocks(model_class, config, left)
