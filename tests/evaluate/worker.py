"""One of several processes that evaluate a teacher and a student; started by ``test_evaluate.py`` through torchrun."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.evaluate import EvaluateConfig, evaluate
from compress.evaluate.images import ImageFiles
from compress.evaluate.sample import image_paths
from compress.system import processes
from tests.evaluate.parts import tiny_clip, tiny_data
from tests.tiny import seeded, tiny_pipeline

HOW = {"device": torch.device("cpu"), "dtype": torch.float32, "seed": 5}


class TinyNetwork:
    """Random features of images of any size, in place of Inception, which takes 0.1 s an image."""

    name, sha256, preprocessing = "tiny", "0123456789abcdef", "none"

    def __init__(self, *_: object) -> None:
        with seeded(5):
            self.layer = torch.nn.Linear(3 * 16, 24)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.nn.functional.adaptive_avg_pool2d(images / 255, 4).flatten(1)).relu()


def settings(folder: Path, **changes: Any) -> EvaluateConfig:
    """Few images of all metrics, with the CLIP model in ``folder/clip``."""
    values = {"images": 12, "batch_size": 4, "steps": 2, "grid": 2, "clip": str(folder / "clip")}
    values |= {"clip_name": "tiny-clip", "reference_images": 10, "bootstrap": 20, "set_bootstrap": 10}
    return EvaluateConfig(**{**values, "latency_repeats": 1, **changes})


def evaluated(folder: Path, name: str = "together") -> list[dict[str, Any]]:
    """The metrics of a teacher and of a student, in this process."""
    import compress.evaluate.networks.inception

    compress.evaluate.networks.inception.Inception = TinyNetwork  # type: ignore[assignment,misc]
    config, teacher = settings(folder), folder / f"teacher-{name}"
    found = [evaluate(tiny_pipeline(0), tiny_data(), config, teacher, **HOW).metrics]
    student = evaluate(tiny_pipeline(1), tiny_data(), config, folder / f"student-{name}", teacher=teacher, **HOW)
    return [*found, student.metrics]


def evaluated_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What several processes must find, from this one."""
    monkeypatch.setattr("compress.evaluate.networks.inception.Inception", TinyNetwork)
    tiny_clip(folder / "clip")
    return evaluated(folder, "alone")


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Values and intervals by metric."""
    return {
        f"{name}.{part}": metric[part]
        for name, metric in metrics.items()
        if metric
        for part in ("value", "low", "high")
        if metric[part] is not None  # recall has no interval
    }


def check_alike(folder: Path, alone: list[dict[str, Any]], every: list[list[dict[str, Any]]]) -> None:
    """Fails if a process found other numbers, or all together other images, than one alone."""
    for found in every:
        for metrics, expected in zip(found, alone, strict=True):
            assert numbers(metrics) == pytest.approx(numbers(expected), rel=1e-4, abs=1e-9)
    for name in ("teacher", "student"):
        images = [ImageFiles(image_paths(folder / f"{name}-{where}" / "images", range(12)))[0:12]
                  for where in ("alone", "together")]  # fmt: skip
        assert torch.equal(*images)


def main(folder: Path) -> None:
    """Writes the metrics that each process has."""
    processes.join("cpu")
    every = processes.gather(evaluated(folder))
    if processes.is_main():
        (folder / "metrics.json").write_text(json.dumps(every))
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
