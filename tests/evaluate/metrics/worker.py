"""What every metric gives for the same rows on one process or several: ``python worker.py OUT``.

The rows are split by rank, unevenly; ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` say how.
"""

import json
import os
import sys
from pathlib import Path

import torch

from compress.evaluate.metrics import (
    PSNR,
    SSIM,
    CLIPScore,
    FrechetDistance,
    KernelDistance,
    LatentPSNR,
    MaximumMeanDiscrepancy,
    MeanScore,
    MultiScaleSSIM,
    PrecisionRecall,
    Retrieval,
)
from tests.evaluate.metrics.draws import draw


def results(rank: int, world: int, batch: int, order: torch.Tensor, few: int) -> dict:
    """All metrics' results, with the rows before ``few`` on the first process and the others on the last."""
    fake, real = draw(40, 6, 1, 0.2), draw(50, 6, 2)
    images = (draw(40, 3 * 12 * 12, 3) * 200).clamp(0, 255).to(torch.uint8).view(40, 3, 12, 12)
    teacher = (images.int() + 9 * torch.arange(40).view(-1, 1, 1, 1)).clamp(0, 255).to(torch.uint8)
    mine = order if world == 1 else order[:few] if rank == 0 else order[few:]
    found = {}
    for name, metric, rows in (
        ("fid", FrechetDistance(), real),
        ("paired", FrechetDistance(paired=True), None),
        ("kid", KernelDistance(), real),
        ("cmmd", MaximumMeanDiscrepancy(), real),
        ("pr", PrecisionRecall(), real),
    ):
        for chunk in mine.split(batch):
            metric.update(fake[chunk], real=False)
            if rows is None:
                metric.update(real[chunk], real=True)
        if rows is not None and rank == 0:
            metric.update(rows, real=True)
        found[name] = metric.compute()
    pairs = {
        "psnr": (PSNR(), images, teacher),
        "ssim": (SSIM(), images, teacher),
        "ms_ssim": (MultiScaleSSIM(), images, teacher),
        "latents": (LatentPSNR(), fake.view(40, 1, 2, 3) + 1, real[:40].view(40, 1, 2, 3)),
        "clip": (CLIPScore(), fake, real[:40]),
        "mean": (MeanScore(), fake[:, 0]),
        "retrieval": (Retrieval(), fake, real[torch.arange(40) // 2], torch.arange(40) // 2),
    }
    for name, (metric, *values) in pairs.items():
        for chunk in mine.split(batch):
            metric.update(*(value[chunk] for value in values))
        found[name] = metric.compute()
    return found


def main() -> None:
    """The command line."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = [results(rank, world, 5, torch.arange(40), few) for few in (13, 0)]  # once with a process without any
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
