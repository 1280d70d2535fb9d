"""A small distillation that tests run in this process, in one that gets killed, or in two at once.

``python worker.py FOLDER OUT [--kill-second-at STEP] [--sparse]`` writes the student's weights and
curves to OUT.
"""

import argparse
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from compress.data import Data
from compress.distill.batches import Batches
from compress.distill.features import Config, run
from compress.prune import sparse
from compress.prune.sparse import prune_sparse
from compress.stage import StageContext, StageReport
from tests.tiny import tiny_pipeline

SPARSE = {"kind": "prune", "method": "sparse", "declared": sparse.STAGE.declared(), "details": {}}
CONFIG = Config(
    steps=10,
    batch_size=4,
    gradient_accumulation=1,
    learning_rate=1e-4,
    warmup=0.2,
    save_every=3,
    log_every=2,
    ema_decay=0.9,
)


def images(count: int = 6, size: int = 20) -> datasets.Dataset:
    """Random images, two to a caption."""
    random = np.random.default_rng(0)
    made = [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": made, "text": [f"cat {i // 2}" for i in range(count)]}, features)


def data(rows: datasets.Dataset) -> Data:
    """Rows as a stage gets them."""
    return Data(train=rows, text=list(rows["text"]), fingerprint="", reference=None)


def distilled(
    folder: Path,
    config: Config = CONFIG,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    sparse: bool = False,
    **changes: Any,
) -> tuple[StableDiffusionPipeline, StageReport]:
    """Runs the stage on a narrower student, half of whose weights may be zero, and gives it with the report."""
    student = tiny_pipeline(seed=1, widths=(16, 32))
    if sparse:
        prune_sparse(student.unet)
    teacher = tiny_pipeline(seed=0)
    context = StageContext(
        load_teacher=lambda: teacher,
        data=data(images()),
        folder=folder,
        history=[{"kind": "prune", "details": {"kept": {"down_blocks.0": list(range(0, 32, 2))}}}],
        seed=3,
        device=torch.device("cpu"),
        dtype=torch.float32,
        log=log,
    )
    for name, value in changes.items():
        setattr(context, name, value)
    return student, run(student, config, context)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill-second-at", type=int, default=-1)
    parser.add_argument("--sparse", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    draw = Batches.__call__

    def batches(self: Batches, step: int, part: slice) -> Any:
        if step == arguments.kill_second_at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(self, step, part)

    Batches.__call__ = batches  # type: ignore[method-assign]
    changes = {"sparse": True, "history": [SPARSE]} if arguments.sparse else {}
    student, report = distilled(arguments.folder, **changes)
    assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    rank = os.environ.get("RANK", "0")
    save_file(student.unet.state_dict(), arguments.out.with_suffix(f".{rank}.safetensors"))
    arguments.out.with_suffix(f".{rank}.json").write_text(json.dumps(report.curves))


if __name__ == "__main__":
    main()
