"""The outline of a pipeline: its classes and configs, read without loading a weight."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.models.folder import DENOISERS
from compress.models.sampling import INFO, Sampling, sampling_from

if TYPE_CHECKING:
    from torch import nn

CONFIGS = ("config.json", "scheduler_config.json")
PATTERNS = ["model_index.json", INFO, *(f"*/{name}" for name in CONFIGS)]
"""Files of a hub repository that an outline is read from."""


@dataclass(frozen=True)
class Outline:
    """A pipeline without weights.

    Attributes:
        kind: Class of the pipeline.
        classes: Name of each component to its library and its class.
        configs: Name of each component with a config to that config.
        sampling: How it has to be sampled, if it is a checkpoint that was trained for that.
    """

    kind: str
    classes: Mapping[str, tuple[str, str]]
    configs: Mapping[str, Mapping[str, Any]]
    sampling: Sampling = field(default_factory=Sampling)

    def denoiser(self) -> "nn.Module | None":
        """The denoiser as a meta-device model; None if its class is unknown."""
        import diffusers

        from compress.models.meta import meta_model

        name = next((name for name in DENOISERS if name in self.classes and name in self.configs), None)
        if name is None:
            return None
        library, class_name = self.classes[name]
        owner = diffusers if library == "diffusers" else getattr(diffusers.pipelines, library, None)
        model_class = getattr(owner, class_name, None)
        if model_class is None:
            return None
        try:
            return meta_model(model_class, self.configs[name])
        except (ValueError, TypeError, KeyError, NotImplementedError):
            return None  # loading reports the error

    def scheduler(self) -> Any:
        """The scheduler; None if its class is unknown or the pipeline has none."""
        import diffusers

        _, class_name = self.classes.get("scheduler", ("", ""))
        scheduler_class = getattr(diffusers, class_name, None) if "scheduler" in self.configs else None
        return scheduler_class.from_config(dict(self.configs["scheduler"])) if scheduler_class else None

    @property
    def multiple(self) -> int:
        """Height and width of an image must be multiples of this; 1 if the configs do not say.

        An autoencoder halves the sides once for each level but the first; a transformer takes patches of its latents.
        Pipelines require multiples of 8 with any autoencoder.
        """
        vae = self.configs.get("vae", {})
        levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
        if not levels:
            return 1
        patch = self.configs.get("transformer", {}).get("patch_size")
        return int(max(8, 2 ** (len(levels) - 1) * (patch if isinstance(patch, int) else 1)))


def read_outline(folder: Path) -> Outline:
    """Reads a folder in diffusers' layout, with or without weights.

    Raises:
        OSError: It has no ``model_index.json``.
        ValueError: A config is not JSON.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    configs = {}
    for name in entries:
        file = next((folder / name / config for config in CONFIGS if (folder / name / config).is_file()), None)
        if file is not None:
            configs[name] = json.loads(file.read_text(encoding="utf-8"))
    classes = {name: (str(library), str(kind)) for name, (library, kind) in entries.items() if library and kind}
    file = folder / INFO
    info = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Outline(str(index.get("_class_name")), classes, configs, sampling_from(info))
