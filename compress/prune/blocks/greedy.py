"""Greedy removal of blocks: each step removes the block whose removal changes the denoiser's prediction least."""

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
        name: The removed block or blocks.
        error: Relative error of the prediction afterwards, see :class:`compress.prune.blocks.effect.Effect`.
        params: Remaining parameters.
        macs: Remaining multiply-accumulates.
        latency: Predicted remaining latency in millionths of the whole denoiser's; None if it was not measured.
    """

    name: str
    error: float
    params: int
    macs: int
    latency: int | None = None


@dataclass(frozen=True)
class Found:
    """Outcome of a search.

    Attributes:
        blocks: Remaining blocks.
        removed: The steps, in order.
        effects: Candidate measured in the first step to the relative error without it alone.
        skipped: Group of blocks that cannot be removed to the reason.
    """

    blocks: Blocks
    removed: list[Removal]
    effects: dict[str, float]
    skipped: dict[str, str]


def least_shares(blocks: Blocks, costs: BlockCosts, kinds: Collection[str], unit: str) -> dict[str, float]:
    """Shares of ``params`` and ``macs`` that remain after every possible removal.

    Args:
        blocks: All blocks of the denoiser.
        costs: Their costs.
        kinds: Kinds of blocks that may be removed.
        unit: ``params`` or ``macs``: the cost to minimize if one removal excludes another.

    Raises:
        UserError: Nothing can be removed.
    """
    full, left = costs.of(blocks), costs.of(least_blocks(blocks, costs, kinds, unit))
    return {name: count / full[name] for name, count in left.items()}


def least_blocks(blocks: Blocks, costs: BlockCosts, kinds: Collection[str], unit: str) -> Blocks:
    """The blocks that remain after every possible removal; arguments and errors as :func:`least_shares`."""
    left = blocks
    while options := possible(left, kinds):
        left = min(options.values(), key=lambda option: costs.of(option)[unit])
    if left is blocks:
        reasons = "; ".join(f"{name}: {why}" for name, why in impossible(blocks, kinds).items())
        raise UserError(f"no block can be removed from this denoiser ({reasons or f'it has no {_listed(kinds)}'})")
    return left


def search(subject: Subject, calls: Sequence[Call], kinds: Collection[str], shares: Mapping[str, float]) -> Found:
    """Remove blocks greedily until at most ``shares`` of the cost remain.

    The search is lazy (Minoux 1978): a block keeps the increase of the squared error measured in an earlier step until
    it is about to be chosen, and is then measured again. Removing blocks rarely makes others less important, so most
    blocks are measured only once.

    Args:
        subject: The denoiser.
        calls: Recorded inputs and predictions of the denoiser.
        kinds: Kinds of blocks that may be removed.
        shares: ``params``, ``macs`` or, alone and if the costs have it, ``latency`` to the maximum share to keep.

    Raises:
        UserError: Nothing more can be removed, and more than ``shares`` remain.
    """
    blocks, costs = subject.blocks, subject.costs
    full = costs.of(blocks)
    timed = "latency" in shares
    limits = {unit: share * full[unit] for unit, share in shares.items()}
    left = blocks
    removed: list[Removal] = []
    effects: dict[str, float] = {}
    adds: dict[str, float] = {}  # to the squared error
    sizes: dict[str, tuple[int, ...]] = {}
    saved: dict[str, int] = {}
    options = possible(left, kinds)
    effect = Effect(subject, calls)
    error = 0.0  # of the remaining blocks

    def first() -> str:
        # Of equally unimportant candidates, the one that leaves the smallest model.
        return min(options, key=lambda name: (adds.get(name, -math.inf) / saved[name], sizes[name]))

    with bar() as progress:
        task, measured, at_least = progress.add_task("measuring blocks"), 0, len(options)
        while any(costs.of(left)[unit] > limit for unit, limit in limits.items()):
            if not options and timed:
                break
            if not options:
                reached = ", ".join(f"{costs.of(left)[unit] / full[unit]:.3f} of the {unit}" for unit in limits)
                raise UserError(f"nothing more can be removed, and {reached} remain: set a higher target")
            effect.keep(left)
            fresh: dict[str, float] = {}
            saved = {name: _saved(costs, left, option) if timed else 1 for name, option in options.items()}
            sizes = {name: tuple(costs.of(option).values()) for name, option in options.items()}
            while (name := first()) not in fresh:
                fresh[name] = effect.error(options[name])
                adds[name] = fresh[name] ** 2 - error**2
                measured += 1
                progress.update(task, completed=measured, total=max(measured, at_least))
            left, error = options[name], fresh[name]
            effects = effects or {option: fresh[option] for option in options}
            removed.append(Removal(name, error, **costs.of(left)))
            options = possible(left, kinds)
            progress.update(task, description=f"measuring blocks ({len(removed)} removed)")
    return Found(left, removed, effects, impossible(blocks, kinds))


def _saved(costs: BlockCosts, blocks: Blocks, left: Blocks) -> int:
    return max(costs.of(blocks)["latency"] - costs.of(left)["latency"], 1)


def impossible(blocks: Blocks, kinds: Collection[str]) -> dict[str, str]:
    """Groups of blocks from which nothing can be removed, to the reason."""
    reasons: dict[str, str | None] = {}
    for group, _, left in blocks.candidates(kinds):
        if reasons.get(group, "") is not None:
            reasons[group] = left.problem()
    return {group: reason for group, reason in reasons.items() if reason is not None}


def possible(blocks: Blocks, kinds: Collection[str]) -> dict[str, Blocks]:
    """The possible next removals, by name."""
    return {name: left for _, name, left in blocks.candidates(kinds) if left.problem() is None}


def _listed(kinds: Collection[str]) -> str:
    return " or ".join(kinds)
