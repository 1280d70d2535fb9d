"""Runs each row in a separate process, without the memory, kernels or caches of another row."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from compress.errors import UserError

if TYPE_CHECKING:
    from compress.jobs.benchmark.row import Task


def measure_apart(task: "Task") -> dict[str, Any]:
    """Measures a row in a separate process, which ends after the row or with the calling process.

    Where possible it is forked from a process that has only imported the libraries.

    Returns:
        The result of :func:`compress.jobs.benchmark.row.measure` and ``truncated``, whether a prompt was too long for
        the text encoder; or ``{"failed": reason}``.

    Raises:
        UserError: The pipeline cannot be loaded.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["compress.jobs.benchmark.preload"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(task, theirs), name="row")
    process.start()
    theirs.close()
    try:
        found = ours.recv()
        process.join(timeout=10)
    except EOFError:  # it ended without an answer
        process.join()
        found = {"failed": f"its process ended with exit code {process.exitcode} (-9: probably out of memory)"}
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(found, UserError):
        raise found
    return found


def _answer(task: "Task", answer: Connection) -> None:
    """Runs in the row's process: measures the row and sends the result."""
    from compress.jobs.benchmark.notices import hear_truncation
    from compress.jobs.benchmark.row import measure

    truncation = hear_truncation()
    threading.Thread(target=_end_with_parent, args=(answer,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    try:
        answer.send({**measure(task), "truncated": truncation.heard})
    except UserError as error:
        answer.send(error)
    except Exception as error:  # noqa: BLE001 - an error of a device or a compiler fails only its row
        answer.send({"failed": (str(error).strip() or type(error).__name__).splitlines()[0]})


def _end_with_parent(answer: Connection) -> None:
    """Ends this process when the other end of its pipe closes, which only the requesting process holds.

    The parent process may be the fork server, which lives as long as its children.
    """
    try:
        answer.recv()  # nothing is ever sent
    except (EOFError, OSError):
        os._exit(1)
