"""Peak memory of a denoiser and of a process."""

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import compress
from compress.models.inputs import Inputs, map_tensors


def peak_memory(
    folder: Path,
    component: str,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
) -> dict[str, Any]:
    """Peak memory of loading the denoiser from its checkpoint and of one pass, in a separate process.

    Returns:
        ``{"peak_memory_bytes", "method"}``.

    Raises:
        RuntimeError: The process failed.
    """
    root = str(Path(compress.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs.pt"
        torch.save(map_tensors(inputs, lambda t: t.cpu()), file)
        command = [sys.executable, "-m", "compress.evaluate.cost.memory_process"]
        command += [str(folder.resolve()), component, str(file)]
        command += ["--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
        command += ["--threads", str(torch.get_num_threads())]
        command += ["--variant", variant] if variant else []
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the peak memory of {folder} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def forget_peak() -> bool:
    """Releases freed memory and resets the peak to the memory in use; False if the system cannot."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux only
    except OSError:
        return False
    return True


def process_peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def watch_memory(device: torch.device) -> Callable[[], dict[str, Any]]:
    """Starts to measure the memory of this process.

    Returns:
        A function that returns ``peak_memory_bytes``, the peak since then, and ``peak_memory_of``, what was measured.
    """
    forgotten = forget_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def found() -> dict[str, Any]:
        if device.type == "cuda":
            return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "peak_memory_of": "CUDA memory"}
        if device.type == "mps":
            return {"peak_memory_bytes": torch.mps.driver_allocated_memory(), "peak_memory_of": "MPS memory at the end"}
        what = "resident memory" if forgotten else "resident memory since the process began"
        return {"peak_memory_bytes": process_peak(), "peak_memory_of": what}

    return found


def peak_since(baseline: int, device: torch.device) -> tuple[int, str]:
    """Bytes by which memory rose above ``baseline``, and what was measured.

    Args:
        baseline: An earlier result of :func:`process_peak`; used on a CPU only.
        device: On CUDA the allocator of this process is measured, on MPS the driver.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA allocator, fresh process"
    if device.type == "mps":
        return torch.mps.driver_allocated_memory(), "MPS driver, fresh process"
    return max(process_peak() - baseline, 0), "rise of resident memory, fresh process"
