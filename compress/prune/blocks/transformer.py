"""The blocks of transformer denoisers; their configs set the number of blocks."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compress.models.families import Family


@dataclass(frozen=True)
class TransformerBlocks:
    """The remaining blocks of a transformer.

    Attributes:
        family: Its family.
        given: Config of the input model.
        left: Module list to the original positions of its remaining blocks, ascending.
    """

    family: Family
    given: Mapping[str, Any]
    left: Mapping[str, tuple[int, ...]]

    def config(self) -> dict[str, Any]:
        """See :class:`compress.prune.blocks.Blocks`."""
        config = {key: value for key, value in self.given.items() if not key.startswith("_")}
        for name, key in self.family.blocks.items():
            config[key] = len(self.left[name])
        for key in self.family.places:
            listed = config.get(key) or ()
            config[key] = tuple(i for i, old in enumerate(self.left["transformer_blocks"]) if old in listed)
        return config

    def names(self) -> dict[str, str]:
        """See :class:`compress.prune.blocks.Blocks`."""
        return {f"{name}.{i}": f"{name}.{old}" for name, left in self.left.items() for i, old in enumerate(left)}

    def outputs(self) -> dict[str, str | None]:
        """See :class:`compress.prune.blocks.Blocks`."""
        return {**self.names()}

    def problem(self) -> str | None:
        """See :class:`compress.prune.blocks.Blocks`."""
        for name, key in self.family.blocks.items():
            if not self.left[name]:
                return f"{name} must keep a block"
            if self.family.keep_last and self.left[name][-1] != self.given[key] - 1:
                return f"{name}.{self.given[key] - 1} differs from all others and must stay the last block"
        return None

    def candidates(self, kinds: Collection[str]) -> Iterator[tuple[str, str, "TransformerBlocks"]]:
        """See :class:`compress.prune.blocks.Blocks`; a block counts as a layer."""
        for name, left in self.left.items() if "layers" in kinds else ():
            for i, old in enumerate(left):
                rest = {**self.left, name: left[:i] + left[i + 1 :]}
                yield name, f"{name}.{old}", TransformerBlocks(self.family, self.given, rest)


def read_transformer(family: Family, config: Mapping[str, Any]) -> TransformerBlocks:
    """All blocks of the transformer that a config describes."""
    left = {name: tuple(range(config[key])) for name, key in family.blocks.items()}
    return TransformerBlocks(family, config, left)
