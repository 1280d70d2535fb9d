"""The training loop: a frozen teacher, a student, and accelerate around them."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import EMAModel
from rich.progress import TextColumn
from torch import nn

from compress.data.examples import Batch, Examples, draw
from compress.distill.checks import check_pair, noise_schedule
from compress.distill.losses import FeatureLoss, Objective, matching_blocks, tapped, target_of, weight_of
from compress.distill.state import Record, held_interrupt, load_state, pack, save_state, unpack
from compress.distill.zeros import Zeros
from compress.errors import UserError, bad_value
from compress.stage import StageReport
from compress.system import processes
from compress.system.progress import bar

if TYPE_CHECKING:
    from compress.distill.features import Config

_LOSSES = ("loss", "noise_loss", "output_loss", "feature_loss")


def train(
    student: nn.Module,
    teacher: nn.Module,
    examples: Examples,
    scheduler: Any,
    config: "Config",
    *,
    seed: int,
    device: torch.device,
    kept: dict[str, list[int]],
    keep_zeros: bool,
    folder: Path | None,
    log: Callable[[dict[str, float], int], None] | None,
) -> StageReport:
    """Does the work of :func:`compress.distill.features.distill`, where the arguments are described."""
    check_pair(student, teacher, examples)
    diffusion = noise_schedule(scheduler)
    # Autocast is ours to switch: the accelerator's follows the environment, which no key of the config shows.
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    if accelerator.num_processes > 1:
        device = accelerator.device
    processes.warn_if_alone()
    parts = _parts(config, accelerator)
    with ExitStack() as stack:
        autocast = _autocast(config, next(student.parameters()).dtype, device)
        dtype = next(teacher.parameters()).dtype
        stack.enter_context(_arranged(student, teacher, device))
        pairs = matching_blocks(student, teacher) if config.feature_weight else {}
        ours = stack.enter_context(tapped(student, pairs.keys()))
        theirs = stack.enter_context(tapped(teacher, pairs.values()))

        def ask_teacher(
            noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor
        ) -> tuple[Any, dict[str, torch.Tensor]]:
            with torch.no_grad(), autocast() if dtype == torch.float32 else nullcontext():
                output = teacher(noisy.to(dtype), times, text.to(dtype), return_dict=False)[0]
            return output, {mine: theirs[other] for mine, other in pairs.items()}

        features = None
        if pairs:
            features = _feature_loss(student, ours, ask_teacher, examples, kept, seed, device)
        needs_teacher = bool(config.output_weight or pairs)
        weights = (config.noise_weight, config.output_weight, config.feature_weight)
        objective = Objective(student, ours, features, weights)
        parameters = list(objective.parameters())
        trained = list(student.parameters())
        zeros = Zeros(student.modules() if keep_zeros else ())
        optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
        ema = None
        if accelerator.is_main_process:
            ema = EMAModel(trained, config.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
        record = _resume(folder, objective, optimizer, ema, config.steps)
        zeros.check()
        if accelerator.gather(torch.tensor([record.step], device=device)).unique().numel() > 1:
            raise UserError(f"the processes found different training states in {folder}; it must be one shared folder")
        model = accelerator.prepare_model(objective, device_placement=False)
        curves_log = log if log is not None and accelerator.is_main_process else _no_log
        for point in zip(*record.curves.values(), strict=True):
            # The tracker of this process has not seen the curves' beginning.
            curves_log({name: p[1] for name, p in zip(record.curves, point, strict=True)}, int(point[0][0]))

        def losses_of(batch: Batch) -> torch.Tensor:
            latents, noise = batch.latents.to(device, torch.float32), batch.noise.to(device)
            times, text = batch.timesteps.to(device), batch.embeddings.to(device, torch.float32)
            noisy = diffusion.add_noise(latents, noise, times)
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            output, seen = ask_teacher(noisy, times, text) if needs_teacher else (None, {})
            target = target_of(diffusion, latents, noise, times)
            weight = weight_of(diffusion, times, config.min_snr_gamma)
            with autocast():
                return model(noisy, times, text, target, weight, output if config.output_weight else None, seen)

        def save() -> None:
            if folder is not None and ema is not None:
                save_state(folder, pack(objective, optimizer, ema.shadow_params), record)

        pressed = stack.enter_context(held_interrupt())
        loss_column = TextColumn("loss {task.fields[loss]}")
        shown = stack.enter_context(bar(loss_column, disable=not accelerator.is_main_process))
        task = shown.add_task("distilling", total=config.steps, completed=record.step, loss="-")
        for step in range(record.step, config.steps):
            losses = torch.zeros(len(_LOSSES), device=device)
            for number, part in enumerate(parts):
                batch = draw(
                    examples,
                    step,
                    config.batch_size,
                    part,
                    timesteps=diffusion.config.num_train_timesteps,
                    prompt_dropout=config.prompt_dropout,
                    seed=seed,
                )
                with nullcontext() if number + 1 == len(parts) else accelerator.no_sync(model):
                    values = losses_of(batch)
                    accelerator.backward(values[0] / len(parts))
                losses += values.detach() / len(parts)
            zeros.mask_gradients()
            norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            # One message carries all: whether anybody pressed Ctrl-C too, so that all processes stop at the same step.
            message = torch.stack([*losses, torch.as_tensor(norm), losses.new_tensor(float(pressed()))])
            *figures, norm_value, stop = accelerator.reduce(message, "mean").tolist()
            if not all(map(math.isfinite, [*figures, norm_value])):
                raise UserError(
                    f"the distillation diverged at step {step + 1}: loss {figures[0]}, gradient norm {norm_value}; "
                    f"lower learning_rate, which is {config.learning_rate}"
                )
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.step(trained)
            record.step = step + 1
            record.window.append(figures)
            if record.step % config.log_every == 0 or record.step == config.steps:
                curves_log(_add_point(record, rate), record.step)
            shown.update(task, completed=record.step, loss=f"{figures[0]:.4f}")
            if record.step % config.save_every == 0 or record.step == config.steps or stop:
                save()
            if stop:
                raise KeyboardInterrupt(f"stopped after step {record.step} of {config.steps}")
        if ema is not None:
            ema.copy_to(trained)
        if accelerator.num_processes > 1:
            broadcast([parameter.data for parameter in trained])
    details = {
        "steps": config.steps,
        "examples": len(examples.latents),
        "final": {name: points[-1][1] for name, points in record.curves.items()},
        "features": features.how if features else {},
        "features_skipped": features.skipped if features else {},
        "autocast": "no" if isinstance(autocast(), nullcontext) else "bf16",
        "prediction_type": diffusion.config.prediction_type,
        "processes": accelerator.num_processes,
        **({"zeros_kept": zeros.count()} if keep_zeros else {}),
    }
    modules = sum(1 for m in student.modules() if next(m.parameters(recurse=False), None) is not None)
    total = sum(parameter.numel() for parameter in trained)
    coverage = {"params": 1 - zeros.count() / total, "macs": 1.0, "modules": modules, "skipped": {}}
    return StageReport(coverage, details, record.curves)


def learning_rate(config: "Config", step: int) -> float:
    """The rate of a step counted from 0: a linear rise over the warm-up, then the schedule down to 0."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    done = (step - warm) / (config.steps - warm)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.learning_rate * shape[config.schedule]


def _parts(config: "Config", accelerator: Accelerator) -> list[slice]:
    """The parts of a batch that this process computes, one after the other."""
    processes, count = accelerator.num_processes, config.gradient_accumulation
    if config.batch_size % (processes * count):
        expected = f"a multiple of processes x gradient_accumulation, which is {processes} x {count}"
        raise bad_value("batch_size", config.batch_size, expected)
    size = config.batch_size // (processes * count)
    first = accelerator.process_index * count
    return [slice(size * (first + i), size * (first + i + 1)) for i in range(count)]


def _autocast(config: "Config", dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    wanted = config.mixed_precision
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


@contextmanager
def _arranged(student: nn.Module, teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """Student in float32 and in training mode, teacher in evaluation mode, both channels last; all undone afterwards.

    Convolutions are faster channels last. It is undone because the layout decides the last bits of an output, and a
    checkpoint is read back in the usual layout. On a CPU the student attends step by step: there the backward pass of
    torch's fused attention takes several times as long as that of plain matrix products.
    """
    processors = dict(student.attn_processors) if device.type == "cpu" and hasattr(student, "attn_processors") else {}
    if processors and all(isinstance(processor, AttnProcessor2_0) for processor in processors.values()):
        student.set_attn_processor(AttnProcessor())
    before = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in student.named_parameters()}
    modes = student.training, teacher.training
    student.to(device, memory_format=torch.channels_last).float().train().requires_grad_(True)
    teacher.to(device, memory_format=torch.channels_last).eval()
    try:
        yield
    finally:
        for name, parameter in student.named_parameters():
            dtype, needs_gradient = before[name]
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(needs_gradient)
        if processors:
            student.set_attn_processor(processors)
        student.to(memory_format=torch.contiguous_format).train(modes[0])
        teacher.to(memory_format=torch.contiguous_format).train(modes[1])


def _feature_loss(
    student: nn.Module,
    ours: dict[str, torch.Tensor],
    ask_teacher: Callable[..., tuple[Any, dict[str, torch.Tensor]]],
    examples: Examples,
    kept: dict[str, list[int]],
    seed: int,
    device: torch.device,
) -> FeatureLoss:
    """Runs both once to see the features' shapes."""
    latents, text = (t[:1].to(device, torch.float32) for t in (examples.latents, examples.embeddings))
    times = torch.zeros(1, dtype=torch.long, device=device)
    _, theirs = ask_teacher(latents, times, text)
    with torch.no_grad():
        student(latents, times, text)
    features = FeatureLoss(ours, theirs, kept, seed)
    if not features.how:
        raise UserError(
            f"no block of the student can be compared with its teacher's ({features.skipped}); set feature_weight=0"
        )
    ours.clear()
    return features


def _resume(
    folder: Path | None, objective: Objective, optimizer: torch.optim.Optimizer, ema: EMAModel | None, steps: int
) -> Record:
    found = load_state(folder) if folder is not None else None
    if found is None:
        return Record()
    tensors, record = found
    if record.step > steps:
        raise UserError(f"{folder} holds a training of more than {steps} steps; give this training a folder of its own")
    unpack(tensors, objective, optimizer, ema.shadow_params if ema is not None else [])
    if ema is not None:
        ema.optimization_step = record.step
    return record


def _add_point(record: Record, rate: float) -> dict[str, float]:
    """Closes the window: its means become a point of every curve."""
    means = [sum(column) / len(column) for column in zip(*record.window, strict=True)]
    record.window.clear()
    point = {**dict(zip(_LOSSES, means, strict=True)), "learning_rate": rate}
    for name, value in point.items():
        record.curves.setdefault(name, []).append([record.step, value])
    return point


def _no_log(metrics: dict[str, float], step: int) -> None:
    """Takes the place of a log where none is wanted."""
