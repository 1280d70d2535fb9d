"""Blocks whose removal meets a target of measured latency."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from compress.data.calls import Call
from compress.errors import UserError, bad_value
from compress.models.inputs import Inputs, predict
from compress.prune.blocks import Blocks
from compress.prune.blocks.assemble import owner
from compress.prune.blocks.cost import BlockCosts
from compress.prune.blocks.effect import Effect
from compress.prune.blocks.greedy import Found, Removal, least_blocks, possible, search
from compress.prune.blocks.subject import Subject
from compress.prune.stopwatch import AIM, ATTEMPTS, TOLERANCE, MeasuredLatency, Stopwatch
from compress.runtime.arguments import Arguments

FURTHER = 0.7  # share of the target down to which removals are considered
WINDOW = 12  # removals of which any may stay
WHOLE = 1_000_000  # latency is counted in millionths of the whole denoiser's


class BlockLatencies:
    """The latency of a denoiser with fewer blocks, as a share of its current one.

    Every kind of block runs alone once; what all of them take adds up to a prediction. A whole denoiser that is
    measured corrects it: by the factor between the shares that were predicted and found to be saved.

    Args:
        subject: The denoiser; its costs get a unit ``latency``.
        stopwatch: Of this denoiser.
    """

    def __init__(self, subject: Subject, stopwatch: Stopwatch) -> None:
        self.subject, self.stopwatch = subject, stopwatch
        self.factor = 1.0
        modules = sorted(set(subject.blocks.names().values()))
        alone = _alone(subject.denoiser, modules, stopwatch)
        self.table = [{"block": name, "share": share} for name, share in alone.items()]
        counts = _own_shares(alone, modules)
        subject.costs = BlockCosts({**subject.costs.by_part, "latency": counts})

    def predicted(self, blocks: Blocks) -> float:
        """The predicted share, without correction."""
        return self.subject.costs.of(blocks)["latency"] / WHOLE

    def exact(self, blocks: Blocks) -> float:
        """The measured share; corrects predictions."""
        left = self.stopwatch.share(blocks.config())
        self._correct(blocks, left)
        return left

    def _correct(self, blocks: Blocks, left: float) -> None:
        predicted = self.predicted(blocks)
        if left < 1 and predicted < 1:
            self.factor = (1 - left) / (1 - predicted)

    def check(self, share: float, kinds: Collection[str]) -> None:
        """Refuse a target that no removal reaches.

        Raises:
            UserError: With the share that remains after every possible removal, or because nothing can be removed.
        """
        left = self.exact(least_blocks(self.subject.blocks, self.subject.costs, kinds, "latency"))
        if left > share * (1 + TOLERANCE):
            raise bad_value(
                "target.latency",
                share,
                f"at least {left:.2f}, which remains in {self.stopwatch.engine} without all possible "
                f"{', '.join(kinds)}",
            )

    def search(self, calls: Sequence[Call], kinds: Collection[str], share: float) -> tuple[Found, MeasuredLatency]:
        """Remove the blocks of least effect that meet a share.

        A greedy search, which goes further than to the share, orders the removals. Of those around the share, the ones
        are taken that are predicted to meet it with the least error, and measured.

        Args:
            calls: Recorded inputs and predictions of the denoiser.
            kinds: Kinds of blocks that may be removed.
            share: To be left.

        Raises:
            UserError: No removal that was tried meets it; with the nearest ones.
        """
        path = search(self.subject, calls, kinds, {"latency": FURTHER * share})
        tried: dict[str, float] = {}
        refused: set[str] = set()
        for _ in range(ATTEMPTS):
            factor = self.factor
            wanted = max(1 - (1 - share) / factor, 0.01)  # as the table predicts
            found = self._nearest(path.removed, kinds, wanted, refused)
            if found is None:
                break
            names, left = found
            refused.add(_shape(left[-1]))
            measured = tried[", ".join(names)] = self.exact(left[-1])
            again = self.stopwatch.confirm(left[-1].config()) if abs(measured / share - 1) <= TOLERANCE else None
            if again is not None and abs(again / share - 1) > TOLERANCE:
                self._correct(left[-1], (measured + again) / 2)
            elif again is not None:
                predicted = 1 - factor * (1 - self.predicted(left[-1]))
                engine, batch = self.stopwatch.engine, self.stopwatch.batch
                about = MeasuredLatency(engine, batch, predicted, again, self.table, list(tried.values()))
                return Found(left[-1], self._steps(names, left, calls), path.effects, path.skipped), about
        near = sorted(tried, key=lambda names: abs(tried[names] - share))[:2]
        listed = " or ".join(f"{tried[names]:.3f} (without {names})" for names in near)
        raise UserError(
            f"target.latency={share:g}: whole blocks do not meet this within 5 % in {self.stopwatch.engine}; nearest: "
            f"{listed}"
        )

    def _nearest(
        self, path: Sequence[Removal], kinds: Collection[str], wanted: float, refused: Collection[str]
    ) -> tuple[list[str], list[Blocks]] | None:
        """The removals of least error that are predicted to leave a share, and what remains after each.

        The first ones of the path stay, and some of the :data:`WINDOW` around the share.
        """
        latencies = [WHOLE, *(step.latency or 0 for step in path)]
        errors = [0.0, *(step.error**2 for step in path)]
        crossing = next((i for i, left in enumerate(latencies) if left <= WHOLE * wanted), len(path))
        fixed = max(0, crossing - 2 * WINDOW // 3)
        window = range(fixed, min(len(path), fixed + WINDOW))
        choices = []
        for mask in itertools.product((True, False), repeat=len(window)):
            kept = [i for i, on in zip(window, mask, strict=True) if on]
            left = latencies[fixed] - sum(latencies[i] - latencies[i + 1] for i in kept)
            error = sum(errors[i + 1] - errors[i] for i in kept)
            choices.append((max(abs(left / WHOLE / wanted - 1), AIM), error, [*range(fixed), *kept]))
        for off, _, steps in sorted(choices):
            names = [path[i].name for i in steps]
            blocks = self._without(names, kinds)
            if blocks and _shape(blocks[-1]) not in refused and abs(self.predicted(blocks[-1]) / wanted - 1) <= off:
                return names, blocks
        return None

    def _without(self, names: Sequence[str], kinds: Collection[str]) -> list[Blocks]:
        """What remains after each removal; nothing if one of them is not possible."""
        left = [self.subject.blocks]
        for name in names:
            option = possible(left[-1], kinds).get(name)
            if option is None:
                return []
            left.append(option)
        return left[1:]

    def _steps(self, names: Sequence[str], left: Sequence[Blocks], calls: Sequence[Call]) -> list[Removal]:
        effect, costs = Effect(self.subject, calls), self.subject.costs
        return [
            Removal(name, effect.error(blocks), **costs.of(blocks)) for name, blocks in zip(names, left, strict=True)
        ]


def _shape(blocks: Blocks) -> str:
    """The same for blocks that make a model of the same config, and so of the same latency."""
    return repr(blocks.config())


def _alone(denoiser: nn.Module, modules: Sequence[str], stopwatch: Stopwatch) -> dict[str, float]:
    """Share of the denoiser's latency that each part takes alone; those of one shape are measured once."""
    inputs = _inputs_of(denoiser, modules, stopwatch.inputs)
    kinds = {name: _kind(denoiser.get_submodule(name), inputs[name]) for name in modules}
    first = {kind: name for name, kind in reversed(kinds.items())}
    chosen = list(first.values())
    found = stopwatch.parts([denoiser.get_submodule(name) for name in chosen], [inputs[name] for name in chosen])
    shares = dict(zip(first, found, strict=True))
    return {name: shares[kinds[name]] for name in modules}


def _inputs_of(denoiser: nn.Module, modules: Sequence[str], inputs: Inputs) -> dict[str, Arguments]:
    """What each part is called with in one pass."""
    seen: dict[str, Arguments] = {}

    def record(name: str) -> Any:
        return lambda module, args, kwargs: seen.setdefault(name, Arguments.of(args, kwargs)) and None

    parts = [denoiser.get_submodule(name) for name in modules]
    hooks = zip(parts, map(record, modules), strict=True)
    handles = [part.register_forward_pre_hook(hook, with_kwargs=True) for part, hook in hooks]
    try:
        predict(denoiser, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _kind(module: nn.Module, call: Arguments) -> str:
    weights = [tuple(tensor.shape) for tensor in module.parameters()]
    return repr((type(module).__name__, weights, call.structure, call.shapes))


def _own_shares(alone: Mapping[str, float], modules: Collection[str]) -> dict[str, int]:
    """Each part's latency without that of the parts inside of it, in millionths; ``""`` is everything else."""
    own = dict(alone)
    for part in modules:
        if outer := owner(part.rpartition(".")[0], modules):
            own[outer] = max(own[outer] - alone[part], 0.0)
    total = sum(own.values())  # alone, parts may take longer than together
    counts = {part: round(WHOLE * share / max(total, 1.0)) for part, share in own.items()}
    return {"": max(WHOLE - sum(counts.values()), 0), **counts}
