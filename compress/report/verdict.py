"""A run in one sentence: what the last stage left of the teacher, and whether its images differ beyond the noise."""

from collections.abc import Mapping
from typing import Any

from compress.report.footer import NO_NEARER, NOISE
from compress.report.table import Column, mark, number, significant, summary_metrics

Entry = Mapping[str, Any]


def verdict(result: Mapping[str, Any]) -> str:
    """The sentence; empty for a run without stages.

    Args:
        result: As in ``report.json``.
    """
    if not result.get("stages"):
        return ""
    if "refused" in result:
        return _alternatives(result)
    engine = result.get("accelerated") or {}
    teacher, last = result.get("teacher") or {}, engine or result["stages"][-1]
    cost = _cost(last, teacher)
    after = result["stages"][-1]["name"] + (f", run by {engine['engine']}," if engine else "")
    start = f"After {after} the model {f'has {cost}' if cost else 'is finished'}"
    return f"{start}; {_quality(result, last, teacher) or 'its images were not evaluated'}."


def _alternatives(result: Mapping[str, Any]) -> str:
    made = [stage["name"] for stage in result["stages"] if stage.get("kind") != "engine"]
    refused = list(result["refused"])
    text = f"{len(made)} alternative{'s' * (len(made) != 1)}, each made from the teacher alone: {', '.join(made)}"
    return f"{text}; not run: {', '.join(refused)}." if refused else f"{text}."


def _cost(last: Entry, teacher: Entry) -> str:
    """Such as ``0.58x of the teacher's parameters and 0.31x of its bytes at 0.88x its speed``, of what was measured."""
    sizes = []
    for key, name in (("params", "parameters"), ("bytes", "bytes")):
        ratio = _ratio(last, teacher, key)
        if ratio is not None:
            sizes.append(f"{'all' if ratio == 1 else f'{ratio:.2f}x'} of {{}} {name}")
    text = " and ".join(size.format("its" if place else "the teacher's") for place, size in enumerate(sizes))
    share = (last.get("cost") or {}).get("sparsity")
    if share and (last.get("cost") or {}).get("sparse_bytes") is not None:
        text += f", {100 * share:.0f} % zeros among its weights,"
    slower = _ratio(last, teacher, "latency_s")
    if slower:
        whose = "its" if text else "the teacher's"
        latency = Column("cost", "latency_s", "", ends=("latency_low_s", "latency_high_s"))
        same = mark(last, latency, teacher, {}) == NOISE
        speed = f"{whose} speed within the noise ({1 / slower:.2f}x)" if same else f"{1 / slower:.2f}x {whose} speed"
        text += f"{' at ' if text else ''}{speed}"
    return text


def _ratio(last: Entry, teacher: Entry, key: str) -> float | None:
    ours, theirs = (number(entry, Column("cost", key, "")) for entry in (last, teacher))
    return ours / theirs if ours is not None and theirs else None


def _quality(result: Entry, last: Entry, teacher: Entry) -> str:
    """The metrics of the short table with the teacher's beside them, and what they say together."""
    floor = result.get("noise_floor") or {}
    shown, better, worse, unsure, same, no_nearer = [], [], [], [], [], False
    for column in summary_metrics(result):
        value, other = number(last, column), number(floor if column.paired else teacher, column)
        if value is None:
            continue
        name, _, unit = column.title.partition(" (")
        unit = f" {unit.rstrip(')')}" if unit else ""
        whose = "other seeds" if column.paired else "teacher"
        text = f"{name} {significant(value, column)}{unit}"
        shown.append(text + (f" ({whose} {significant(other, column)})" if other is not None else ""))
        found = mark(last, column, teacher, floor)
        if column.paired:
            no_nearer = no_nearer or found == NO_NEARER
        elif found == NOISE:
            same.append(name)
        elif other is None or any(number(entry, column, "low") is None for entry in (last, teacher)):
            unsure.append(name)
        elif (value < other) == (column.better == "down"):
            better.append(name)
        else:
            worse.append(name)
    if not shown:
        return ""
    n = max((metric.get("n") or 0 for metric in last["metrics"].values() if isinstance(metric, Mapping)), default=0)
    text = f"{f'on {n} images ' if n else ''}{', '.join(shown)}"
    says = _conclusion(better, worse, same, unsure)
    if no_nearer:
        says = [*says, "they are no nearer to the teacher's than images of other seeds"]
    return f"{text}: {', and '.join(says)}" if says else text


def _conclusion(better: list[str], worse: list[str], same: list[str], unsure: list[str]) -> list[str]:
    if better and worse:
        return [
            f"{' and '.join(better)} {_is(better)} better and {' and '.join(worse)} {_is(worse)} worse than the "
            "teacher's, beyond the noise"
        ]
    if better or worse:
        return [f"its images are {'better' if better else 'worse'} than the teacher's beyond the noise"]
    if same:
        return ["no difference from the teacher's images beyond the noise"]
    return ["how large the noise is was not measured"] if unsure else []


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
