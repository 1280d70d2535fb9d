"""Loads checkpoints in a new process, as a user does, and says what each computes.

``python fresh.py FILE MODULE``: FILE has a JSON list of folders, each with the inputs of its denoiser in a ``.pt`` file
beside it. MODULE is imported before, if it is not empty. FILE then gets what was found.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def digest(model: Any, inputs: Any) -> str:
    """SHA256 of a denoiser's tensors and of what it computes."""
    import hashlib

    import torch

    found = hashlib.sha256()

    def add(name: str, tensor: Any) -> None:
        if hasattr(tensor, "quant_type"):  # of a .gguf file
            from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

            add(name, dequantize_gguf_tensor(tensor).float())
        elif hasattr(tensor, "__tensor_flatten__"):
            for part in tensor.__tensor_flatten__()[0]:
                add(f"{name}.{part}", getattr(tensor, part))
        else:
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    for name, tensor in sorted(model.state_dict().items()):
        add(name, tensor)
    with torch.no_grad():
        add("output", model(**{**inputs, "return_dict": False})[0])
    return found.hexdigest()


def load(folder: Path, name: str, **settings: Any) -> Any:
    """The denoiser of a checkpoint; that of its .gguf file where it has one."""
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **settings)
    model = getattr(pipeline, name)
    for file in folder.glob("artifact/*.gguf"):
        from diffusers import GGUFQuantizationConfig

        settings = {"config": str(folder), "subfolder": name, "torch_dtype": torch.float32}
        quantization = GGUFQuantizationConfig(compute_dtype=torch.float32)
        model = type(model).from_single_file(str(file), quantization_config=quantization, **settings)
    return model


def attempt(folder: Path) -> dict[str, str]:
    """What loads: ``stock`` or ``own code`` (with ``trust_remote_code``) to a digest, or ``error``."""
    import torch

    inputs = torch.load(folder.with_suffix(".pt"), weights_only=True)
    name = "unet" if (folder / "unet").is_dir() else "transformer"
    found = {}
    for way, settings in (("stock", {}), ("own code", {"trust_remote_code": True})):
        try:
            return {way: digest(load(folder, name, **settings), inputs)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
    return found


def in_a_new_process(folders: list[Path], file: Path, module: str = "") -> dict[str, dict[str, str]]:
    """Runs this file; returns the attempt of each folder."""
    file.write_text(json.dumps([str(folder) for folder in folders]))
    subprocess.run([sys.executable, __file__, str(file), module], check=True)
    return json.loads(file.read_text())


if __name__ == "__main__":
    if sys.argv[2]:
        importlib.import_module(sys.argv[2])
    results = {folder: attempt(Path(folder)) for folder in json.loads(Path(sys.argv[1]).read_text())}
    assert ("compress" in sys.modules) == (sys.argv[2] == "compress")
    Path(sys.argv[1]).write_text(json.dumps(results))
