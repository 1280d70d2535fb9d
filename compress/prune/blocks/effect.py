"""Prediction error of a denoiser with fewer blocks, relative to the original."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from compress.data.calls import Call
from compress.models.inputs import Inputs
from compress.prune.blocks import Blocks
from compress.prune.blocks.assemble import assemble
from compress.prune.blocks.subject import Subject

MOST = 2**30  # maximum bytes of cached block inputs and outputs


class Effect:
    """Measures how removing blocks changes the prediction.

    Block outputs are cached: candidates share most blocks, and blocks before the removed one get the same inputs again.
    So do the key and value projections of the caption in every block, which dominate the cost of Stable Diffusion XL
    for small images.

    Args:
        subject: The denoiser.
        calls: Recorded inputs and predictions of the denoiser.
    """

    def __init__(self, subject: Subject, calls: Sequence[Call]) -> None:
        self.subject = subject
        self.inputs: list[Inputs] = [call.inputs for call in calls]
        self.wanted = [[call.output] for call in calls]
        self._kept: dict[tuple[str, int], tuple[list[Any], Any]] = {}
        self._bytes = 0
        joint = merged(calls)
        if joint is not None:
            found = self._predict(subject.blocks, [joint], keep=False)[0]
            wanted = torch.cat([call.output for call in calls])
            # An argument may have as many rows as there are images by chance; joining it would be wrong then.
            if found.shape == wanted.shape and _relative(found, wanted) < 1e-2:
                self.inputs, self.wanted = [joint], [[call.output for call in calls]]

    def keep(self, blocks: Blocks) -> None:
        """Cache what these blocks compute, for candidates that share most of them."""
        self._predict(blocks, self.inputs, keep=True)

    def error(self, blocks: Blocks) -> float:
        """Relative error of the predictions of these blocks.

        Returns:
            Root mean square of the difference over that of the original prediction, averaged over the calls; at least
            0, infinite if it is NaN.
        """
        errors = []
        for found, wanted in zip(self._predict(blocks, self.inputs, keep=False), self.wanted, strict=True):
            parts = found.split([len(one) for one in wanted])
            errors += [_relative(part, one) for part, one in zip(parts, wanted, strict=True)]
        error = sum(errors) / len(errors)
        return math.inf if math.isnan(error) else error

    @torch.no_grad()
    def _predict(self, blocks: Blocks, inputs: Sequence[Inputs], keep: bool) -> list[Tensor]:
        model = assemble(self.subject.model_class, blocks, self.subject.weights)
        place = [0]
        for name, source in innermost(blocks.names()).items():
            block = model.get_submodule(name)
            for part in ("", *of_condition(block)):
                self._intercept(block.get_submodule(part), f"{source}.{part}", place, keep)
        found = []
        for place[0], arguments in enumerate(inputs):
            found.append(model(**arguments)[0])
        return found

    def _intercept(self, block: Any, source: str, place: list[int], keep: bool) -> None:
        """Make a block of a temporary model return its cached output if its inputs are the same."""
        forward = block.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            given, key = tree_flatten((args, kwargs))[0], (source, place[0])
            if key in self._kept and _same(given, self._kept[key][0]):
                return self._kept[key][1]
            output = forward(*args, **kwargs)
            if keep:
                self._bytes -= _bytes(self._kept.pop(key, ()))
                size = _bytes((given, output))
                if self._bytes + size <= MOST:
                    self._kept[key] = given, output
                    self._bytes += size
            return output

        block.forward = call


@torch.no_grad()
def prediction_error(model: Any, calls: Sequence[Call]) -> float:
    """:meth:`Effect.error` for any denoiser with the same inputs and outputs."""
    return sum(_relative(model(**call.inputs)[0], call.output) for call in calls) / len(calls)


def innermost(names: Mapping[str, str]) -> dict[str, str]:
    """Entries of :meth:`Blocks.names` that contain no other entry."""
    outer = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    return {name: source for name, source in names.items() if name not in outer}


def of_condition(block: Any) -> Iterator[str]:
    """Names of modules in a block that depend on the condition only: keys and values of cross-attention."""
    from diffusers.models.attention_processor import Attention

    for name, module in block.named_modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            yield from (f"{name}.{part}".lstrip(".") for part in ("to_k", "to_v"))


def merged(calls: Sequence[Call]) -> Inputs | None:
    """Arguments of one call on the rows of all calls; None if they cannot be joined."""
    rows = [len(call.output) for call in calls]
    flat = [tree_flatten(call.inputs) for call in calls]
    if any(form != flat[0][1] for _, form in flat):
        return None
    leaves = []
    for values in zip(*(values for values, _ in flat), strict=True):
        if all(isinstance(value, Tensor) for value in values):
            leaf = _joined(values, rows)
        else:
            leaf = values[0] if all(_equal(value, values[0]) for value in values) else _CANNOT
        if leaf is _CANNOT:
            return None
        leaves.append(leaf)
    return tree_unflatten(leaves, flat[0][1])


_CANNOT = object()


def _joined(values: Sequence[Tensor], rows: Sequence[int]) -> Any:
    if all(not value.ndim for value in values):  # a timestep for all images of a call
        return torch.cat([value.expand(count) for value, count in zip(values, rows, strict=True)])
    by_row = all(value.ndim and len(value) == count for value, count in zip(values, rows, strict=True))
    if by_row and len({value.shape[1:] for value in values}) == 1:
        return torch.cat(list(values))
    return values[0] if all(_equal(value, values[0]) for value in values) else _CANNOT


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(_equal, left, right))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _bytes(values: Any) -> int:
    return sum(v.numel() * v.element_size() for v in tree_flatten(values)[0] if isinstance(v, Tensor))


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))
