"""Several processes under ``accelerate launch``: shares of the work, and messages from the first to the others."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(hours=24)  # the others wait while the first works; if it dies, the launcher ends them


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the first process, which prints and writes."""
    return index() == 0


def index() -> int:
    """Which process this is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def share(n: int, batch: int) -> range:
    """This process's share of n items, in whole consecutive batches.

    The shares joined in the order of the processes are all items in order, and batches are the same for any number of
    processes. Shares differ by at most one batch and may be empty.
    """
    batches = -(-n // batch)
    first, last = (batches * (index() + step) // count() for step in (0, 1))
    return range(min(first * batch, n), min(last * batch, n))


def warn_if_alone() -> None:
    """Warns if ``accelerate launch`` started only this process, as it does without a GPU.

    With ``--multi_gpu`` it starts the requested number, on CPUs too. A single process is recognized by the address for
    meeting others in its environment.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and count() == 1 and "RANK" not in os.environ:
        warnings.warn(
            "accelerate launch started a single process; to start two, on CPUs or GPUs: "
            "accelerate launch --multi_gpu --num_processes 2 -m compress ...",
            RuntimeWarning,
            stacklevel=1,
        )


def join(device: str) -> "torch.device":
    """Joins the group of processes, if there are others.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Returns:
        The device of this process.
    """
    import torch

    warn_if_alone()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if count() > 1:
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        return torch.device("cpu") if device == "cpu" else state.device
    return torch.device(device)


def send(message: Any) -> None:
    """Sends the others a message; called only by the first, does nothing without others."""
    if count() > 1:
        _broadcast(message)


def receive() -> Any:
    """Waits for the next message of the first process."""
    return _broadcast(None)


def gather(value: Any) -> list[Any]:
    """The values of all processes, in order, in every process; they must be picklable."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes leave together.

    Raises:
        Exception: The block's error in this process, or else in the first process that failed, so that none waits for
            a process that ended.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as found:  # noqa: BLE001 - raised again below
        error = found
    errors = gather(error if count() > 1 else None)
    if error is not None:
        raise error
    for other in errors:
        if other is not None:
            raise other


def leave() -> None:
    """Ends the group once every process is done; a process that exits earlier may end the others."""
    if count() > 1:
        from accelerate import PartialState

        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()


def _broadcast(message: Any) -> Any:
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([message], from_process=0)[0]
