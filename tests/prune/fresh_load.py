"""Denoisers that are loaded as stock diffusers does, in a process without compress, and compute the same there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

# A model that comes with its own file is loaded with that.
LOAD = """
from pathlib import Path
import diffusers, torch
for folder in sorted(Path(arguments[0]).iterdir()):
    wanted = torch.load(folder / "wanted.pt", weights_only=True)
    if (folder / "compressed_model.py").exists():
        model = diffusers.AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    else:
        model = getattr(diffusers, wanted["class"]).from_pretrained(folder)
    with torch.no_grad():
        error = (model.eval()(**wanted["inputs"])[0] - wanted["output"]).abs().max() / wanted["output"].abs().max()
    assert error <= 1e-5, f"{folder.name}: {error}"
    print(folder.name)
"""


@torch.no_grad()
def load_in_fresh_process(models: Mapping[str, tuple[Any, Any]], folder: Path, stranger: Callable[..., str]) -> None:
    """Saves models and loads them elsewhere; fails if an output differs by more than 1e-5 of the largest.

    Args:
        models: By name the model, in evaluation mode, and its keyword arguments.
        folder: An empty one.
        stranger: The fixture.
    """
    for name, (model, inputs) in models.items():
        model.save_pretrained(folder / name)
        wanted = {"class": type(model).__name__, "inputs": inputs, "output": model(**inputs)[0]}
        torch.save(wanted, folder / name / "wanted.pt")
    assert sorted(stranger(LOAD, folder).splitlines()) == sorted(models)


class Lazily(dict[str, Any]):
    """Values that are made when they are first asked for: each process of a test run needs only some.

    Args:
        make: From a key to its value.
    """

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: str) -> Any:
        self[key] = self._make(key)
        return self[key]
