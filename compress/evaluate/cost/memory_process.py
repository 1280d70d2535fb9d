"""Peak memory of a denoiser: ``python -m compress.evaluate.cost.memory_process FOLDER COMPONENT INPUTS``.

A separate process loads only the denoiser from a checkpoint, makes one pass and prints as JSON how much its memory rose
above that of Python and the libraries. Started by :func:`compress.evaluate.cost.memory.peak_memory`.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import pipelines

from compress.evaluate.cost.memory import forget_peak, peak_since, process_peak
from compress.models.inputs import map_tensors


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
        inputs: File of ``torch.save`` with the keyword arguments of the pass.
        device_name: Where to compute.
        dtype_name: Precision to load in, for instance ``float32``.
        threads: Of the CPU.
        variant: Of the weight files, such as ``fp16``.
    """
    library, name = json.loads((folder / "model_index.json").read_text())[component]
    torch.set_num_threads(threads)
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    arguments = map_tensors(torch.load(inputs, weights_only=True), lambda t: t.to(device))
    kind = getattr(getattr(pipelines, library, None) or importlib.import_module(library), name)  # as diffusers looks

    def load_and_pass() -> None:
        model = kind.from_pretrained(folder, subfolder=component, torch_dtype=dtype, variant=variant).eval().to(device)
        with torch.no_grad():
            model(**arguments)

    if forget_peak():
        # Imports and one-time setup are not the model's memory: do them before the baseline.
        load_and_pass()
        forget_peak()
    baseline = process_peak()
    load_and_pass()
    peak, method = peak_since(baseline, device)
    return {"peak_memory_bytes": peak, "method": method}


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
