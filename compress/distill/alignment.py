"""Pairs the features of student and teacher and makes them comparable."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.families import family_of
from compress.system.random import generator


def kept_channels(history: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The teacher's channels that remain in each block after all earlier stages.

    Args:
        history: Entries whose ``details`` may hold ``kept`` and ``kept_inside``, block -> indices into the channels
            that the stage before left at its output or, of an attention block, inside; and ``blocks``, block -> its
            block in the stage before, or None where its output changed.

    Returns:
        Block -> indices into the teacher's channels.
    """
    kept: dict[str, list[int]] = {}
    for entry in history:
        if renamed := entry.get("details", {}).get("blocks"):
            kept = {block: kept[old] for block, old in renamed.items() if old in kept}
        details = entry.get("details", {})
        for block, now in {**(details.get("kept") or {}), **(details.get("kept_inside") or {})}.items():
            before = kept.get(block)
            if before is None:
                kept[block] = list(now)
            elif not now or max(now) < len(before):
                kept[block] = [before[i] for i in now]
            else:
                # Another stage changed the block, so the channels' origin is unknown.
                kept[block] = []
    return {block: indices for block, indices in kept.items() if indices}


def matching_blocks(
    student: nn.Module, teacher: nn.Module, history: Iterable[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """Pairs the student's blocks with the teacher's where possible.

    A UNet's down blocks are paired from the first and its up blocks from the last, so a student without the innermost
    level is compared at its own resolutions. Blocks of a pruned transformer are paired by its history, without a
    history by name.

    Args:
        student: The smaller denoiser.
        teacher: Of the same family.
        history: Entries whose ``details`` may hold ``blocks``, block -> its block in the stage before.
    """
    family, theirs_family = family_of(student), family_of(teacher)
    if family is None or theirs_family is not family:
        return {}
    if not family.blocks:
        ours, theirs = family.features(student), family.features(teacher)
        up_ours, up_theirs = ([name for name in names if name.startswith("up")] for names in (ours, theirs))
        pairs = {name: name for name in ours if name in theirs and not name.startswith("up")}
        shared = min(len(up_ours), len(up_theirs))
        return pairs | dict(zip(up_ours[-shared:], up_theirs[-shared:], strict=True))
    origin = {name: name for name, _ in student.named_modules()}
    for entry in reversed(list(history)):
        if renamed := entry.get("details", {}).get("blocks"):
            origin = {name: renamed[old] for name, old in origin.items() if renamed.get(old)}
    there = {name for name, _ in teacher.named_modules()}
    return {name: origin[name] for name in family.features(student) if origin.get(name) in there}


def matching_attentions(
    student: nn.Module, teacher: nn.Module, history: Iterable[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """Pairs the student's self-attentions with the teacher's: by its history, where there is none by name.

    Args:
        student: The smaller denoiser.
        teacher: Of the same family.
        history: Entries whose ``details`` may hold ``blocks``, block -> its block in the stage before.
    """
    there, pairs = set(self_attentions(teacher)), {}
    for name in self_attentions(student):
        origin: str | None = name
        for entry in reversed(list(history)):
            origin = _origin(origin, entry.get("details", {}).get("blocks") or {}) if origin else None
        if origin in there:
            pairs[name] = origin
    return pairs


def self_attentions(model: nn.Module) -> list[str]:
    """Names of the attentions of images to themselves, or of images and text to both."""
    return [name for name, module in model.named_modules() if _is_self_attention(module)]


def _is_self_attention(module: nn.Module) -> bool:
    return hasattr(module, "to_q") and not getattr(module, "is_cross_attention", False)


def _origin(name: str, blocks: Mapping[str, str | None]) -> str | None:
    """A module's name in the stage before, by the innermost block around it; None if that block's output changed."""
    block = name
    while block and block not in blocks:
        block = block.rpartition(".")[0]
    if not block:
        return name
    origin = blocks[block]
    return None if origin is None else origin + name[len(block) :]


@contextmanager
def tapped(model: nn.Module, blocks: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects the outputs of ``blocks`` when ``model`` runs; removes its hooks afterwards."""
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = _feature(module, output)

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _feature(module: nn.Module, output: Any) -> Tensor:
    """The image's features, where a module also returns others.

    A down block returns those of skip connections last, a joint block the text's first, and its attention last.
    """
    if not isinstance(output, tuple):
        return output
    first = output[0]
    return first if first is not None and (first.ndim == 4 or _is_self_attention(module)) else output[-1]


class Alignment(nn.Module):
    """Makes a student's features comparable with its teacher's.

    The teacher's channels that the student kept are selected; where they are unknown, a learned 1x1 projection brings
    the student's features to the teacher's width.

    Args:
        ours: The student's features, block to ``(1, c, h, w)`` or ``(1, n, c)``; only shapes count.
        theirs: The teacher's features under the student's names.
        kept: Block to the teacher's channels that the student kept, in its order; of an attention block those inside,
            which are the output channels of its attentions.
        seed: Of the projections' initial weights.

    Attributes:
        how: Block to ``same``, ``kept`` or ``projection``.
        skipped: Block to the reason it is not compared.
    """

    def __init__(
        self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], kept: Mapping[str, list[int]], seed: int
    ) -> None:
        super().__init__()
        self.how: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.projections = nn.ModuleDict()
        self._kept: dict[str, Tensor] = {}
        for name, feature in ours.items():
            axis = _channels(feature)
            width, full = feature.shape[axis], theirs[name].shape[axis]
            places, their_places = _places(feature), _places(theirs[name])
            indices = kept.get(name.partition(".transformer_blocks.")[0], [])
            if places != their_places:
                self.skipped[name] = f"{places} against the teacher's {their_places}"
            elif len(indices) == width and min(indices) >= 0 and max(indices) < full:
                self.how[name] = "kept"
                self._kept[name] = torch.tensor(indices, device=feature.device)
            elif width == full:
                self.how[name] = "same"
            else:
                self.how[name] = "projection"
                projection: nn.Module = nn.Conv2d(width, full, 1) if axis == 1 else nn.Linear(width, full)
                source = generator(seed, "projection", len(self.how))
                nn.init.normal_(projection.weight, std=width**-0.5, generator=source)  # type: ignore[arg-type]
                nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
                self.projections[_key(name)] = projection.to(feature.device)

    def forward(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """From features ``(b, ...)`` to pairs of one shape: the student's, and their targets in float32."""
        pairs = {}
        for name, how in self.how.items():
            mine, target = ours[name], theirs[name].float()
            if how == "kept":
                target = target.index_select(_channels(target), self._kept[name])
            elif how == "projection":
                mine = self.projections[_key(name)](mine)
            pairs[name] = mine, target
        return pairs


def _channels(feature: Tensor) -> int:
    """The channel axis: second of an image, last of a sequence."""
    return 1 if feature.ndim == 4 else feature.ndim - 1


def _places(feature: Tensor) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(feature.shape) if axis not in (0, _channels(feature)))


def _key(name: str) -> str:
    return name.replace(".", "_")  # a module name cannot contain a dot
