"""The number that a search makes small or large, and the bounds it keeps to."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.folders import REPORT
from compress.errors import UserError, bad_value
from compress.report.table import COST, METRICS, number

if TYPE_CHECKING:
    from compress.evaluate import EvaluateConfig

# A cost may be named without its unit: latency is latency_s.
NAMES = {column.key.removesuffix("_s"): column for column in (*COST, *METRICS)}


@dataclass(frozen=True)
class SearchObjective:
    """What a search is for, in the numbers of the report's last row.

    Attributes:
        minimize: A cost or metric, such as ``latency`` (in seconds), ``bytes`` or ``fid``.
        maximize: The same; exactly one of the two is set.
        subject_to: Name to its bound: at most, or at least where more is better, as of ``clip_score``.
        stop_after: Name of a stage to bounds of the numbers after it: a run that exceeds one ends there.
    """

    minimize: str | None = None
    maximize: str | None = None
    subject_to: dict[str, float] = field(default_factory=dict)
    stop_after: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.minimize is None) == (self.maximize is None):
            raise UserError("minimize and maximize: expected exactly one of them")
        for key, name in [("minimize", self.minimize), ("maximize", self.maximize)]:
            if name is not None and name not in NAMES:
                raise bad_value(key, name, f"one of {', '.join(NAMES)}")
        for key, bounds in [("subject_to", self.subject_to)] + [
            (f"stop_after.{stage}", bounds) for stage, bounds in self.stop_after.items()
        ]:
            for name in bounds:
                if name not in NAMES:
                    raise bad_value(key, name, f"one of {', '.join(NAMES)}")

    def check(self, stages: Collection[str], evaluate: "EvaluateConfig") -> None:
        """Refuses stages that there are not, and numbers that will not be measured.

        Raises:
            UserError: With what would be right.
        """
        if unknown := set(self.stop_after) - set(stages):
            raise bad_value("objective.stop_after", min(unknown), f"names of stages: {', '.join(stages)}")
        bounds = [*self.subject_to, *(name for of in self.stop_after.values() for name in of)]
        for name in filter(None, (self.minimize, self.maximize, *bounds)):
            column = NAMES[name]
            if column.group == "metrics" and not (evaluate.images and evaluate.wants(column.key.partition(".")[0])):
                raise UserError(f"objective: {name} is not measured: give evaluate.images, and leave_out without it")
            if name == "compiled_latency" and not evaluate.compiled:
                raise UserError("objective: compiled_latency is not measured: give evaluate.compiled=true")

    def value(self, report: dict[str, Any]) -> float:
        """The objective itself, as measured; as bad as can be for a run that ended early."""
        if report.get("stopped"):
            return math.inf if self.minimize else -math.inf
        return _number(_last(report), self.minimize or self.maximize or "")

    def violations(self, report: dict[str, Any]) -> list[float]:
        """How far each bound is exceeded, as a share of it; 0 and below is kept."""
        return [_over(_last(report), name, bound) for name, bound in self.subject_to.items()]

    def exceeded(self, row: dict[str, Any]) -> str:
        """The bound for a stage that its row of the report exceeds, as text; empty if there is none.

        Raises:
            UserError: A number is not measured.
        """
        for name, bound in self.stop_after.get(row["name"], {}).items():
            if _over(row, name, bound) > 0:
                return f"{name} {_number(row, name):.6g} after {row['name']}, bound {bound:g}"
        return ""


def read_report(folder: Path) -> dict[str, Any]:
    """The ``report.json`` of a run."""
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report


def _last(report: dict[str, Any]) -> dict[str, Any]:
    return report.get("accelerated") or report["stages"][-1]


def _over(row: dict[str, Any], name: str, bound: float) -> float:
    over = (_number(row, name) - bound) / (abs(bound) or 1.0)
    return -over if NAMES[name].better == "up" else over


def _number(row: dict[str, Any], name: str) -> float:
    found = number(row, NAMES[name])
    if found is None:
        raise UserError(f"objective: the row {row['name']} of the report has no {name}: is it measured (evaluate.*)?")
    return found
