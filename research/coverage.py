"""How often the 95 % intervals hold what they are of, by simulation: ``python research/coverage.py``.

Draws sets of n features again and again from a known distribution, the reference held fixed, and counts how many
intervals hold the statistic's expectation, estimated by the mean over all draws. ``--images DIR`` (with
``--reference DIR`` and ``--captions FILE``) or ``--images embedded`` draw from a pool of real features instead.

Prints a Markdown table: the share in percent and, in brackets, the mean width over that of 3.92 standard deviations.
``const``: the statistic is the same in every draw, and every interval holds it. ``*``: it is the same in four draws of
five or more, so that a share between 90 and 99 % is a matter of luck. Below it stand the cells outside 90 to 99 %, each
with what its share may be after so many draws (Clopper and Pearson, 95 %). All of it takes twenty minutes on two cores.
``--repetitions``, ``--sizes 64x16,64x256``, ``--kinds`` and ``--metrics`` take less, ``--results FILE`` keeps every
draw and goes on where it was, and ``--resampled`` adds what resampling images with replacement would give for the
Fréchet distance.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

from compress.evaluate.intervals import mean_interval
from compress.evaluate.metrics import CLIPScore, KernelDistance, MaximumMeanDiscrepancy, PrecisionRecall, Retrieval
from compress.evaluate.metrics.frechet import frechet_interval

REFERENCE = 300  # images
RESAMPLES = 100  # of images, where they are resampled for comparison
KINDS = ("same", "gaussian", "rectified", "skewed", "heavy", "clustered")
KEPT_APART = ("laplace", "uneven", "bounded")  # distributions that no choice in the intervals was made on
SIZES = ("64x16", "64x256", "256x64", "256x512", "1000x32")
METRICS = ("frechet", "paired", "kid", "cmmd", "manifold", "retrieval", "means", "clip_score")
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Draw:
    """One draw of n images, and what they are compared with.

    Attributes:
        fake: Features ``(n, d)``, float64.
        reference: Features ``(m, d)``.
        clip: The same of another network, for CMMD; None without one, like those below.
        clip_reference: Of the same network.
        images: Embeddings of the images, and
        texts: of their captions, both ``(n, e)``.
        ids: Which caption each has, ``(n,)``.
        student: Features that belong to ``fake`` one by one.
    """

    fake: torch.Tensor
    reference: torch.Tensor
    clip: torch.Tensor | None = None
    clip_reference: torch.Tensor | None = None
    images: torch.Tensor | None = None
    texts: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    student: torch.Tensor | None = None


def draw(kind: str, n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """A sample ``(n, d)``, float64, with a decaying spectrum.

    ``same`` and ``gaussian`` are normal; ``rectified`` is a mixed normal above a threshold, like a network's features;
    ``skewed`` log-normal of sigma 0.5; ``heavy`` Student's t of 10 degrees of freedom over whole rows, so that all
    features of an image are large together; ``clustered`` six modes, the rarest with 10 %; ``laplace`` differences of
    exponentials; ``uneven`` twelve modes, the r-th in proportion to 1 / r; ``bounded`` logistic functions of normals.
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
    elif kind == "laplace":
        z = z.sign() * -torch.rand(n, d, generator=generator, dtype=torch.float64).clamp(min=1e-12).log() / 2**0.5
    elif kind == "uneven":
        centers = torch.randn(12, d, generator=fixed, dtype=torch.float64)
        z = centers[torch.multinomial(1 / torch.arange(1.0, 13), n, replacement=True, generator=generator)] + z
    elif kind == "bounded":
        z = 4 * (2 * z @ torch.randn(d, d, generator=fixed, dtype=torch.float64) / d**0.5).sigmoid()
    return z * torch.logspace(0, -1, d, dtype=torch.float64)


def synthetic(kind: str, size: str, seed: int) -> Draw:
    """A draw from a known distribution; its images come in twos with one caption.

    What it is compared with is of the distribution itself (``same``), or of one that is shifted and narrower.
    """
    n, d = (int(number) for number in size.split("x"))
    reference = draw(kind, REFERENCE, d, torch.Generator().manual_seed(10**6))
    if kind != "same":
        reference = 0.9 * reference + 0.3 * reference.std(dim=0)
    generator = torch.Generator().manual_seed(seed)
    fake = draw(kind, n, d, generator)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64) * reference.std(dim=0)
    ids = torch.arange(n) // 2
    images = fake[ids * 2] + 0.175 * d**0.5 * noise
    return Draw(fake, reference, fake, reference, images, fake[ids * 2], ids, fake + 0.5 * noise)


@cache
def _pool(*where: Any) -> Any:
    """The pool of this process; see ``pool.py`` beside this file."""
    import pool

    return pool.load(*where)


def pooled(where: tuple[Any, ...], size: str, seed: int) -> Draw:
    """A draw of different images of a pool."""
    found = _pool(*where)
    rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[: int(size)]
    images = {key: features[rows].double() for key, features in found.images.items()}
    real = {key: features.double() for key, features in found.reference.items()}
    seen = "inception" if "inception" in images else "clip"
    clip = images.get("clip")
    texts = None if found.texts is None else found.texts[rows].double()
    return Draw(images[seen], real[seen], clip, real.get("clip"), clip, texts, found.ids[rows])


def intervals(found: Draw, metrics: Sequence[str], resampled: bool) -> dict[str, Interval]:
    """Value and interval by the metric's title."""
    rows: dict[str, Any] = {}
    if "frechet" in metrics:
        rows["Fréchet"] = frechet_interval(found.fake, found.reference)
    if "paired" in metrics and found.student is not None:
        rows["Fréchet, paired"] = frechet_interval(found.student, found.fake, True)
    sets = (found.fake, found.reference)
    if "kid" in metrics:
        rows["KID"] = _compared(KernelDistance(), *sets)
    if "cmmd" in metrics and found.clip is not None:
        rows["CMMD"] = _compared(MaximumMeanDiscrepancy(), found.clip, found.clip_reference)
    if "manifold" in metrics:
        rows |= _compared(PrecisionRecall(), *sets)
    if "retrieval" in metrics and found.texts is not None:
        retrieval = Retrieval()
        retrieval.update(found.images, found.texts, found.ids)
        rows |= {name.replace("r_at_", "R@"): result for name, result in retrieval.compute().items()}
    if "means" in metrics and found.student is not None:
        rows["mean"] = mean_interval((found.fake - found.student).square().mean(dim=1))
        rows["mean of one feature"] = mean_interval(found.fake[:, 0])
    if "clip_score" in metrics and found.texts is not None and found.student is None:
        score = CLIPScore()
        score.update(found.images, found.texts)
        rows["CLIP score"] = score.compute()
    named: dict[str, Interval] = {
        name: (row["value"], row["low"], row["high"]) for name, row in rows.items() if row["low"] is not None
    }
    if resampled:
        named |= _resampled(*sets)
    return named


def _compared(metric: Any, fake: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    metric.update(reference, real=True)
    metric.update(fake, real=False)
    return metric.compute()


def _resampled(fake: torch.Tensor, reference: torch.Tensor) -> dict[str, Interval]:
    """The percentile bootstrap of whole images, as it is and moved so that its mean is the value."""
    generator = torch.Generator().manual_seed(0)
    real = reference - reference.mean(dim=0)
    factor = torch.linalg.qr(real).R if real.shape[0] > real.shape[1] else real
    value, values = frechet_interval(fake, reference)["value"], []
    for _ in range(RESAMPLES):
        chosen = fake[torch.randint(len(fake), (len(fake),), generator=generator)]
        a = chosen - chosen.mean(dim=0)
        nuclear = torch.linalg.svdvals(a @ factor.T).sum() / ((len(a) - 1) * (len(real) - 1)) ** 0.5
        shift = (chosen.mean(dim=0) - reference.mean(dim=0)).square().sum()
        values.append(shift + a.square().sum() / (len(a) - 1) + real.square().sum() / (len(real) - 1) - 2 * nuclear)
    low, high = torch.quantile(torch.stack(values), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    center = float(torch.stack(values).mean())
    return {
        "Fréchet, images resampled": (value, low, high),
        "Fréchet, images resampled, centered": (value, value + low - center, value + high - center),
    }


@dataclass(frozen=True)
class Coverage:
    """How a metric's intervals fared in one cell of the table.

    Attributes:
        draws: Number of draws.
        inside: Of these whose interval holds the mean of all values.
        width: Mean width of the intervals over 3.92 standard deviations of the values.
        most_common: How many draws have the same value.
        spread: Standard deviation of the values over their mean.
    """

    draws: int
    inside: int
    width: float
    most_common: int
    spread: float

    @property
    def constant(self) -> bool:
        """Whether the statistic is the same in every draw."""
        return self.spread <= 1e-12

    @property
    def tested(self) -> bool:
        """Whether there is anything that an interval may miss."""
        return not self.constant

    @property
    def share(self) -> float:
        """Of the intervals that hold the mean, in percent."""
        return 100 * self.inside / self.draws

    def __str__(self) -> str:
        if self.constant:
            return "const"
        mark = "*" if self.most_common >= 0.8 * self.draws else ""
        return f"{self.share:.1f} ({self.width:.2f}){mark}"


def coverage(rows: Sequence[Interval]) -> Coverage:
    """Counts the intervals that hold the mean of the values."""
    values = torch.tensor([value for value, _, _ in rows], dtype=torch.float64)
    mean, spread = float(values.mean()), float(values.std())
    inside = sum(low <= mean <= high for _, low, high in rows)
    width = sum(high - low for _, low, high in rows) / len(rows) / (3.92 * spread) if spread > 0 else float("nan")
    most_common = Counter(values.tolist()).most_common(1)[0][1]
    return Coverage(len(rows), inside, width, most_common, spread / abs(mean) if mean else spread)


def outside(cells: dict[str, Coverage]) -> str:
    """Says how many shares lie from 90 to 99 %, and for each other one what it may be after so many draws."""
    tested = {name: cell for name, cell in cells.items() if cell.tested}
    lines = []
    for name, cell in tested.items():
        if not 90 <= cell.share <= 99:
            low, high = binomtest(cell.inside, cell.draws).proportion_ci(method="exact")
            lines.append(f"- {name}: {cell}, {100 * low:.1f} to {100 * high:.1f} % after {cell.draws} intervals")
    within = len(tested) - len(lines)
    return "\n".join(
        [f"{within} of {len(tested)} shares lie from 90 to 99 %" + ("; outside:" if lines else "."), *lines]
    )


def run(
    cells: Sequence[tuple[str, str]], arguments: argparse.Namespace
) -> Iterator[tuple[str, str, dict[str, Coverage]]]:
    """The coverage by metric for every size and kind."""
    known: dict[tuple[str, str, int], dict[str, Interval]] = {}
    results = None if arguments.results is None else Path(arguments.results)
    if results is not None and results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            *cell, found = json.loads(line)
            known[tuple(cell)] = found
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.repetitions)
    with ProcessPoolExecutor(arguments.workers) as processes:
        for size, kind in cells:
            wanted = [seed for seed in seeds if (size, kind, seed) not in known]
            task = partial(_task, kind, size, arguments)
            for seed, found in zip(wanted, processes.map(task, wanted, chunksize=4), strict=True):
                known[size, kind, seed] = found
                if results is not None:
                    with results.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps([size, kind, seed, found]) + "\n")
            draws = [known[size, kind, seed] for seed in seeds]
            yield size, kind, {name: coverage([row[name] for row in draws]) for name in draws[0]}


def _task(kind: str, size: str, arguments: argparse.Namespace, seed: int) -> dict[str, Interval]:
    torch.set_num_threads(1)
    found = synthetic(kind, size, seed) if arguments.images is None else pooled(_where(arguments), size, seed)
    return intervals(found, arguments.metrics.split(","), arguments.resampled)


def _where(arguments: argparse.Namespace) -> tuple[Any, ...]:
    where = (arguments.images, arguments.reference, arguments.captions, Path(arguments.cache), arguments.clip)
    return *where, arguments.network, arguments.pool


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--sizes", help="images x features, such as 64x16; with --images, images alone")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"also {', '.join(KEPT_APART)}")
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--images", help="a folder, or embedded: a pool of real images to draw from")
    parser.add_argument("--reference", help="folder of the images that those of --images are compared with")
    parser.add_argument("--captions", help="csv or jsonl file with the captions of --images")
    parser.add_argument("--clip", help="folder or hub id of the CLIP model; emoji-clip if not given")
    parser.add_argument(
        "--network",
        choices=("inception", "clip", "stored"),
        default="inception",
        help="what the sets are compared through",
    )
    parser.add_argument("--pool", type=int, default=5000, help="at most so many of the embedded images")
    parser.add_argument("--cache", default="runs/coverage", help="folder for the features of --images")
    parser.add_argument("--results", help="file that keeps every draw, to go on with")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resampled", action="store_true")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    sizes = (arguments.sizes or ",".join(SIZES)).split(",")
    if arguments.images is not None:
        kinds = [f"{Path(arguments.images).name}, {arguments.network}"]
        sizes = (arguments.sizes or "64,256").split(",")
        _pool(*_where(arguments))  # once, before the processes share its cache
    names: list[str] = []
    cells: dict[str, Coverage] = {}
    for size, kind, found in run([(size, kind) for size in sizes for kind in kinds], arguments):
        if not names:
            names = list(found)
            print("| n x d | distribution | " + " | ".join(names) + " |")
            print("|---|---|" + "---|" * len(names))
        print(f"| {size} | {kind} | " + " | ".join(map(str, found.values())) + " |", flush=True)
        cells |= {f"{name}, {size} {kind}": cell for name, cell in found.items()}
    print(f"\n{outside(cells)}")


if __name__ == "__main__":
    main()
