"""What each step of a recipe gains, prompt to pixels, and what it costs: ``python benchmarks/chain.py RUN [RUN ...]``.

RUN is the folder of a finished run, such as one of ``recipe=prune_distill_lcm_int8``; a further one, with another
``evaluate.few_steps``, adds rows. The first row is the teacher as its pipeline comes: eager fp32, its own scheduler
with 50 steps, guidance. All rows are timed in turns in one process; seconds are medians. Quality is that of the runs'
reports, whose rows were sampled with the same scheduler and steps.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

import compress
from compress.evaluate import EvaluateConfig
from compress.evaluate.sample import call, own_settings, sampler
from compress.models.sampling import sampling_of
from compress.runtime.turns import turns

PROMPT = "hot dog, noto emoji"
METRICS = {"fid": "FID", "clip_score": "CLIP score", "psnr": "PSNR (dB)"}


def drawing(pipeline: Any, config: EvaluateConfig) -> Callable[[], Any]:
    """A call that draws one image."""
    return partial(call, sampler(pipeline, config), [PROMPT], [0], config)


def rows(run: Path, first: bool) -> dict[str, tuple[Callable[[], Any], Mapping[str, Any]]]:
    """Name of a row to what draws an image, and its metrics."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    asked = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["evaluate"]
    keys = ("steps", "guidance", "scheduler", "height", "width", "few_steps")
    config = EvaluateConfig(**{key: asked[key] for key in keys})
    found: dict[str, tuple[Callable[[], Any], Mapping[str, Any]]] = {}
    if first:
        teacher = compress.load(report["teacher"]["path"])
        slow = EvaluateConfig(steps=50, guidance=config.guidance, scheduler="checkpoint")
        name = type(teacher.scheduler).__name__.removesuffix("Scheduler")
        found[f"teacher, eager, {name} 50 steps"] = drawing(teacher, slow), {}
        how, metrics = f"{config.scheduler} {config.steps} steps", report["teacher"]["metrics"]
        found[f"teacher, eager, {how}"] = drawing(teacher, config), metrics
        found[f"teacher, engine, {how}"] = drawing(compress.accelerate(teacher, text_encoder="auto"), config), metrics
    for stage in report["stages"]:
        student = compress.load(stage["checkpoint"])
        own = sampling_of(student)
        if own.steps is None and not first:
            continue  # the same as in the first run
        settings = own_settings(config, own)
        name = f"{stage['name']}, engine, {settings.steps} step{'s' if settings.steps > 1 else ''}"
        found[name] = drawing(compress.accelerate(student, text_encoder="auto"), settings), stage["metrics"]
    return found


def shown(metrics: Mapping[str, Any], name: str) -> str:
    """A metric with its interval."""
    found = metrics.get(name)
    return f"{found['value']:.1f} [{found['low']:.1f}, {found['high']:.1f}]" if found else "–"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args()
    table: dict[str, tuple[Callable[[], Any], Mapping[str, Any]]] = {}
    for run in asked.runs:
        table |= rows(run, first=not table)
    timed = turns({name: draw for name, (draw, _) in table.items()}, asked.repeats, torch.device("cpu"))
    seconds = {name: statistics.median(found) for name, found in timed.items()}
    base = next(iter(seconds.values()))
    print(f"One image, prompt to pixels, {torch.get_num_threads()} threads\n")
    print("| | ms | times as fast | " + " | ".join(METRICS.values()) + " |\n|---|---:|---:|" + "---:|" * len(METRICS))
    for name, (_, metrics) in table.items():
        cells = " | ".join(shown(metrics, metric) for metric in METRICS)
        print(f"| {name} | {1e3 * seconds[name]:.1f} | {base / seconds[name]:.1f} | {cells} |")


if __name__ == "__main__":
    main()
