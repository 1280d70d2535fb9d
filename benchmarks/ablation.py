"""Which way of pruning is best before and after the same distillation: ``python benchmarks/ablation.py``.

Runs ``recipe=prune_distill`` once for every choice of ``prune=``, ratio and seed, and prints a Markdown table: mean
over the seeds of each metric before and after distillation, with the 95 % interval of that mean, and below it the
differences to the first choice, paired by seed. A seed draws the calibration examples, the order and noise of the
distillation, and the noise of the images.

All choices are compared at equal multiply-accumulates: where a choice takes a ratio of channels, the same ratio leaves
the same; any other choice is given as target what the first one has left at that ratio, and so is one that takes a
ratio where it is written with ``:target`` (``magnitude:target``: widths by the levels' sensitivity). Every run is
resumed or found again in the store, so the command may be stopped and repeated. About five minutes a run on two cores
with the embedded model; what follows ``--`` is handed on to every run.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

BY_CHANNELS = ("magnitude", "random", "activation", "taylor", "diff_pruning", "hessian")
METRICS = {  # name to (title, decimals)
    "latent_psnr": ("one-step latent PSNR (dB) ↑", 2),
    "psnr": ("PSNR (dB) ↑", 2),
    "fid": ("FID ↓", 1),
    "kid": ("KID ↓", 4),
    "clip_score": ("CLIP score ↑", 1),
}
STAGES = ("prune", "distill")


@dataclass(frozen=True)
class Cell:
    """One choice at one ratio."""

    choice: str
    ratio: float


def main() -> int:
    """Runs everything and prints the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--choices", nargs="+", default=["magnitude", "random", "taylor"], help="of prune=, first: control"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5], help="of channels, each in (0, 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablation"), help="folder of the runs and of ablation.json"
    )
    parser.add_argument("overrides", nargs="*", help="of the recipe, after --")
    options = parser.parse_args()
    if options.choices[0] not in BY_CHANNELS:
        parser.error(f"the first of --choices gives the others their target: one of {', '.join(BY_CHANNELS)}")
    found: dict[Cell, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for ratio in options.ratios:
            share = None
            for choice in options.choices:
                report = run(options.out, choice, ratio, share, seed, options.overrides)
                share = share or report["stages"][0]["cost"]["macs"] / report["teacher"]["cost"]["macs"]
                found.setdefault(Cell(choice, ratio), []).append(report)
    print(f"{len(options.seeds)} seeds; N = {found_n(found)}; {' '.join(options.overrides)}\n")
    print("\n".join(table(found)))
    print(f"\nDifference to {options.choices[0]}, paired by seed\n")
    print("\n".join(differences(found, options.choices[0])))
    return 0


def run(out: Path, choice: str, ratio: float, share: float | None, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The report of one run of the recipe.

    Args:
        out: Folder of all runs and their store.
        choice: Of ``prune=``, perhaps with ``:target``.
        ratio: Of channels.
        share: Of the multiply-accumulates that are to be left, for choices that know no ratio of channels.
        seed: Of the run.
        overrides: Further ones of the recipe.

    Raises:
        SystemExit: The run failed; its messages have been printed.
    """
    how = f"stages.prune.ratio={ratio}" if choice in BY_CHANNELS else f"stages.prune.target.macs={share}"
    folder, name = out / f"{choice.replace(':', '-')}-{ratio:g}-{seed}", choice.removesuffix(":target")
    command = [sys.executable, "-m", "compress", "recipe=prune_distill", f"prune={name}", how, f"seed={seed}"]
    command += [f"out={folder}", f"store={out / 'store'}", "track=none", "evaluate.noise_floor=false", *overrides]
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(1)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def values(reports: list[dict[str, Any]], stage: int, metric: str) -> list[float]:
    """A metric of a stage, one value a seed."""
    return [report["stages"][stage]["metrics"][metric]["value"] for report in reports]


def interval(numbers: list[float], decimals: int, sign: str = "") -> str:
    """Mean and the half width of Student's 95 % interval of it."""
    mean = f"{statistics.mean(numbers):{sign}.{decimals}f}"
    if len(numbers) < 2:
        return mean
    half = student.ppf(0.975, len(numbers) - 1) * statistics.stdev(numbers) / len(numbers) ** 0.5
    return f"{mean} ± {half:.{decimals}f}"


def measured(found: dict[Cell, list[dict[str, Any]]]) -> list[str]:
    """The metrics that the runs have."""
    first = next(iter(found.values()))[0]["stages"][0]["metrics"]
    return [name for name in METRICS if first.get(name) is not None]


def found_n(found: dict[Cell, list[dict[str, Any]]]) -> int:
    """Images behind each metric."""
    return int(next(iter(found.values()))[0]["stages"][0]["metrics"]["fid"]["n"])


def table(found: dict[Cell, list[dict[str, Any]]]) -> Iterator[str]:
    """Markdown: a row for each choice, ratio and stage."""
    names = measured(found)
    yield "| prune= | ratio | MACs | after | " + " | ".join(METRICS[name][0] for name in names) + " |"
    yield "|---|---:|---:|---|" + "---:|" * len(names)
    for cell, reports in found.items():
        macs = [r["stages"][0]["cost"]["macs"] / r["teacher"]["cost"]["macs"] for r in reports]
        for number, stage in enumerate(STAGES):
            numbers = [interval(values(reports, number, name), METRICS[name][1]) for name in names]
            yield f"| {cell.choice} | {cell.ratio:g} | {statistics.mean(macs):.3f}x | {stage} | {' | '.join(numbers)} |"


def differences(found: dict[Cell, list[dict[str, Any]]], control: str) -> Iterator[str]:
    """Markdown: how far each choice is from the control at the same ratio, stage and seed."""
    names = measured(found)
    yield "| prune= | ratio | after | " + " | ".join(METRICS[name][0] for name in names) + " |"
    yield "|---|---:|---|" + "---:|" * len(names)
    for cell, reports in found.items():
        if cell.choice == control:
            continue
        others = found[Cell(control, cell.ratio)]
        for number, stage in enumerate(STAGES):
            numbers = []
            for name in names:
                pairs = zip(values(reports, number, name), values(others, number, name), strict=True)
                numbers.append(interval([ours - theirs for ours, theirs in pairs], METRICS[name][1], "+"))
            yield f"| {cell.choice} | {cell.ratio:g} | {stage} | {' | '.join(numbers)} |"


if __name__ == "__main__":
    sys.exit(main())
