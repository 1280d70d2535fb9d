"""Several processes, as ``accelerate launch`` starts them: who does what, and how the first tells the others."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(hours=24)  # the others wait while the first evaluates; if it dies, the launcher ends them


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the first process, which prints, evaluates and writes."""
    return count() == 1 or int(os.environ.get("RANK", "0")) == 0


def launched_alone() -> bool:
    """Whether ``accelerate launch`` started this process and no other.

    Without a GPU it does so whatever ``--num_processes`` says, unless it is told ``--multi_gpu``.
    """
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ


def join(device: str) -> "torch.device":
    """Meets the other processes, if there are any.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Returns:
        The device of this process.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if count() > 1:
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        return torch.device("cpu") if device == "cpu" else state.device
    return torch.device(device)


def send(message: Any) -> None:
    """Gives the others a message; called by the first alone, and nothing without others."""
    if count() > 1:
        _broadcast(message)


def receive() -> Any:
    """Waits for the first's next message."""
    return _broadcast(None)


def leave() -> None:
    """Ends the group, once all is done."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def _broadcast(message: Any) -> Any:
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([message], from_process=0)[0]
