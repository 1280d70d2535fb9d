"""How fast a student is distilled, beside a loop as public scripts write it: ``python benchmarks/distill.py [MODEL]``.

The student is the model with a quarter of its channels pruned. The public loop follows the scripts of BK-SDM and of
diffusers: images are decoded and augmented, encoded by the VAE and the text encoder in every step; student and teacher
run eagerly in the default memory layout, with torch's fused attention; AdamW and EMA as they come. All rows train the
same student with the same batch size in turns in one process; each turn starts from the student's first weights. The
losses of this trainer's rows can be compared; the public loop's are plain errors, which are other numbers. Seconds are
medians over steps, without the first of each turn; with ``--cpu-time`` those of the processor, for a machine that is
busy otherwise (one thread). The peak memory is that of a process of its own.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import compress
from compress.api import _load_data
from compress.data.examples import Examples, cached_examples
from compress.distill import trainer as trainer_module
from compress.distill.alignment import kept_channels, tapped
from compress.distill.features import Config, distill
from compress.distill.state import Record
from compress.models import denoiser
from compress.models.schedule import schedule_of
from compress.runtime import cache_folder
from compress.runtime.turns import synchronize
from compress.system.allocator import keep_freed_memory

DATA = "embedded:emoji/emoji.parquet"
PARTS = ("data", "encode", "teacher", "student", "backward", "optimizer")
ROWS: dict[str, dict[str, Any]] = {
    "public loop": {},
    "this trainer": {},
    "fused": {"optimizer": "adamw_fused"},
    "teacher openvino": {"teacher_engine": "openvino", "optimizer": "adamw_fused"},
    "bf16": {"mixed_precision": "bf16", "optimizer": "adamw_fused"},
    "bf16, openvino": {"teacher_engine": "openvino", "mixed_precision": "bf16", "optimizer": "adamw_fused"},
    "bf16, openvino, muon": {"teacher_engine": "openvino", "mixed_precision": "bf16", "optimizer": "muon"},
}  # fmt: skip


class Clock:
    """Seconds of every part of every step.

    Args:
        device: Where they compute.
        now: Reads a clock.
    """

    def __init__(self, device: torch.device, now: Callable[[], float]) -> None:
        self.device, self.now = device, now
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the block's time to a part of the step."""
        synchronize(self.device)
        began = self.now()
        yield
        synchronize(self.device)
        self._now[name] = self._now.get(name, 0.0) + self.now() - began

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is added to a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def end(self, whole: float) -> None:
        """Ends a step that took ``whole`` seconds."""
        parts = self._now
        if "forward" in parts:
            parts["student"] = parts.pop("forward") - parts.get("teacher", 0.0)
        self.steps.append({**parts, "step": whole})
        self._now = {}


class Setting:
    """What all rows train with."""

    def __init__(self, model: str, device: torch.device, batch: int, now: Callable[[], float]) -> None:
        self.device, self.batch, self.now = device, batch, now
        self.teacher = compress.load(model).to(device)
        self.student, report = compress.prune(self.teacher, "magnitude", ratio=0.25)
        self.history = [{"kind": "prune", "details": report.details}]
        self.data = _load_data(DATA).train
        self.config = Config(batch_size=batch, save_every=10**6)

    def examples(self, folder: Path) -> Examples:
        """Encoded once, as the trainer takes them."""
        return cached_examples(self.teacher, self.data, folder, max_examples=1024, seed=0)


def ours(
    setting: Setting, values: dict[str, Any], steps: int, folder: Path
) -> tuple[list[dict[str, float]], list[float]]:
    """Steps of this trainer; their times and losses."""
    clock, losses = Clock(setting.device, setting.now), []

    def train(trainer: trainer_module.Trainer) -> Record:
        trainer.model, trainer._began = trainer.objective, time.perf_counter()
        trainer.batches = clock.timed("data", trainer.batches)
        objective, accelerator, optimizer, ema = trainer.model, trainer.accelerator, trainer.optimizer, trainer.ema
        objective._teacher = clock.timed("teacher", objective._teacher)
        objective.forward = clock.timed("forward", objective.forward)
        accelerator.backward = clock.timed("backward", accelerator.backward)
        optimizer.step, ema.step = (clock.timed("optimizer", made.step) for made in (optimizer, ema))
        clipped = clock.timed("optimizer", torch.nn.utils.clip_grad_norm_)
        with mock.patch.object(torch.nn.utils, "clip_grad_norm_", clipped):
            for step in range(steps):
                began = clock.now()
                figures, _ = trainer._step(step, lambda: False)
                clock.end(clock.now() - began)
                losses.append(figures[0])
                trainer.record.window.append(figures)
        trainer._point()
        return trainer.record

    student = copy.deepcopy(denoiser(setting.student))
    with mock.patch.object(trainer_module.Trainer, "train", train):
        distill(
            student, denoiser(setting.teacher), setting.examples(folder), setting.student.scheduler,
            replace(setting.config, **values), device=setting.device, history=setting.history, graphs=cache_folder(),
        )  # fmt: skip
    return clock.steps, losses


def public(setting: Setting, steps: int) -> tuple[list[dict[str, float]], list[float]]:
    """Steps of a loop as public scripts write it."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    pipeline, config, device = setting.teacher, setting.config, setting.device
    teacher, student = denoiser(pipeline), copy.deepcopy(denoiser(setting.student)).train().requires_grad_(True)
    vae, text_encoder, tokenizer = pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    processor, schedule = VaeImageProcessor(vae.config.get("scale_factor", 8)), schedule_of(pipeline.scheduler)
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=15, num_training_steps=config.steps)
    average = EMAModel(student.parameters(), config.ema_decay)
    kept = {name: torch.tensor(indices, device=device) for name, indices in kept_channels(setting.history).items()}
    side = teacher.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = processor.preprocess([row["image"].convert("RGB").resize((side, side)) for row in rows])
        ids = tokenizer(
            [row["text"] for row in rows], padding="max_length", truncation=True,
            max_length=tokenizer.model_max_length, return_tensors="pt",
        ).input_ids  # fmt: skip
        return pixels, ids

    torch.manual_seed(0)
    loader = iter(
        torch.utils.data.DataLoader(setting.data, setting.batch, shuffle=True, collate_fn=collate, drop_last=True)
    )  # type: ignore[arg-type]
    clock, losses = Clock(device, setting.now), []
    with tapped(student, kept) as mine, tapped(teacher, kept) as theirs:
        for _ in range(steps):
            began = clock.now()
            with clock.part("data"):
                pixels, ids = (tensor.to(device) for tensor in next(loader))
            with clock.part("encode"), torch.no_grad():
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                states = text_encoder(ids)[0]
            noise = torch.randn_like(latents)
            times = torch.randint(0, schedule.steps, (len(latents),), device=device)
            noisy = schedule.add_noise(latents, noise, times)
            target = schedule.target(latents, noise, times)
            with clock.part("teacher"), torch.no_grad():
                wanted = teacher(noisy, times, states).sample
            with clock.part("student"):
                output = student(noisy, times, states).sample
                loss = F.mse_loss(output, target) + F.mse_loss(output, wanted)
                for name, indices in kept.items():
                    loss = loss + 0.1 * F.mse_loss(mine[name], theirs[name].index_select(1, indices))
            with clock.part("backward"):
                loss.backward()
            with clock.part("optimizer"):
                torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
                average.step(student.parameters())
            losses.append(loss.item())
            clock.end(clock.now() - began)
    return clock.steps, losses


def run(row: str, setting: Setting, steps: int, folder: Path) -> tuple[list[dict[str, float]], list[float]]:
    """One turn of a row, but for its first step."""
    times, losses = public(setting, steps) if row == "public loop" else ours(setting, ROWS[row], steps, folder)
    return times[1:], losses


def peak(row: str, asked: argparse.Namespace) -> float:
    """Peak memory of a process that makes three steps of a row, in MB."""
    command = [
        sys.executable,
        __file__,
        asked.model,
        "--only",
        row,
        "--peak",
        "--steps",
        "3",
        "--batch",
        str(asked.batch),
    ]
    command += ["--device", asked.device, "--folder", str(asked.folder)]
    return float(
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    )


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded:emoji/pipeline")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", action="append", help="a row; may be given several times")
    parser.add_argument("--folder", type=Path, default=cache_folder().parent / "benchmark", help="for encoded examples")
    parser.add_argument("--peak", action="store_true", help="print the peak memory alone")
    parser.add_argument("--cpu-time", action="store_true", help="measure the processor's time")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    asked = parser.parse_args()
    keep_freed_memory()
    device = torch.device(asked.device)
    setting, rows = (
        Setting(asked.model, device, asked.batch, time.process_time if asked.cpu_time else time.perf_counter),
        asked.only or list(ROWS),
    )
    if asked.peak:
        run(rows[0], setting, asked.steps, asked.folder)
        cuda = device.type == "cuda"
        print(
            torch.cuda.max_memory_allocated() / 1e6
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        )
        return
    setting.examples(asked.folder)
    times: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    losses: dict[str, list[float]] = {}
    for _ in range(asked.turns):
        for row in rows:
            found, losses[row] = run(row, setting, asked.steps, asked.folder)
            times[row] += found
    base = statistics.median(step["step"] for step in times[rows[0]])
    print(f"{asked.model}, batch {asked.batch}, {torch.get_num_threads()} threads, {device}\n")
    print(f"| | images/s | against {rows[0]} | step (ms) | " + " | ".join(PARTS) + " | peak (MB) | last loss |")
    print("|---|" + "---:|" * (len(PARTS) + 5))
    for row in rows:
        seconds = {part: statistics.median(step.get(part, 0.0) for step in times[row]) for part in ("step", *PARTS)}
        cells = [
            f"{asked.batch / seconds['step']:.1f}",
            f"{base / seconds['step']:.2f}x",
            f"{1e3 * seconds['step']:.0f}",
        ]
        cells += [f"{1e3 * seconds[part]:.0f}" if seconds[part] else "–" for part in PARTS]
        print(
            f"| {row} | "
            + " | ".join([*cells, "–" if asked.no_memory else f"{peak(row, asked):.0f}", f"{losses[row][-1]:.5f}"])
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
