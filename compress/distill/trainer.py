"""A training loop: batches, an objective, an optimizer, averaged weights, exact resume, several processes."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, broadcast
from diffusers.training_utils import EMAModel
from rich.progress import TextColumn
from torch import nn

from compress.distill import optimizers, sharding
from compress.distill.state import (
    DAMAGED,
    Record,
    held_interrupt,
    load_state,
    pack,
    read_state,
    save_state,
    state_file,
    unpack,
)  # fmt: skip
from compress.distill.training import TrainingConfig
from compress.distill.zeros import Zeros
from compress.errors import UserError, bad_value
from compress.system import processes
from compress.system.bf16 import bf16_pays
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
        zeros: Weights that stay zero; None: all move.
        follow: Called before the optimizer moves the weights.
        folder: For training states, continued from the newest; None: no states.
        log: Called with metrics and the number of steps done, in the first process.
        validate: Called every ``validation.every`` steps and at the end with the number of steps done, in the first
            process, with the averaged weights in place.
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
        zeros: Zeros | None = None,
        follow: Callable[[], None] | None = None,
        folder: Path | None = None,
        log: Log | None = None,
        validate: Callable[[int], None] | None = None,
        title: str = "training",
    ) -> None:
        self.objective, self.batches, self.settings, self.names = objective, batches, settings, list(names)
        self.accelerator, self.folder, self.title = accelerator, folder, title
        self.zeros, self.follow, self.validate = zeros or None, follow, validate
        self.sharded = self._shard() if sharding.wanted() else None
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.averaged = self.parameters if averaged is None else list(averaged)
        if self.sharded is not None and averaged is not None:
            self.averaged = self.sharded.share_of(self.averaged)
        self.parts = _parts(settings, accelerator)
        self.log = log if log is not None and accelerator.is_main_process else _no_log
        self.optimizer = optimizers.make(self.parameters, settings)
        self.ema: EMAModel | None = None
        if accelerator.is_main_process or self.sharded is not None:
            self.ema = EMAModel(
                self.averaged, settings.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=self.sharded is None
            )
        self.record = self._resume()

    def train(self) -> Record:
        """Trains to the last step, the end of the budget or a plateau, and leaves the averaged weights in place.

        Returns:
            The steps done, the curves, and why the training ended early.

        Raises:
            UserError: The training diverged, another process ended, or the processes found different states.
            KeyboardInterrupt: After Ctrl-C, once the step is finished and its state saved.
        """
        accelerator, record, settings = self.accelerator, self.record, self.settings
        record.ended = self._ended()
        steps = record.step if record.ended else settings.steps
        places = accelerator.gather(torch.tensor([record.step], device=accelerator.device))
        if places.unique().numel() > 1:
            raise UserError(f"the processes found different training states in {self.folder}; share one folder")
        self.model = self.objective
        if self.sharded is None:
            self.model = accelerator.prepare_model(self.objective, device_placement=False)
        for point in zip(*record.curves.values(), strict=True):
            # The tracker of this process lacks the beginning of the curves.
            self.log({name: p[1] for name, p in zip(record.curves, point, strict=True)}, int(point[0][0]))
        column = TextColumn("loss {task.fields[loss]}")
        self._began = time.perf_counter() - record.seconds
        with held_interrupt() as pressed, bar(column, disable=not accelerator.is_main_process) as shown:
            task = shown.add_task(self.title, total=settings.steps, completed=self._shown(), loss="-")
            for step in range(record.step, steps):
                with self._noticing():
                    figures, stop = self._step(step, pressed)
                record.step = step + 1
                record.window.append(figures)
                last = record.step == steps or record.seconds >= settings.seconds
                if record.step % settings.log_every == 0 or last:
                    self.log(self._point(), record.step)
                record.ended = self._ended()
                last = last or bool(record.ended)
                shown.update(task, completed=self._shown(), loss=f"{figures[0]:.4f}")
                if (
                    self.validate is not None
                    and self.ema is not None
                    and (record.step % settings.validation.every == 0 or last)
                ):
                    with self._averages():
                        self.validate(record.step)
                if record.step % settings.save_every == 0 or last or stop:
                    self._save()
                if last:
                    break
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {record.step} of {steps}")
        if self.ema is not None:
            self.ema.copy_to(self.averaged)
        if self.sharded is not None:
            self.sharded.restore()
        elif accelerator.num_processes > 1:
            broadcast([parameter.data for parameter in self.averaged])
        return record

    def _step(self, step: int, pressed: Callable[[], bool]) -> tuple[list[float], bool]:
        """One optimizer step; returns the objective's numbers, and whether Ctrl-C was pressed in any process."""
        accelerator, settings = self.accelerator, self.settings
        total = torch.zeros(len(self.names), device=self.parameters[0].device)
        for number, part in enumerate(self.parts):
            batch = self.batches(step, part)
            with self._gradients(last=number + 1 == len(self.parts)):
                values = self.model(batch)
                accelerator.backward(values[0] / len(self.parts))
            total += values.detach() / len(self.parts)
        if self.zeros is not None:
            self.zeros.mask_gradients()
        norm = sharding.whole(nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm))
        # One message for all, with Ctrl-C and the clock included, so that all processes stop at the same step.
        seconds = time.perf_counter() - self._began
        message = torch.stack([*total, torch.as_tensor(norm), *total.new_tensor([seconds, float(pressed())])])
        *figures, norm_value, seconds, stop = accelerator.reduce(message, "mean").tolist()
        if not all(map(math.isfinite, [*figures, norm_value])):
            raise self._diverged(step, figures[0], norm_value)
        self.record.seconds = seconds
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(step, seconds)
        if self.follow is not None:
            self.follow()
        self.optimizer.step()
        if self.zeros is not None:
            self.zeros.restore()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.averaged)
        return figures, bool(stop)

    def _gradients(self, last: bool) -> AbstractContextManager[None]:
        """The context of one part of a batch: gradients are averaged over the processes with the last."""
        if self.sharded is not None:
            self.sharded.average_gradients(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Turns the error of a broken connection into a message, with this process's state kept.

        Raises:
            UserError: Another process ended.
        """
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
            if self.accelerator.num_processes == 1 or not lost:
                raise
            why = str(error).strip().splitlines()[0]
            if self.sharded is None:
                self._save()
            raise UserError(
                f"another process of the training ended ({why}); run the same command again to continue after step "
                f"{self.record.step}, or after the last state that was saved"
            ) from error

    def _shard(self) -> sharding.Sharded:
        """Shards the objective's parameters.

        Raises:
            UserError: Something needs them whole in one process.
        """
        if self.validate is not None:
            raise UserError(
                "validation.prompts: images cannot be drawn while the student is sharded (FSDP); leave them out"
            )
        if self.settings.compile:
            raise UserError("compile=true: not with a student that is sharded (FSDP)")
        if self.zeros is not None or self.follow is not None:
            raise UserError(f"{self.title}: this needs whole gradients, so that FSDP is not possible; train without it")
        return sharding.Sharded(self.objective)

    def _diverged(self, step: int, loss: float, norm: float) -> UserError:
        """Keeps the state before a step that gave no finite numbers; returns the error."""
        text = (
            f"the training diverged at step {step + 1}: loss {loss}, gradient norm {norm}; "
            f"lower learning_rate, which is {self.settings.learning_rate}"
        )
        if self.folder is None or step == 0:
            return UserError(text)
        if self.record.step == step:
            self._save()
        return UserError(
            f"{text}, and continue from the state before it with from_state={state_file(self.folder, step)}"
        )

    def _shown(self) -> int:
        """Steps for the progress bar: those done, or the used share of the budget where that is larger."""
        return max(self.record.step, int(self.settings.steps * min(1.0, self.record.seconds / self.settings.seconds)))

    def _ended(self) -> str:
        """Why the training ends before its last step; empty if it does not."""
        if self.record.seconds >= self.settings.seconds:
            return f"the budget of {self.settings.budget} is used up"
        plateau = self.settings.plateau
        points = plateau // self.settings.log_every
        values = [value for _, value in self.record.curves.get(self.names[0], [])]
        if not points or len(values) < 2 * points or self.record.step % self.settings.log_every:
            return ""
        before, now = sum(values[-2 * points : -points]), sum(values[-points:])
        return "" if now < before else f"the mean loss of {plateau} steps is not below that of the {plateau} before"

    @contextmanager
    def _averages(self) -> Iterator[None]:
        """The averaged weights in place; only in the first process, which has them."""
        assert self.ema is not None
        self.ema.store(self.averaged)
        self.ema.copy_to(self.averaged)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # other shapes than the training's
            yield
        self.ema.restore(self.averaged)

    def _resume(self) -> Record:
        settings, other = self.settings, None
        found = load_state(self.folder) if self.folder is not None else None
        if found is None and settings.from_state is not None:
            other = Path(settings.from_state).expanduser()
            found = self._other_state(other)
        if found is None:
            return Record(optimizer=optimizers.kind(settings))
        tensors, record = found
        if record.step > settings.steps:
            raise UserError(f"{self.folder} holds a training of more than {settings.steps} steps; use another folder")
        try:
            unpack(tensors, self.objective, self.optimizer, self.ema.shadow_params if self.ema is not None else [])
        except UserError as error:
            if other is None:
                raise
            raise bad_value("from_state", other, f"a state of this student and method ({error})") from error
        if self.ema is not None:
            self.ema.optimization_step = record.step
        for group in self.optimizer.param_groups:
            group["step"] = record.step  # Muon counts here, the others in the state of every parameter
        return record

    def _other_state(self, file: Path) -> tuple[dict[str, torch.Tensor], Record]:
        """The state of another training, which this one continues.

        Raises:
            UserError: It cannot be read, is of another optimizer, or leaves no step to train.
        """
        try:
            tensors, record = read_state(file)
        except DAMAGED as error:
            raise bad_value("from_state", file, f"a whole training state, state-*.safetensors ({error})") from error
        if record.step >= self.settings.steps:
            expected = f"a state after fewer steps than steps, which is {self.settings.steps}, not {record.step}"
            raise bad_value("from_state", file, expected)
        if record.optimizer not in ("", optimizers.kind(self.settings)):
            raise bad_value("optimizer", self.settings.optimizer, f"{record.optimizer}, which {file} was trained with")
        return tensors, record

    def _save(self) -> None:
        if self.folder is None or self.ema is None:
            return
        first = self.accelerator.is_main_process
        tensors = pack(self.objective, self.optimizer, self.ema.shadow_params, keep=first)
        if first:
            save_state(self.folder, tensors, self.record, self.settings.keep_states)

    def _point(self) -> dict[str, float]:
        """Adds the means of the window as a point of every curve and clears it."""
        record = self.record
        means = [sum(column) / len(column) for column in zip(*record.window, strict=True)]
        record.window.clear()
        rate = self.optimizer.param_groups[0]["lr"]
        point = {**dict(zip(self.names, means, strict=True)), "learning_rate": rate}
        for name, value in point.items():
            record.curves.setdefault(name, []).append([record.step, value])
        return point


def joined(device: torch.device, unused: bool = False) -> tuple[Accelerator, torch.device]:
    """The processes that train together, and where this one computes.

    Precision and parts of a batch are ours: what a launcher says of them would count twice.

    Args:
        device: Of the run.
        unused: Whether some parameters may get no gradient.
    """
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )  # fmt: skip
    processes.warn_if_alone()
    return accelerator, accelerator.device if accelerator.num_processes > 1 else device


def autocast(wanted: str, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """The context of a forward pass.

    Args:
        wanted: ``no``, ``bf16``, or ``auto``: bf16 where that is faster.
        dtype: Of the run; in half precision ``no`` means ``auto``, since the trained weights are float32.
        device: Where to compute.
    """
    if wanted == "no" and dtype != torch.float32:
        wanted = "auto"
    if wanted == "bf16" or (wanted == "auto" and bf16_pays(device.type)):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


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
