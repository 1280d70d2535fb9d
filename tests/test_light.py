"""What is imported before anything is computed loads no large library."""

import os
import subprocess
import sys
from pathlib import Path

import compress

ROOT = Path(compress.__file__).parent
# Methods of quantizing are looked at by their choices alone, before their modules are needed.
METHODS = [
    f"compress.{kind}.{file.stem}"
    for kind in ("prune", "distill")
    for file in sorted((ROOT / kind).glob("*.py"))
    if "\nSTAGE = " in file.read_text(encoding="utf-8")
]
LARGE = {"torch", "numpy", "diffusers", "transformers", "datasets", "matplotlib", "PIL", "wandb", "hydra"}


def test_imports_are_light() -> None:
    modules = ", ".join([*METHODS, "compress.report", "compress.track", "compress.store.command"])
    code = f"import sys, {modules}\nprint(*sorted({LARGE} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
