"""Removal of blocks one after another, each time the one whose loss is felt least in the denoiser's prediction."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from compress.data.calls import Call
from compress.errors import UserError
from compress.prune.blocks import Blocks
from compress.prune.blocks.cost import BlockCosts
from compress.prune.blocks.effect import Effect
from compress.prune.blocks.subject import Subject
from compress.system.progress import bar


@dataclass(frozen=True)
class Removal:
    """One step.

    Attributes:
        name: What was removed.
        error: Relative error of the prediction afterwards, see :class:`compress.prune.blocks.effect.Effect`.
        params: Parameters left.
        macs: Multiply-accumulates left.
    """

    name: str
    error: float
    params: int
    macs: int


@dataclass(frozen=True)
class Found:
    """Outcome of a search.

    Attributes:
        blocks: What is left.
        removed: The steps to it.
        effects: What could be removed first to the relative error of the prediction without it alone.
        skipped: What can not be removed, to why no stock config can say so.
    """

    blocks: Blocks
    removed: list[Removal]
    effects: dict[str, float]
    skipped: dict[str, str]


def least_shares(blocks: Blocks, costs: BlockCosts, kinds: Collection[str], unit: str) -> dict[str, float]:
    """What is left where everything goes that can, as shares of ``params`` and ``macs``.

    Args:
        blocks: All of the denoiser's.
        costs: Of them.
        kinds: Of blocks that may go.
        unit: ``params`` or ``macs``: what to make little of where one removal rules out another.

    Raises:
        UserError: Nothing can be removed.
    """
    left = blocks
    while options := _possible(left, kinds):
        left = min(options.values(), key=lambda option: costs.of(option)[unit])
    if left is blocks:
        reasons = "; ".join(f"{name}: {why}" for name, why in impossible(blocks, kinds).items())
        raise UserError(f"no block can be removed from this denoiser ({reasons or f'it has no {_listed(kinds)}'})")
    full = costs.of(blocks)
    return {name: count / full[name] for name, count in costs.of(left).items()}


def search(subject: Subject, calls: Sequence[Call], kinds: Collection[str], shares: Mapping[str, float]) -> Found:
    """Removes blocks greedily, until no more than ``shares`` is left.

    What a block adds to the squared error, measured before an earlier step, stands for what it adds now until the
    block is about to be chosen, and is then measured again: removing blocks rarely makes others matter less (lazy
    greedy search, Minoux 1978), and most need not be looked at twice.

    Args:
        subject: The denoiser.
        calls: What it predicts, and from what.
        kinds: Of blocks that may go.
        shares: ``params`` or ``macs`` to the share of it that is to be left at most.

    Raises:
        UserError: Nothing more can be removed and more than ``shares`` is left.
    """
    blocks, costs = subject.blocks, subject.costs
    full = costs.of(blocks)
    limits = {unit: share * full[unit] for unit, share in shares.items()}
    left = blocks
    removed: list[Removal] = []
    effects: dict[str, float] = {}
    adds: dict[str, float] = {}  # to the squared error
    sizes: dict[str, tuple[int, ...]] = {}
    options = _possible(left, kinds)
    effect = Effect(subject, calls)
    error = 0.0  # of what is left

    def first() -> str:
        # Of blocks that matter equally little, the largest.
        return min(options, key=lambda name: (adds.get(name, -math.inf), sizes[name]))

    with bar() as progress:
        task, measured, at_least = progress.add_task("measuring blocks"), 0, len(options)
        while any(costs.of(left)[unit] > limit for unit, limit in limits.items()):
            if not options:
                reached = ", ".join(f"{costs.of(left)[unit] / full[unit]:.3f} of the {unit}" for unit in limits)
                raise UserError(f"nothing more can be removed, and {reached} are left: ask for more than that")
            effect.keep(left)
            fresh: dict[str, float] = {}
            sizes = {name: tuple(costs.of(option).values()) for name, option in options.items()}
            while (name := first()) not in fresh:
                fresh[name] = effect.error(options[name])
                adds[name] = fresh[name] ** 2 - error**2
                measured += 1
                progress.update(task, completed=measured, total=max(measured, at_least))
            left, error = options[name], fresh[name]
            effects = effects or {option: fresh[option] for option in options}
            removed.append(Removal(name, error, **costs.of(left)))
            options = _possible(left, kinds)
            progress.update(task, description=f"measuring blocks ({len(removed)} removed)")
    return Found(left, removed, effects, impossible(blocks, kinds))


def impossible(blocks: Blocks, kinds: Collection[str]) -> dict[str, str]:
    """Blocks of which nothing can be removed, to the reason."""
    reasons: dict[str, str | None] = {}
    for group, _, left in blocks.candidates(kinds):
        if reasons.get(group, "") is not None:
            reasons[group] = left.problem()
    return {group: reason for group, reason in reasons.items() if reason is not None}


def _possible(blocks: Blocks, kinds: Collection[str]) -> dict[str, Blocks]:
    return {name: left for _, name, left in blocks.candidates(kinds) if left.problem() is None}


def _listed(kinds: Collection[str]) -> str:
    return " or ".join(kinds)
