"""How often the 95 % intervals hold what they are of, by simulation: ``python benchmarks/coverage.py``.

Draws sets of n features again and again from a known distribution, the reference held fixed, and counts how many
intervals hold the statistic's expectation, estimated by the mean over all draws. Prints a Markdown table: the share in
percent and, in brackets, the mean width over that of 3.92 standard deviations. All of it takes about half an hour on
two cores; ``--repetitions``, ``--sizes 64x16,64x256`` and ``--kinds`` take less, and ``--resampled`` adds what
resampling pictures with replacement would give for the Fréchet distance.
"""

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from compress.evaluate.intervals import mean_interval
from compress.evaluate.metrics import KernelDistance, MaximumMeanDiscrepancy, PrecisionRecall, Retrieval
from compress.evaluate.metrics.frechet import frechet_interval

REFERENCE = 300  # pictures
RESAMPLES = 100  # of pictures, where they are resampled for comparison
KINDS = ("same", "gaussian", "rectified", "skewed", "heavy", "clustered")
SIZES = ("64x16", "64x256", "256x64", "256x512", "1000x32")
Interval = tuple[float, float, float]


def draw(kind: str, n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """A sample ``(n, d)``, float64, with a decaying spectrum.

    ``same`` and ``gaussian`` are normal; ``rectified`` is a mixed normal above a threshold, like a network's features;
    ``skewed`` log-normal of sigma 0.5; ``heavy`` Student's t of 10 degrees of freedom over whole rows, so that all
    features of a picture are large together; ``clustered`` six modes, the rarest with 10 %.
    """
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    fixed = torch.Generator().manual_seed(d)
    if kind == "rectified":
        z = (z @ torch.randn(d, d, generator=fixed, dtype=torch.float64) / d**0.5 - 0.3).relu()
    elif kind == "skewed":
        z = (0.5 * z).exp() - 1.13
    elif kind == "heavy":
        z = z / (torch.randn(n, 10, generator=generator, dtype=torch.float64).square().mean(dim=1, keepdim=True)).sqrt()
    elif kind == "clustered":
        centers = 2 * torch.randn(6, d, generator=fixed, dtype=torch.float64)
        shares = torch.tensor([0.3, 0.2, 0.15, 0.15, 0.1, 0.1])
        z = centers[torch.multinomial(shares, n, replacement=True, generator=generator)] + 0.5 * z
    return z * torch.logspace(0, -1, d, dtype=torch.float64)


def statistics(kind: str, n: int, d: int, seeds: range, resampled: bool) -> list[dict[str, Interval]]:
    """Value and interval of every metric for one draw after another."""
    torch.set_num_threads(1)
    # What is compared with: the distribution itself ("same"), or one that is shifted and narrower.
    reference = draw(kind, REFERENCE, d, torch.Generator().manual_seed(10**6))
    if kind != "same":
        reference = 0.9 * reference + 0.3 * reference.std(dim=0)
    return [_one(kind, n, d, torch.Generator().manual_seed(seed), reference, resampled) for seed in seeds]


def _one(
    kind: str, n: int, d: int, generator: torch.Generator, reference: torch.Tensor, resampled: bool
) -> dict[str, Interval]:
    fake = draw(kind, n, d, generator)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64) * reference.std(dim=0)
    student = fake + 0.5 * noise
    found = {"Fréchet": frechet_interval(fake, reference), "Fréchet, paired": frechet_interval(student, fake, True)}
    for name, metric in (("KID", KernelDistance()), ("CMMD", MaximumMeanDiscrepancy()), ("", PrecisionRecall())):
        metric.update(reference, real=True)
        metric.update(fake, real=False)
        result = metric.compute()
        found |= {name: result} if name else result
    retrieval = Retrieval()
    captions = torch.arange(n) // 2  # two pictures a caption
    retrieval.update(fake[captions * 2] + 0.175 * d**0.5 * noise, fake[captions * 2], captions)
    found |= {name.replace("r_at_", "R@"): result for name, result in retrieval.compute().items()}
    found["mean"] = mean_interval((fake - student).square().mean(dim=1))
    found["mean of one feature"] = mean_interval(fake[:, 0])
    intervals = {name: (row["value"], row["low"], row["high"]) for name, row in found.items()}
    if resampled:
        intervals |= _resampled(fake, reference, intervals["Fréchet"][0], generator)
    return intervals


def _resampled(
    fake: torch.Tensor, reference: torch.Tensor, value: float, generator: torch.Generator
) -> dict[str, Interval]:
    """The percentile bootstrap of whole pictures, as it is and moved so that its mean is the value."""
    real = reference - reference.mean(dim=0)
    factor = torch.linalg.qr(real).R if real.shape[0] > real.shape[1] else real
    values = []
    for _ in range(RESAMPLES):
        chosen = fake[torch.randint(len(fake), (len(fake),), generator=generator)]
        a = chosen - chosen.mean(dim=0)
        nuclear = torch.linalg.svdvals(a @ factor.T).sum() / ((len(a) - 1) * (len(real) - 1)) ** 0.5
        shift = (chosen.mean(dim=0) - reference.mean(dim=0)).square().sum()
        values.append(shift + a.square().sum() / (len(a) - 1) + real.square().sum() / (len(real) - 1) - 2 * nuclear)
    low, high = torch.quantile(torch.stack(values), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    center = float(torch.stack(values).mean())
    return {
        "Fréchet, pictures resampled": (value, low, high),
        "Fréchet, pictures resampled, centered": (value, value + low - center, value + high - center),
    }


def coverage(rows: list[Interval]) -> tuple[float, float]:
    """The share of intervals that hold the mean of the values, and their mean width over that of 3.92 deviations."""
    values, lows, highs = torch.tensor(rows, dtype=torch.float64).T
    mean, spread = values.mean(), values.std()
    inside = (lows <= mean + 1e-12) & (mean - 1e-12 <= highs)
    width = float((highs - lows).mean() / (3.92 * spread)) if spread > 0 else float("nan")
    return float(inside.double().mean()), width


def run(
    sizes: list[str], kinds: list[str], repetitions: int, workers: int, resampled: bool
) -> Iterator[tuple[str, str, dict[str, tuple[float, float]]]]:
    """Coverage and relative width by metric for every size and kind."""
    with ProcessPoolExecutor(workers) as pool:
        for size in sizes:
            n, d = (int(number) for number in size.split("x"))
            for kind in kinds:
                task: Callable[[range], Any] = partial(_task, kind, n, d, resampled)
                parts = [range(start, repetitions, 4 * workers) for start in range(4 * workers)]
                draws = [draw for part in pool.map(task, parts) for draw in part]
                yield size, kind, {name: coverage([row[name] for row in draws]) for name in draws[0]}


def _task(kind: str, n: int, d: int, resampled: bool, seeds: range) -> list[dict[str, Interval]]:
    return statistics(kind, n, d, seeds, resampled)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--sizes", default=",".join(SIZES), help="number of pictures x number of features")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resampled", action="store_true")
    arguments = parser.parse_args()
    sizes, kinds = arguments.sizes.split(","), arguments.kinds.split(",")
    names: list[str] = []
    for size, kind, found in run(sizes, kinds, arguments.repetitions, arguments.workers, arguments.resampled):
        if not names:
            names = list(found)
            print("| n x d | distribution | " + " | ".join(names) + " |")
            print("|---|---|" + "---|" * len(names))
        cells = [f"{100 * share:.1f} ({width:.2f})" for share, width in found.values()]
        print(f"| {size} | {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
