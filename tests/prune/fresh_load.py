"""Loads denoisers as stock diffusers does, in a process that never imports compress, and compares their outputs.

Usage in that process: python fresh_load.py FOLDER, with one folder a model in it, each with ``wanted.pt``: its class,
the inputs and the output that is wanted. A model that comes with its own file is loaded with that.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def load_in_fresh_process(models: Mapping[str, tuple[Any, Any]], folder: Path) -> None:
    """Saves models and loads them elsewhere; fails if an output differs by more than 1e-5 of the largest.

    Args:
        models: By name the model, in evaluation mode, and its keyword arguments.
        folder: An empty one.
    """
    for name, (model, inputs) in models.items():
        model.save_pretrained(folder / name)
        wanted = {"class": type(model).__name__, "inputs": inputs, "output": model(**inputs)[0]}
        torch.save(wanted, folder / name / "wanted.pt")
    cache = os.environ | {"HF_HOME": str(folder.parent / "cache")}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, check=False, cwd="/", capture_output=True, text=True, env=cache)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(models)


@torch.no_grad()
def _main() -> None:
    import diffusers

    for folder in sorted(Path(sys.argv[1]).iterdir()):
        wanted = torch.load(folder / "wanted.pt", weights_only=True)
        if (folder / "compressed_model.py").exists():
            model: Any = diffusers.AutoModel.from_pretrained(str(folder), trust_remote_code=True)
        else:
            model = getattr(diffusers, wanted["class"]).from_pretrained(folder)
        error = (model.eval()(**wanted["inputs"])[0] - wanted["output"]).abs().max() / wanted["output"].abs().max()
        assert error <= 1e-5, f"{folder.name}: {error}"
        print(folder.name)
    assert not any(name.split(".")[0] == "compress" for name in sys.modules)


if __name__ == "__main__":
    _main()
