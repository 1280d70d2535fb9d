"""Checks that encoders and packages named in a config exist, without loading them."""

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from compress.assets import resolve
from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    from compress.evaluate.config import EvaluateConfig

# Config key to the module to look for, its package, and the extra that installs it.
PACKAGES = {
    "evaluate.lpips=true": ("torchvision", "torchvision", "lpips"),
    "evaluate.preference=imagereward": ("ImageReward", "image-reward", "preference"),
    "evaluate.preference=hpsv2": ("hpsv2", "hpsv2", "preference"),
}


def check_available(config: "EvaluateConfig") -> None:
    """Checks encoders and packages. Of a hub id only the form is checked.

    Raises:
        UserError: An encoder or a package is missing.
    """
    for name, path in config.encoders.items():
        local = path.startswith(("embedded:", "/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        if local and not (Path(resolve(path)).expanduser() / "config.json").is_file():
            expected = "a folder with an image encoder's config.json, or a hub id such as facebook/dinov2-large"
            raise bad_value(f"evaluate.encoders.{name}", path, expected)
    asked = ["evaluate.lpips=true"] if config.lpips else []
    for key in [*asked, *(f"evaluate.preference={name}" for name in config.preference)]:
        module, package, extra = PACKAGES.get(key, ("", "", ""))
        if module and importlib.util.find_spec(module) is None:
            raise UserError(f"{key}: needs the package {package}, which is not installed: pip install -e '.[{extra}]'")
