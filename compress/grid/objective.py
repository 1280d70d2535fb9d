"""The number that a search makes small or large, and the bounds it keeps to."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.config.folders import REPORT
from compress.errors import UserError, bad_value
from compress.report.table import COST, METRICS

# A cost may be named without its unit: latency is latency_s.
NAMES = {column.key.removesuffix("_s"): column for column in (*COST, *METRICS)}


@dataclass(frozen=True)
class SearchObjective:
    """What a search is for, in the numbers of the report's last row.

    Attributes:
        minimize: A cost or metric, such as ``latency`` (in seconds), ``bytes`` or ``fid``.
        maximize: The same; exactly one of the two is set.
        subject_to: Name to its bound: at most, or at least where more is better, as of ``clip_score``.
    """

    minimize: str | None = None
    maximize: str | None = None
    subject_to: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.minimize is None) == (self.maximize is None):
            raise UserError("minimize and maximize: expected exactly one of them")
        for key, name in [("minimize", self.minimize), ("maximize", self.maximize)]:
            if name is not None and name not in NAMES:
                raise bad_value(key, name, f"one of {', '.join(NAMES)}")
        for name in self.subject_to:
            if name not in NAMES:
                raise bad_value("subject_to", name, f"one of {', '.join(NAMES)}")

    def value(self, report: dict[str, Any]) -> float:
        """The objective itself, as measured."""
        return _number(report, self.minimize or self.maximize or "")

    def violations(self, report: dict[str, Any]) -> list[float]:
        """How far each bound is exceeded, as a share of it; 0 and below is kept."""
        found = []
        for name, bound in self.subject_to.items():
            over = (_number(report, name) - bound) / (abs(bound) or 1.0)
            found.append(-over if NAMES[name].better == "up" else over)
        return found


def read_report(folder: Path) -> dict[str, Any]:
    """The ``report.json`` of a run."""
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report


def _number(report: dict[str, Any], name: str) -> float:
    row, column = report.get("accelerated") or report["stages"][-1], NAMES[name]
    found = row[column.group].get(column.key)
    found = found.get("value") if isinstance(found, dict) else found
    if found is None:
        raise UserError(f"objective: the last row of the report has no {name}: is it measured (evaluate.*)?")
    return float(found)
