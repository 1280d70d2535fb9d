"""A training loop: a source of batches, an objective, AdamW, averaged weights, exact resume, several processes."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from rich.progress import TextColumn
from torch import nn

from compress.distill.state import Record, held_interrupt, load_state, pack, save_state, unpack
from compress.distill.training import TrainingConfig
from compress.errors import UserError, bad_value
from compress.system.progress import bar

Log = Callable[[dict[str, float], int], None]


class Trainer:
    """Trains an objective's parameters.

    Args:
        objective: From a batch to ``(1 + k,)``: the loss and k numbers to log, means over examples.
        batches: From a step and a slice of its batch to a batch.
        settings: How long and how fast.
        names: Of the k numbers.
        accelerator: Of the processes that take part; without mixed precision.
        averaged: Parameters that end with their averages; None: all.
        mask: Called between the backward pass and the optimizer's step.
        folder: For training states, continued from the newest; None: no states.
        log: Called with metrics and the number of steps done, in the first process.
        evaluate: Called at every save in the first process, with the averaged weights in place; its result is added to
            the record's figures.
        title: Of the progress bar.
    """

    def __init__(
        self,
        objective: nn.Module,
        batches: Callable[[int, slice], Any],
        settings: TrainingConfig,
        names: Sequence[str],
        accelerator: Accelerator,
        *,
        averaged: Sequence[nn.Parameter] | None = None,
        mask: Callable[[], None] | None = None,
        folder: Path | None = None,
        log: Log | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        title: str = "training",
    ) -> None:
        self.objective, self.batches, self.settings, self.names = objective, batches, settings, list(names)
        self.accelerator, self.folder, self.title, self.mask = accelerator, folder, title, mask
        self.evaluate = evaluate
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.averaged = self.parameters if averaged is None else list(averaged)
        self.parts = _parts(settings, accelerator)
        self.log = log if log is not None and accelerator.is_main_process else _no_log
        self.optimizer = torch.optim.AdamW(
            self.parameters, settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.ema: EMAModel | None = None
        if accelerator.is_main_process:
            self.ema = EMAModel(self.averaged, settings.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
        self.record = self._resume()

    def train(self) -> Record:
        """Trains to the last step and leaves the averaged weights in place.

        Returns:
            The steps done and the curves.

        Raises:
            UserError: The training diverged, or the processes found different states.
            KeyboardInterrupt: After Ctrl-C, once the step is finished and its state saved.
        """
        accelerator, record, steps = self.accelerator, self.record, self.settings.steps
        places = accelerator.gather(torch.tensor([record.step], device=accelerator.device))
        if places.unique().numel() > 1:
            raise UserError(f"the processes found different training states in {self.folder}; share one folder")
        self.model = accelerator.prepare_model(self.objective, device_placement=False)
        for point in zip(*record.curves.values(), strict=True):
            # The tracker of this process lacks the beginning of the curves.
            self.log({name: p[1] for name, p in zip(record.curves, point, strict=True)}, int(point[0][0]))
        column = TextColumn("loss {task.fields[loss]}")
        with held_interrupt() as pressed, bar(column, disable=not accelerator.is_main_process) as shown:
            task = shown.add_task(self.title, total=steps, completed=record.step, loss="-")
            for step in range(record.step, steps):
                figures, stop = self._step(step, pressed)
                record.step = step + 1
                record.window.append(figures)
                if record.step % self.settings.log_every == 0 or record.step == steps:
                    self.log(self._point(self.settings.rate(step)), record.step)
                shown.update(task, completed=record.step, loss=f"{figures[0]:.4f}")
                if record.step % self.settings.save_every == 0 or record.step == steps or stop:
                    self._evaluate()
                    self._save()
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {record.step} of {steps}")
        if self.ema is not None:
            self.ema.copy_to(self.averaged)
        if accelerator.num_processes > 1:
            broadcast([parameter.data for parameter in self.averaged])
        return record

    def _step(self, step: int, pressed: Callable[[], bool]) -> tuple[list[float], bool]:
        """One optimizer step; returns the objective's numbers, and whether Ctrl-C was pressed in any process."""
        accelerator, settings = self.accelerator, self.settings
        total = torch.zeros(len(self.names), device=self.parameters[0].device)
        for number, part in enumerate(self.parts):
            batch = self.batches(step, part)
            with nullcontext() if number + 1 == len(self.parts) else accelerator.no_sync(self.model):
                values = self.model(batch)
                accelerator.backward(values[0] / len(self.parts))
            total += values.detach() / len(self.parts)
        if self.mask is not None:
            self.mask()
        norm = accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        # One message for all, with Ctrl-C included, so that all processes stop at the same step.
        message = torch.stack([*total, torch.as_tensor(norm), total.new_tensor(float(pressed()))])
        *figures, norm_value, stop = accelerator.reduce(message, "mean").tolist()
        if not all(map(math.isfinite, [*figures, norm_value])):
            raise UserError(
                f"the training diverged at step {step + 1}: loss {figures[0]}, gradient norm {norm_value}; "
                f"lower learning_rate, which is {settings.learning_rate}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.averaged)
        return figures, bool(stop)

    def _evaluate(self) -> None:
        if self.evaluate is None or self.ema is None:
            return
        self.ema.store(self.averaged)
        self.ema.copy_to(self.averaged)
        with torch.no_grad():
            self.record.figures.append({"step": self.record.step, **self.evaluate()})
        self.ema.restore(self.averaged)

    def _resume(self) -> Record:
        found = load_state(self.folder) if self.folder is not None else None
        if found is None:
            return Record()
        tensors, record = found
        if record.step > self.settings.steps:
            raise UserError(
                f"{self.folder} holds a training of more than {self.settings.steps} steps; use another folder"
            )
        unpack(tensors, self.objective, self.optimizer, self.ema.shadow_params if self.ema is not None else [])
        if self.ema is not None:
            self.ema.optimization_step = record.step
        return record

    def _save(self) -> None:
        if self.folder is not None and self.ema is not None:
            save_state(self.folder, pack(self.objective, self.optimizer, self.ema.shadow_params), self.record)

    def _point(self, rate: float) -> dict[str, float]:
        """Adds the means of the window as a point of every curve and clears it."""
        record = self.record
        means = [sum(column) / len(column) for column in zip(*record.window, strict=True)]
        record.window.clear()
        point = {**dict(zip(self.names, means, strict=True)), "learning_rate": rate}
        for name, value in point.items():
            record.curves.setdefault(name, []).append([record.step, value])
        return point


def autocast(wanted: str, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """The context of a forward pass.

    Args:
        wanted: ``no``, ``bf16``, or ``auto``: bf16 where the device computes it natively.
        dtype: Of the run; in half precision ``no`` means ``auto``, since the trained weights are float32.
        device: Where to compute.
    """
    if wanted == "no" and dtype != torch.float32:
        wanted = "auto"
    if wanted == "bf16" or (wanted == "auto" and _native_bf16(device)):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def _parts(settings: TrainingConfig, accelerator: Accelerator) -> list[slice]:
    """The parts of a batch that this process computes, in order."""
    processes, count = accelerator.num_processes, settings.gradient_accumulation
    if settings.batch_size % (processes * count):
        expected = f"a multiple of processes x gradient_accumulation, which is {processes} x {count}"
        raise bad_value("batch_size", settings.batch_size, expected)
    size = settings.batch_size // (processes * count)
    first = accelerator.process_index * count
    return [slice(size * (first + i), size * (first + i + 1)) for i in range(count)]


def _no_log(metrics: dict[str, float], step: int) -> None:
    """Discards the metrics."""
