"""What a single process says that was to be one of several."""

import os
import subprocess
import sys
import warnings

import pytest

from compress.system import processes


def test_a_process_that_runs_alone_though_more_were_asked_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processes.warn_if_alone()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(RuntimeWarning, match="a single process.*accelerate launch --multi_gpu --num_processes 2"):
        processes.join("cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processes.warn_if_alone()


@pytest.mark.slow
@pytest.mark.parametrize(("more", "count"), [([], 1), (["--multi_gpu"], 2)])
def test_what_accelerate_launch_starts(more: list[str], count: int) -> None:
    code = 'import os; os.write(1, f\'process of {os.environ.get("WORLD_SIZE", "1")}\\n\'.encode())'
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    launcher = ["-m", "accelerate.commands.launch", *more, "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *launcher, "--no_python", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count(f"process of {count}") == count
