"""What made the embedded default: its images, autoencoder, ``emoji-clip`` and teacher, and what measures them.

Nothing here is needed to compress a model. README.md says how to run it.
"""

import importlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compress.config.values import build, nearest
from compress.errors import UserError

# What can be made, trained or measured: a module here, its config and its function.
PARTS = {
    "images": ("ImagesConfig", "build_images"),
    "autoencoder": ("AutoencoderConfig", "train_autoencoder"),
    "clip": ("ClipConfig", "train_clip"),
    "teacher": ("TeacherConfig", "train_teacher"),
    "bars": ("BarsConfig", "measure_bars"),
}


def run(name: str, overrides: list[str]) -> dict[str, Any]:
    """Makes one part and leaves ``record.json`` beside it.

    Args:
        name: A key of ``PARTS``.
        overrides: ``KEY=VALUE`` of the part's config, and ``out=DIR``, the folder to write to; a training that was
            interrupted there continues. By default ``build/emoji/<name>``.

    Returns:
        What ``record.json`` holds.

    Raises:
        UserError: An unknown name or key, a value of the wrong type, or a missing package.
    """
    if name not in PARTS:
        raise UserError(f"{name}: no such part{nearest(name, list(PARTS))}; known: {', '.join(PARTS)}")
    config_name, function = PARTS[name]
    module = importlib.import_module(f"tools.emoji.{name}")
    config_type = getattr(module, config_name)
    defaults = {"out": f"build/emoji/{name}", **asdict(config_type())}
    try:
        merged = OmegaConf.merge(OmegaConf.create(defaults), OmegaConf.from_dotlist(overrides))
    except OmegaConfBaseException as error:
        raise UserError(f"{' '.join(overrides)}: {error}") from error
    values: Any = OmegaConf.to_container(merged, resolve=True)
    out = Path(values.pop("out"))
    config = build(config_type, values, "")
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    try:
        record = getattr(module, function)(config, out)
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs the package {error.name}: pip install -e '.[pretrain]'") from error
    record = {**record, "seconds": time.monotonic() - begun}
    (out / "record.json").write_text(json.dumps(record, indent=1))
    print(f"written to {out}")
    return record
