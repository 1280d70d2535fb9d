"""Peak memory of a denoiser alone: ``python -m compress.evaluate.memory FOLDER COMPONENT INPUTS``.

A process of its own loads nothing but the denoiser from a checkpoint, makes one pass and prints, as JSON, by how much
its memory rose above what Python and the libraries took. Started by :func:`compress.evaluate.cost.peak_memory`.
"""

import argparse
import ctypes
import gc
import importlib
import json
import resource
import sys
from pathlib import Path
from typing import Any


def measure(
    folder: Path,
    component: str,
    inputs: Path,
    device_name: str,
    dtype_name: str,
    threads: int,
    variant: str | None = None,
) -> dict[str, Any]:
    """Loads the denoiser, makes one pass and returns ``{"peak_memory_bytes", "method"}``.

    Args:
        folder: The checkpoint.
        component: The denoiser's folder in it, ``unet`` or ``transformer``.
        inputs: File of ``torch.save`` with ``(args, kwargs)`` of the pass.
        device_name: Where to compute.
        dtype_name: Precision to load in, for instance ``float32``.
        threads: Of the CPU.
        variant: Of the weight files, such as ``fp16``.
    """
    library, name = json.loads((folder / "model_index.json").read_text())[component]
    import torch

    from compress.evaluate.cost import map_tensors

    torch.set_num_threads(threads)
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    args, kwargs = map_tensors(torch.load(inputs, weights_only=True), lambda t: t.to(device))
    kind = getattr(importlib.import_module(library), name)

    def load_and_pass() -> None:
        model = kind.from_pretrained(folder, subfolder=component, torch_dtype=dtype, variant=variant).eval().to(device)
        with torch.no_grad():
            model(*args, **kwargs)

    if _forget_peak():
        # What is imported and set up on the way, once a process, is not the model's: have it before the baseline.
        load_and_pass()
        _forget_peak()
    baseline = _peak()
    load_and_pass()
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "method": "CUDA allocator, fresh process"}
    if device.type == "mps":
        return {"peak_memory_bytes": torch.mps.driver_allocated_memory(), "method": "MPS driver, fresh process"}
    return {"peak_memory_bytes": max(_peak() - baseline, 0), "method": "rise of resident memory, fresh process"}


def _forget_peak() -> bool:
    """Sets the peak back to the memory in use, without what is free but kept; False where the system cannot."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux only
    except OSError:
        return False
    return True


def _peak() -> int:
    """Largest resident memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("component")
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--variant")
    options = parser.parse_args()
    where = (options.folder, options.component, options.inputs, options.device, options.dtype)
    print(json.dumps(measure(*where, options.threads, options.variant)))


if __name__ == "__main__":
    main()
