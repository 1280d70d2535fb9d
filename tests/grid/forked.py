"""Command lines in processes forked from this one, which has imported all libraries: ``forked.py JSON``.

JSON is a list of groups of runs ``{"arguments": [...], "kill_at": null or N}``; those of a group run at the same time.
A run with ``kill_at`` kills itself right before it changes a file for the N-th time. Evaluations count parameters only.
Each checkpoint that is finished adds a line to ``made.txt``. Prints for every run its exit code and changes of files.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401
import torch_pruning  # noqa: F401
import torchao.quantization  # noqa: F401

import compress.run.recipe
from compress.__main__ import main
from compress.evaluate import Evaluation
from compress.store import checkpoint

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
changes = 0


def watch(kill_at: int | None) -> None:
    """Counts what changes files, whatever the library, and kills this process at the given one."""
    import threading

    mine = threading.get_ident()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        global changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and threading.get_ident() == mine:
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def measured(pipeline: Any, *_: Any, **__: Any) -> Evaluation:
    return Evaluation({"params": sum(tensor.numel() for tensor in pipeline.unet.parameters())}, {}, {}, [])


def save(pipeline: Any, folder: Path, info: dict[str, Any], *rest: Any, **more: Any) -> None:
    save_checkpoint(pipeline, folder, info, *rest, **more)
    with open("made.txt", "a") as file:
        file.write(f"{info['stages'][-1]['kind']} {folder.name}\n")


def child(run: dict[str, Any], result: int) -> None:
    sys.argv = ["compress", "-m", *run["arguments"]]
    watch(run.get("kill_at"))
    code = main()
    sys.stdout.flush()
    os.write(result, json.dumps([code, changes]).encode())


save_checkpoint = checkpoint.save_checkpoint
checkpoint.save_checkpoint = save
compress.run.work.evaluate = measured

if __name__ == "__main__":
    found = []
    for group in json.loads(sys.argv[1]):
        started = []
        for run in group:
            end, result = os.pipe()
            if not (pid := os.fork()):
                try:
                    child(run, result)
                finally:
                    os._exit(0)
            os.close(result)
            started.append((pid, end))
        for pid, end in started:
            os.waitpid(pid, 0)
            with os.fdopen(end) as stream:
                found.append(json.loads(stream.read() or "null"))
    print(f"\n{json.dumps(found)}")
