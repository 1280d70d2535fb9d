"""The training of the embedded default: its images, autoencoder, ``emoji-clip`` and teacher.

Nothing here is needed to compress a model. It is what made the files in ``compress/assets``, kept so that
anyone can make them again with one command each: ``python -m compress recipe=train_emoji_autoencoder`` and so on.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from compress.config.values import build, nearest
from compress.errors import UserError

# What can be trained or made: the module here, its config and its function.
METHODS = {
    "images": ("ImagesConfig", "build_images"),
    "autoencoder": ("AutoencoderConfig", "train_autoencoder"),
    "clip": ("ClipConfig", "train_clip"),
    "teacher": ("TeacherConfig", "train_teacher"),
    "bars": ("BarsConfig", "measure_bars"),
}


def run(values: dict[str, Any], out: Path) -> dict[str, Any]:
    """Runs one method of this package and leaves ``record.json`` beside what it made.

    Args:
        values: The recipe's ``pretrain`` node: ``method`` and that method's own keys.
        out: The folder to write to; a training that was interrupted there continues.

    Raises:
        UserError: An unknown method or key, a value of the wrong type, or a missing package.
    """
    own = dict(values)
    method = str(own.pop("method", None))
    if method not in METHODS:
        raise UserError(
            f"pretrain.method={method}: unknown{nearest(method, list(METHODS))}; known: {', '.join(METHODS)}"
        )
    config_name, function = METHODS[method]
    module = importlib.import_module(f"compress.pretrain.{method}")
    config = build(getattr(module, config_name), own, "pretrain")
    out.mkdir(parents=True, exist_ok=True)
    try:
        record = getattr(module, function)(config, out)
    except ModuleNotFoundError as error:
        raise UserError(
            f"pretrain.method={method} needs the package {error.name}: pip install -e '.[pretrain]'"
        ) from error
    (out / "record.json").write_text(json.dumps(record, indent=1))
    print(f"written to {out}")
    return record
