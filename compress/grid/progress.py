"""How far a grid is, from what its store holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.errors import UserError
from compress.run import estimate
from compress.system.progress import Part, roughly

if TYPE_CHECKING:
    from compress.run.config import RunConfig
    from compress.run.keys import Plan
    from compress.store import Store


class Progress:
    """Counts the different stages of a grid, whichever process computes them.

    Args:
        configs: Of the points; one that cannot be planned, which its run will report, is left out.
    """

    def __init__(self, configs: "Sequence[RunConfig]") -> None:
        self._plans = [plan for plan in map(_plan, configs) if plan is not None]

    def line(self) -> str:
        """Such as ``grid: 4 of 30 stages, about 12 min left``; empty if no point runs stages."""
        earlier: dict[str, estimate.Earlier] = {}
        parts: dict[str, tuple[Part, Store]] = {}
        for plan in self._plans:
            root = str(plan.store.root)
            if root not in earlier:
                earlier[root] = estimate.Earlier(plan.store)
            parts |= {part.key: (part, plan.store) for part in estimate.parts(plan, earlier[root])}
        waiting = [part for part, store in parts.values() if not _there(part, store)]
        total = sum(part.like != estimate.EVALUATION for part, _ in parts.values())
        done = total - sum(part.like != estimate.EVALUATION for part in waiting)
        if not total:
            return ""
        if not waiting:
            return f"grid: {done} of {total} stages"
        seconds, sure = sum(part.seconds or 0.0 for part in waiting), all(part.seconds for part in waiting)
        left = f", {'about' if sure else 'over'} {roughly(seconds)} left" if sure or seconds > 10 else ""
        return f"grid: {done} of {total} stages{left}"


def _plan(config: "RunConfig") -> "Plan | None":
    from compress.run import preflight
    from compress.run.keys import Plan
    from compress.run.recipe import with_engines
    from compress.store import Store
    from compress.system import processes

    try:
        preflight.check_device(config.device)  # a launcher may find it on another machine
        device = processes.join(config.device)
        return Plan(with_engines(config, device), Store(config.store), device)
    except (UserError, OSError):
        return None


def _there(part: Part, store: "Store") -> bool:
    place = store.evaluation_folder(part.key) if part.like == estimate.EVALUATION else store.path(part.key)
    return place.exists()
