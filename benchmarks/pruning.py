"""Importances, ratios and real latency of width pruning: ``python benchmarks/pruning.py``.

Prunes every level of a UNet by each ratio with each importance, and prints two Markdown tables. The first has what a
ratio leaves: parameters, MACs, and the latency of one pass, measured in rounds over all ratios in turn, so that what
else the machine does hits all alike. The second has the prediction's relative error to the unpruned UNet and the
diffusion loss on examples that no importance has seen, with 95 % intervals from ``--seeds`` choices of calibration
examples. Neither is distilled. About ten minutes on two cores with the embedded model.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.data import DataConfig, load_data
from compress.data.calibration import Calibration, CalibrationConfig, calibrate
from compress.evaluate.cost import latencies
from compress.models import ModelConfig, denoiser, load_teacher
from compress.models.inputs import example_inputs
from compress.models.macs import count
from compress.prune.channels.rebuild import prune_unet
from compress.prune.importance import families, make_scorer, parse
from compress.prune.sensitivity.error import UnchangedPrediction

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # of Student, two-sided, by the number of values
HELD_OUT = 10_000  # added to the seed of the examples that judge


def interval(values: list[float]) -> str:
    """Mean and 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = T_95.get(len(values), 2.6) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


@torch.no_grad()
def loss(calibration: Calibration, unet: nn.Module) -> float:
    """Mean diffusion loss over all examples."""
    losses = [calibration.losses(unet, part).sum() for part in calibration.parts()]
    return float(sum(losses)) / len(calibration.latents)


def measure_costs(unets: dict[float, Any], rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Parameters, MACs and latency of each, one round after the other."""
    inputs = {ratio: example_inputs(unet) for ratio, unet in unets.items()}
    seconds: dict[float, list[float]] = {ratio: [] for ratio in unets}
    for _ in range(rounds):
        for ratio, unet in unets.items():
            seconds[ratio] += latencies(unet, inputs[ratio], repeats, unet.device)
    rows = []
    for ratio, unet in unets.items():
        counted = count(unet, inputs[ratio])
        cost = {"params": counted.params, "macs": counted.macs, "latency_s": statistics.median(seconds[ratio])}
        rows.append({"ratio": ratio, "widths": list(unet.config.block_out_channels), **cost})
    return rows


def main() -> int:
    """Prints the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="embedded:emoji/pipeline")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.125, 0.25, 0.375, 0.5])
    parser.add_argument("--importances", nargs="+", default=list(families()), choices=list(families()))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    options = parser.parse_args()
    pipeline = load_teacher(ModelConfig(options.model))
    data = load_data(DataConfig("embedded:emoji/emoji.parquet", split_column="split"))
    unet: Any = denoiser(pipeline)
    narrow: dict[float, Any] = {0.0: unet}
    judges = calibrate(pipeline, data.train, CalibrationConfig(options.examples), HELD_OUT)
    reference = UnchangedPrediction(judges)
    found: dict[str, dict[float, dict[str, list[float]]]] = {}
    for name in options.importances:
        drawn = options.seeds if name not in ("l1", "l2") else 1
        for seed in range(drawn):
            calibration = calibrate(pipeline, data.train, CalibrationConfig(options.examples), seed)
            scorer = make_scorer(parse(name), calibration, seed)
            for ratio in options.ratios:
                pruned = prune_unet(unet, ratio, scorer).unet
                narrow[ratio] = pruned
                values = found.setdefault(name, {}).setdefault(ratio, {"error": [], "loss": []})
                values["error"].append(reference.error(pruned).relative)
                values["loss"].append(loss(judges, pruned))
    costs = measure_costs(narrow, options.rounds, options.repeats)
    full = costs[0]
    print("| ratio | widths | parameters | MACs | latency |\n|---:|---|---:|---:|---:|")
    for row in costs:
        shares = [f"{row[key]:,} ({row[key] / full[key]:.2f}x)" for key in ("params", "macs")]
        latency = f"{1000 * row['latency_s']:.2f} ms ({row['latency_s'] / full['latency_s']:.2f}x)"
        print(f"| {row['ratio']:g} | {', '.join(map(str, row['widths']))} | {' | '.join(shares)} | {latency} |")
    for key, title in (("error", "relative error of the prediction"), ("loss", "diffusion loss")):
        print(f"\n{title}, N = {options.examples}; unpruned {0 if key == 'error' else loss(judges, unet):.4f}\n")
        print("| importance | " + " | ".join(f"{ratio:g}" for ratio in options.ratios) + " |")
        print("|---|" + "---:|" * len(options.ratios))
        for name, by_ratio in found.items():
            print(f"| {name} | " + " | ".join(interval(by_ratio[ratio][key]) for ratio in options.ratios) + " |")
    if options.out:
        options.out.write_text(json.dumps({"costs": costs, "importances": found}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
