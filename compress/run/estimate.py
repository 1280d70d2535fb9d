"""Estimates how long the parts of a run take, from earlier runs in the store."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.system.progress import Part

if TYPE_CHECKING:
    from compress.run.config import StageConfig
    from compress.run.keys import Plan
    from compress.store import Store

NEWEST = 200  # entries of the store that are read
DOING = {"prune": ("pruning", "pruned"), "distill": ("training", "trained"), "quantize": ("quantizing", "quantized")}
EVALUATION = "evaluation"


class Earlier:
    """What a store's newest entries say of times."""

    def __init__(self, store: "Store") -> None:
        """Reads them."""
        self.made = _newest(store.root.glob("[!.]*/compress.json"))
        self.evaluated = _newest((store.root / "evaluations").glob("*/evaluation.json"))

    def evaluation(self, like: str) -> float | None:
        """Seconds of the newest evaluation of the same model and settings, or None."""
        for found in self.evaluated:
            if found.get("like") == like and found.get("seconds") is not None:
                return float(found["seconds"])
        return None

    def stage(self, teacher: str, stage: "StageConfig") -> float | None:
        """Seconds of the newest checkpoint of the same method and model, scaled by steps and batch size, or None."""
        ours = asdict(stage.config)
        for info in self.made:
            entry = info["stages"][-1]
            alike = (entry.get("kind"), entry.get("method")) == (stage.kind, stage.method)
            if not alike or info.get("model", {}).get("fingerprint") != teacher or "seconds" not in entry:
                continue
            seconds, theirs = float(entry["seconds"]), entry.get("config") or {}
            for name in ("steps", "batch_size"):
                if isinstance(ours.get(name), int) and isinstance(theirs.get(name), int) and theirs[name]:
                    seconds *= ours[name] / theirs[name]
            return seconds
        return None


def parts(plan: "Plan", earlier: Earlier | None = None) -> list[Part]:
    """The parts of a run in order: the teacher's evaluation, the noise floor, each stage and its evaluation.

    Args:
        plan: Of the run.
        earlier: Of its store; read if None.
    """
    config, store = plan.config, plan.store
    earlier = earlier or Earlier(store)
    known = earlier.evaluation(plan.like)

    def evaluation(name: str, key: str) -> Part:
        there = store.evaluation_folder(key).exists()
        return Part(name, "evaluating", 0.0 if there else known, EVALUATION, key)

    found = [evaluation("teacher", plan.teacher_evaluation)]
    if config.evaluate.noise_floor and config.evaluate.images:
        found.append(evaluation("noise floor", plan.noise_floor))
    for step in plan.steps:
        seconds = 0.0 if step.cached else earlier.stage(plan.teacher, step.stage)
        found.append(Part(step.stage.name, doing(step.stage.kind)[0], seconds, key=step.key))
        found.append(evaluation(step.stage.name, plan.evaluation(step)))
    if config.engine is not None:
        found.append(evaluation(f"{config.stages[-1].name}, {config.engine}", plan.accelerated(plan.steps[-1])))
    return found


def doing(kind: str) -> tuple[str, str]:
    """Present participle and past participle for a kind of stage."""
    return DOING.get(kind, ("running", "done"))


def _newest(files: Any) -> list[dict[str, Any]]:
    """The content of the newest files; unreadable ones are skipped."""
    dated: list[tuple[float, Path]] = []
    for file in files:
        try:
            dated.append((file.stat().st_mtime, file))
        except OSError:
            continue
    found = []
    for _, file in sorted(dated, reverse=True)[:NEWEST]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found.append(content)
    return found
