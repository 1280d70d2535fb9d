"""Run in a fresh process, which never imports compress: loads denoisers as stock diffusers does and compares.

Usage: python fresh_load.py FOLDER, with one folder a model in it, each with ``wanted.pt``: its class, the inputs and
the output that is wanted.
"""

import sys
from pathlib import Path

import diffusers
import torch


@torch.no_grad()
def main() -> None:
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        wanted = torch.load(folder / "wanted.pt", weights_only=True)
        args, kwargs = wanted["inputs"]
        found = getattr(diffusers, wanted["class"]).from_pretrained(folder)(*args, **kwargs)[0]
        error = (found - wanted["output"]).abs().max() / wanted["output"].abs().max()
        assert error <= 1e-5, f"{folder.name}: {error}"
        print(folder.name)
    assert not any(name.split(".")[0] == "compress" for name in sys.modules)


main()
