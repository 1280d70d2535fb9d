"""Training states: everything needed to resume exactly after a crash."""

import json
import signal
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress.distill.sharding import like, whole
from compress.errors import UserError
from compress.system.files import write_tensors

_PATTERN = "state-*.safetensors"
DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError)
"""What :func:`read_state` raises where a state is missing or damaged."""


@dataclass
class Record:
    """The measurements so far.

    Attributes:
        step: Steps done.
        curves: Name -> ``[[step, value], ...]``.
        window: The losses of each step since the last point of the curves.
        optimizer: What the optimizer's state is of; empty in older states.
        seconds: Spent on the steps, with validation and saving, by all processes that continued one another.
        ended: Why the training ended before its last step; empty if it did not.
    """

    step: int = 0
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    window: list[list[float]] = field(default_factory=list)
    optimizer: str = ""
    seconds: float = 0.0
    ended: str = ""

    def details(self) -> dict[str, Any]:
        """What a stage's entry says of the training: its steps, and why it ended early if it did."""
        return {"steps": self.step, **({"ended": self.ended} if self.ended else {})}


def state_file(folder: Path, step: int) -> Path:
    """The file of the state after a number of steps."""
    return folder / f"state-{step:08d}.safetensors"


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], record: Record, keep: int = 2) -> None:
    """Writes the state after ``record.step`` steps; keeps the newest ``keep``.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    metadata = {"record": json.dumps(vars(record)), "crc32": str(_checksum(tensors))}
    write_tensors(state_file(folder, record.step), tensors, metadata)
    for old in sorted(folder.glob(_PATTERN))[:-keep]:
        old.unlink()


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], Record] | None:
    """Reads the newest intact state; warns about a damaged one."""
    for file in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            return read_state(file)
        except DAMAGED as error:
            text = f"the training state {file} is damaged ({error}); continuing from an older one or from the start"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    return None


def read_state(file: Path) -> tuple[dict[str, torch.Tensor], Record]:
    """Reads a state.

    Raises:
        Exception: One of :data:`DAMAGED`.
    """
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    if metadata.get("crc32") != str(_checksum(tensors)):
        raise ValueError("its checksum is wrong")
    known = {one.name for one in fields(Record)}
    return tensors, Record(**{key: value for key, value in json.loads(metadata["record"]).items() if key in known})


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(data.numpy(), zlib.crc32(name.encode(), value))
    return value


def pack(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: list[torch.Tensor], keep: bool = True
) -> dict[str, torch.Tensor]:
    """All tensors of what trains: ``weight.<name>``, ``ema.<number>``, the optimizer's such as ``exp_avg.<name>``.

    Args:
        model: Perhaps sharded; then every process has to call this, and one tensor at a time is whole on each device.
        optimizer: Of its parameters.
        average: Of its weights.
        keep: False in a process that only takes part: it gets nothing.
    """
    tensors = {f"ema.{i}": tensor for i, tensor in enumerate(average)}
    for name, parameter in _trained(model).items():
        tensors[f"weight.{name}"] = parameter
        tensors |= {f"{key}.{name}": torch.as_tensor(value) for key, value in optimizer.state[parameter].items()}
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if keep:
            found[name] = gathered if gathered is tensor else gathered.cpu()
    return found


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
            tensor.copy_(like(tensors[f"ema.{i}"], tensor))
        states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind not in ("weight", "ema"):
                states[name][kind] = tensor
        for name, parameter in parameters.items():
            parameter.copy_(like(tensors[f"weight.{name}"], parameter))
            if states[name]:  # else an average, which the optimizer does not train
                optimizer.state[parameter] = {kind: _as_kept(value, parameter) for kind, value in states[name].items()}
    for group in optimizer.param_groups:
        if group.get("fused"):  # its kernel reads the step where the parameter is
            for parameter in group["params"]:
                if isinstance(step := optimizer.state[parameter].get("step"), torch.Tensor):
                    optimizer.state[parameter]["step"] = step.to(parameter.device)


def _as_kept(value: torch.Tensor, parameter: torch.nn.Parameter) -> Any:
    """A value of an optimizer's state as the optimizer made it."""
    if not value.ndim:
        return value.clone() if value.is_floating_point() else value.item()
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    # In the parameter's memory layout, as AdamW makes moments: another order of sums changes the last bits.
    return torch.empty_like(parameter, dtype=value.dtype).copy_(like(value, parameter))


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What trains, and an average of it that an objective needs."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad or name.startswith("average.")}


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Delays Ctrl-C, and the signal by which a cluster ends a job, to the end of a step; a second one acts at once.

    Yields:
        A function that returns whether there was one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed: list[int] = []

    def hold(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
