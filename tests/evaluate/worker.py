"""One of several processes that evaluate a teacher and a student; started by ``test_evaluate.py`` through torchrun."""

import json
import sys
from pathlib import Path

import torch

from compress.evaluate import EvaluateConfig, evaluate
from compress.system import processes
from tests.evaluate.parts import tiny_data
from tests.tiny import seeded, tiny_pipeline


class TinyNetwork:
    """Random features of images of any size, in place of Inception, which takes 0.1 s an image."""

    name, sha256, preprocessing = "tiny", "0123456789abcdef", "none"

    def __init__(self, *_: object) -> None:
        with seeded(5):
            self.layer = torch.nn.Linear(3 * 16, 24)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.nn.functional.adaptive_avg_pool2d(images / 255, 4).flatten(1)).relu()


def main(folder: Path) -> None:
    """Evaluates both and writes the metrics that each process has."""
    import compress.evaluate.networks.inception

    compress.evaluate.networks.inception.Inception = TinyNetwork  # type: ignore[assignment,misc]
    device = processes.join("cpu")
    how = {"device": device, "dtype": torch.float32, "seed": 5}
    values = {
        "images": 12,
        "batch_size": 4,
        "steps": 2,
        "grid": 2,
        "clip": str(folder / "clip"),
        "clip_name": "tiny-clip",
    }
    values |= {"reference_images": 10, "bootstrap": 20, "set_bootstrap": 10, "latency_repeats": 1}
    config, teacher = EvaluateConfig(**values), folder / "alone-together"  # type: ignore[arg-type]
    found = [evaluate(tiny_pipeline(0), tiny_data(), config, teacher, **how).metrics]
    student = evaluate(tiny_pipeline(1), tiny_data(), config, folder / "student-together", teacher=teacher, **how)
    found.append(student.metrics)
    every = processes.gather(found)
    if processes.is_main():
        (folder / "metrics.json").write_text(json.dumps(every))
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
