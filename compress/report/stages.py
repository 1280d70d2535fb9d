"""What each stage changed and took, and what the denoiser is made of before and after, in lines and a table."""

from collections.abc import Mapping
from typing import Any


def change(stage: Mapping[str, Any]) -> str:
    """The shape before and after in one line, from a stage's ``details``; empty if unchanged or unknown."""
    details = stage.get("details") or {}
    before, after = details.get("config_before") or {}, details.get("config_after") or {}
    if "widths_before" in details and "widths_after" in details:
        before = {"widths by level": details["widths_before"], **before}
        after = {"widths by level": details["widths_after"], **after}
    parts = [f"{name} {_text(before[name])} → {_text(value)}" for name, value in after.items() if name in before]
    return "; ".join(parts)


def effort(stage: Mapping[str, Any]) -> str:
    """Time and memory that computing a stage took; what is not known is left out."""
    parts = []
    if isinstance(stage.get("seconds"), int | float):
        parts.append(f"{stage['seconds']:.0f} s")
    if isinstance(stage.get("peak_memory_bytes"), int | float):
        what = stage.get("peak_memory_of") or "memory"
        parts.append(f"at most {stage['peak_memory_bytes'] / 1e9:.2f} GB of {what}")
    return ", ".join(parts)


def layer_types(result: Mapping[str, Any]) -> str:
    """A Markdown table of parameters and multiply-accumulates by the type of layer; empty where none were counted."""
    entries = [("teacher", result.get("teacher") or {})]
    entries += [(stage["name"], stage) for stage in result.get("stages", [])]
    counted = {name: entry["cost"] for name, entry in entries if (entry.get("cost") or {}).get("params_by_type")}
    if not counted:
        return ""
    types = list(dict.fromkeys(kind for cost in counted.values() for kind in _by_type(cost)))
    lines = ["| parameters (M), MACs (G) | " + " | ".join(name.replace("|", "\\|") for name in counted) + " |"]
    lines.append("|---|" + "---:|" * len(counted))
    for kind in types:
        pairs = [_by_type(cost).get(kind, (0, 0)) for cost in counted.values()]
        lines.append(f"| {kind} | " + " | ".join(f"{p / 1e6:.3g}, {m / 1e9:.3g}" for p, m in pairs) + " |")
    return "\n".join(lines) + "\n"


def _by_type(cost: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    params, macs = cost["params_by_type"], cost.get("macs_by_type") or {}
    return {kind: (params.get(kind, 0), macs.get(kind, 0)) for kind in [*params, *macs]}


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
