"""Locks that hold between machines, on file systems that have none of their own."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LEASE = 120.0  # seconds without a sign of life after which the holder of a lock counts as dead


@contextmanager
def leased(file: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a lock that works between machines, on file systems that have none of their own.

    Args:
        file: Of the lock; its folder is made.
        waiting: Called once if another process holds it.
    """
    import filelock

    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.SoftFileLease(file, lease_duration=LEASE)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        waiting()
        while not lock.is_locked:
            try:
                lock.acquire(timeout=2 * LEASE)
            except filelock.Timeout:
                _remove_empty(file)
    try:
        yield
    finally:
        lock.release()


def _remove_empty(file: Path) -> None:
    """Removes the file of a lock whose machine failed before it wrote who holds it: it would be held for ever."""
    try:
        before = file.stat()
        time.sleep(1)  # one that is being taken now is written at once
        after = file.stat()
        if not before.st_size and not after.st_size and before.st_ino == after.st_ino:
            file.unlink()
    except OSError:
        pass  # released meanwhile
