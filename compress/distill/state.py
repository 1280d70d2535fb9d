"""Training states: everything needed to resume exactly after a crash."""

import json
import signal
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress.errors import UserError
from compress.system.files import write_tensors

_PATTERN = "state-*.safetensors"


@dataclass
class Record:
    """The measurements so far.

    Attributes:
        step: Steps done.
        curves: Name -> ``[[step, value], ...]``.
        window: The losses of each step since the last point of the curves.
        figures: Results of evaluations of the averaged weights, each with its ``step``.
    """

    step: int = 0
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    window: list[list[float]] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], record: Record) -> None:
    """Writes the state after ``record.step`` steps; keeps it and the previous one.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    metadata = {"record": json.dumps(vars(record)), "crc32": str(_checksum(tensors))}
    write_tensors(folder / f"state-{record.step:08d}.safetensors", tensors, metadata)
    for old in sorted(folder.glob(_PATTERN))[:-2]:
        old.unlink()


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], Record] | None:
    """Reads the newest intact state; warns about a damaged one."""
    for file in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            if metadata.get("crc32") != str(_checksum(tensors)):
                raise ValueError("its checksum is wrong")
            return tensors, Record(**json.loads(metadata["record"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            text = f"the training state {file} is damaged ({error}); continuing from an older one or from the start"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    return None


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(data.numpy(), zlib.crc32(name.encode(), value))
    return value


def pack(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All tensors of what trains: ``weight.``, ``exp_avg.``, ``exp_avg_sq.`` and ``step.<name>``, ``ema.<number>``."""
    tensors = {f"ema.{i}": tensor for i, tensor in enumerate(average)}
    for name, parameter in _trained(model).items():
        tensors[f"weight.{name}"] = parameter
        tensors |= {f"{key}.{name}": tensor for key, tensor in optimizer.state[parameter].items()}
    return tensors


def unpack(
    tensors: Mapping[str, torch.Tensor],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[torch.Tensor],
) -> None:
    """Restores the tensors of :func:`pack`, in place.

    Raises:
        UserError: They belong to another model.
    """
    parameters = _trained(model)
    shapes = {f"weight.{name}": parameter.shape for name, parameter in parameters.items()}
    shapes |= {f"ema.{i}": tensor.shape for i, tensor in enumerate(average)}
    found = {name: t.shape for name, t in tensors.items() if name.startswith("weight.") or name in shapes}
    if found != shapes:
        raise UserError("the training state belongs to another student; use another folder for this training")
    with torch.no_grad():
        for i, tensor in enumerate(average):
            tensor.copy_(tensors[f"ema.{i}"])
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            if f"step.{name}" not in tensors:  # an average
                continue
            # In the parameter's memory layout, as AdamW makes them: another order of sums changes the last bits.
            moments: dict[str, Any] = {
                key: torch.empty_like(parameter).copy_(tensors[f"{key}.{name}"]) for key in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[parameter] = {"step": tensors[f"step.{name}"].clone(), **moments}


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What trains, and an average of it that an objective needs."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad or name.startswith("average.")}


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Delays Ctrl-C to the end of a step; a second one acts at once.

    Yields:
        A function that returns whether Ctrl-C was pressed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed: list[int] = []

    def hold(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
