"""What a run is expected to take, from the store."""

import json
import time
from pathlib import Path

import torch

from compress.config.compose import compose
from compress.run.config import to_run_config
from compress.run.estimate import parts
from compress.run.keys import Plan
from compress.store import Store


def test_parts_know_what_earlier_runs_took(tiny_overrides: list[str], tmp_path: Path) -> None:
    overrides = ["recipe=prune_distill_int8", *tiny_overrides, "stages.distill.steps=20", f"store={tmp_path}"]
    config = to_run_config(compose(overrides))
    plan = Plan(config, Store(tmp_path), torch.device("cpu"))
    assert [(part.name, part.doing, part.seconds) for part in parts(plan)] == [
        ("teacher", "evaluating", None),
        ("prune", "pruning", None), ("prune", "evaluating", None),
        ("distill", "training", None), ("distill", "evaluating", None),
        ("quantize", "quantizing", None), ("quantize", "evaluating", None),
    ]  # fmt: skip

    def store(name: str, content: object) -> None:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(content))
        time.sleep(0.01)  # the newest counts

    batch = config.stages[1].config.batch_size
    for key, model, seconds, steps in (("a", plan.teacher, 30.0, 10), ("b", "another", 1.0, 10)):
        own = {
            "kind": "distill",
            "method": "features",
            "seconds": seconds,
            "config": {"steps": steps, "batch_size": batch},
        }
        store(f"{key}/compress.json", {"model": {"fingerprint": model}, "stages": [{"name": "x"}, own]})
    store("evaluations/c/evaluation.json", {"like": plan.like, "seconds": 7.0})
    store("evaluations/d/evaluation.json", {"like": "another", "seconds": 1.0})
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "compress.json").write_text("{")  # being written by another run
    (tmp_path / "evaluations" / plan.teacher_evaluation).mkdir()
    assert [part.seconds for part in parts(plan)] == [0.0, None, 7.0, 60.0, 7.0, None, 7.0]
