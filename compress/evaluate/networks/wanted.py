"""Whether the networks that a config names beyond Inception and CLIP are there, found out without loading any."""

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from compress.assets import resolve
from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    from compress.evaluate.config import EvaluateConfig

# What asks for a package: the module to look for, the package, and the extra that has it.
PACKAGES = {
    "evaluate.lpips=true": ("torchvision", "torchvision", "lpips"),
    "evaluate.preference=imagereward": ("ImageReward", "image-reward", "preference"),
    "evaluate.preference=hpsv2": ("hpsv2", "hpsv2", "preference"),
}


def check_wanted(config: "EvaluateConfig") -> None:
    """Checks encoders and packages; a hub id is checked by form alone.

    Raises:
        UserError: One of them is missing.
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
