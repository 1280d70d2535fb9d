"""Time and memory of the metrics of sets, values and intervals, by the number of images.

``python research/intervals.py [--images 256 10000 30000] [--reference 40504] [--metrics kid manifold ...]`` gives
each metric random features in a process of its own and prints a Markdown table: seconds from features to value and
interval, and the most memory that the process held beyond the features. No network is run: what sampling and scoring of
as many images take is ``evaluation.py``'s to say.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from compress.evaluate import metrics as measures
from compress.evaluate.cost.memory import forget_peak, process_peak

INCEPTION, CLIP = 2048, 1024  # features
METRICS = {
    "fid": "Fréchet distance",
    "fid_teacher": "Fréchet distance, paired",
    "kid": "KID",
    "manifold": "precision and recall",
    "cmmd": "CMMD",
    "retrieval": "R@1, R@5",
    "clip_score": "CLIP score",
}


def features(n: int, d: int, seed: int) -> torch.Tensor:
    """Random features ``(n, d)``, float32, rectified as Inception's are."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).relu()


def filled(name: str, n: int, m: int) -> Any:
    """A metric that has seen n images, m of the reference or n captions."""
    if name in ("clip_score", "retrieval"):
        images, texts = features(n, CLIP, 0), features(n, CLIP, 1)
        texts += images
        if name == "clip_score":
            score = measures.CLIPScore()
            score.update(images, texts)
            return score
        retrieval = measures.Retrieval()
        retrieval.update(images, texts, torch.arange(n))
        return retrieval
    kinds: dict[str, Any] = {
        "fid": measures.FrechetDistance,
        "fid_teacher": lambda: measures.FrechetDistance(paired=True),
        "kid": measures.KernelDistance,
        "manifold": measures.PrecisionRecall,
        "cmmd": measures.MaximumMeanDiscrepancy,
    }
    metric = kinds[name]()
    width = CLIP if name == "cmmd" else INCEPTION
    metric.update(features(n, width, 0), real=False)
    metric.update(features(n if name == "fid_teacher" else m, width, 1), real=True)
    return metric


def measure(name: str, n: int, m: int) -> dict[str, float]:
    """Seconds and bytes; to be called once in a process."""
    metric = filled(name, n, m)
    forget_peak()
    before, begun = process_peak(), time.perf_counter()
    metric.compute()
    return {"seconds": time.perf_counter() - begun, "bytes": process_peak() - before}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[256, 10000, 30000])
    parser.add_argument("--reference", type=int, default=40504, help="images of the reference (COCO val2014)")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), choices=list(METRICS))
    parser.add_argument("--one", action="store_true", help="one cell in this process, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.metrics[0], options.images[0], options.reference)))
        return
    print("| metric | " + " | ".join(f"N = {n:,}" for n in options.images) + " |")
    print("|---|" + "---:|" * len(options.images))
    for name in options.metrics:
        cells = []
        for n in options.images:
            command = [sys.executable, __file__, "--one", "--metrics", name, "--reference", str(options.reference)]
            done = subprocess.run([*command, "--images", str(n)], stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            cells.append(f"{found['seconds']:.1f} s, {found['bytes'] / 2**30:.2f} GiB")
        print(f"| {METRICS[name]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
