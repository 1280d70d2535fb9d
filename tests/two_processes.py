"""One of two processes that do all that several share; started by ``test_two_processes.py``: FOLDER as its argument.

Each process writes ``FOLDER/found.RANK.json`` and the weights that it has trained, ``FOLDER/weights.RANK.safetensors``.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from compress.system import processes
from tests.distill.worker import distilled
from tests.evaluate.metrics.results import results
from tests.evaluate.worker import evaluated


def heard() -> str:
    """What the processes hear of an error in the second one."""
    try:
        with processes.together():
            if processes.index() == 1:
                raise FloatingPointError("NaN in process 1")
    except FloatingPointError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Runs in both processes."""
    torch.set_num_threads(1)
    processes.join("cpu")
    rank = processes.index()
    found = {
        "processes": processes.count(),
        "heard": heard(),
        "metrics": [results(rank, 2, 5, torch.arange(40), few) for few in (13, 0)],  # once with a process without any
        "evaluated": evaluated(folder),
    }
    student, report = distilled(folder / "work")
    save_file(student.unet.state_dict(), folder / f"weights.{rank}.safetensors")
    found["curves"] = report.curves
    (folder / f"found.{rank}.json").write_text(json.dumps(found))
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
