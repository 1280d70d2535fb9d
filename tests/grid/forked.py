"""Grids in processes forked from this one, after it ran the first itself and so has all libraries: ``forked.py JSON``.

JSON is a list of groups of runs ``{"arguments": [...], "kill_at": null or share}``; those of a group run at the same
time. A run with ``kill_at`` kills itself right before it changes a file, after that share of the first run's changes.
Evaluations count parameters only. Each checkpoint that is finished adds its store, kind and key to ``made.txt``. Prints
the exit code of every run; null for one that was killed.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import compress.run.recipe
import compress.run.work
from compress.__main__ import main
from compress.evaluate import Evaluation
from compress.store import checkpoint

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
changes, kill_at = 0, -1


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Counts what changes files, whatever the library, and kills this process at the given change."""
    global changes
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if event in CHANGES or writes:
        changes += 1
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def measured(pipeline: Any, *_: Any, **__: Any) -> Evaluation:
    return Evaluation({"params": sum(tensor.numel() for tensor in pipeline.unet.parameters())}, {}, {}, [])


def save(pipeline: Any, folder: Path, info: dict[str, Any], *rest: Any, **more: Any) -> None:
    save_checkpoint(pipeline, folder, info, *rest, **more)
    with open("made.txt", "a") as file:
        file.write(f"{folder.parent.name} {info['stages'][-1]['kind']} {folder.name}\n")


def grid(arguments: list[str]) -> int:
    sys.argv = ["compress", "-m", *arguments]
    code = main()
    compress.run.recipe._kept.clear()  # a process that begins has no teacher in memory
    sys.stdout.flush()
    return code


def forked(run: dict[str, Any], of: int) -> int:
    """Starts a run in a process of its own; returns the process's id."""
    global changes, kill_at
    if process := os.fork():
        return process
    code = 1
    try:
        changes, kill_at = 0, int(of * (run.get("kill_at") or -1))
        code = grid(run["arguments"])
    finally:
        os._exit(code)


save_checkpoint = checkpoint.save_checkpoint
checkpoint.save_checkpoint = save
compress.run.work.evaluate = measured

if __name__ == "__main__":
    ((first,), *groups) = json.loads(sys.argv[1])
    sys.addaudithook(watch)
    codes: list[int | None] = [grid(first["arguments"])]
    all_changes = changes
    for group in groups:
        for process in [forked(run, all_changes) for run in group]:
            _, status = os.waitpid(process, 0)
            codes.append(os.WEXITSTATUS(status) if os.WIFEXITED(status) else None)
    print(f"\n{json.dumps(codes)}")
