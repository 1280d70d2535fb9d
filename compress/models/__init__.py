"""The model to compress: finding it, checking it, loading it, and its denoiser."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.assets import PREFIX, resolve
from compress.errors import UserError, bad_value
from compress.models.folder import DENOISERS, check_folder
from compress.models.outline import PATTERNS, Outline, read_outline
from compress.models.quiet import hide_notices, no_progress_bars
from compress.system.files import file_hash

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class ModelConfig:
    """Where the model comes from.

    Attributes:
        path: A folder in diffusers' layout, ``embedded:...``, or an id of the hub such as ``"owner/name"``.
        revision: Branch, tag or commit on the hub; None for its main branch.
        variant: Which weight files to take where a model has several, such as ``"fp16"``.
    """

    path: str
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        """Checks what can be told without looking at any file.

        Raises:
            UserError: If the path is empty.
        """
        if not self.path:
            raise bad_value("path", repr(self.path), "a folder with model_index.json, or the id of a model on the hub")

    @property
    def folder(self) -> Path | None:
        """The local folder, or None if the model is on the hub."""
        path = Path(resolve(self.path)).expanduser()
        if self.path.startswith((PREFIX, ".", "~", "/")) or path.is_absolute() or path.exists():
            return path
        return None


def check(config: ModelConfig) -> None:
    """Checks the model before anything heavy starts; loads neither torch nor weights.

    A model on the hub is only checked for the form of its id.

    Raises:
        UserError: If the path is no pipeline, or its files are not whole.
    """
    folder = config.folder
    if folder is None:
        if not _HUB_ID.fullmatch(config.path):
            raise _not_found(config)
        return
    if not folder.is_dir():
        raise _not_found(config)
    if config.revision is not None:
        raise bad_value("model.revision", config.revision, "null, as a local folder has no revisions")
    check_folder(folder, config.variant)


def _not_found(config: ModelConfig) -> UserError:
    return bad_value("model.path", config.path, "a folder with model_index.json, or the id of a model on the hub")


def fingerprint(config: ModelConfig) -> str:
    """What tells this model from every other: 64 hexadecimal digits.

    Of a local folder: SHA256 over the names and contents of its files, but for hidden files, documents and images.
    Of a model on the hub: over its id and commit, which is looked up.

    Raises:
        UserError: If the hub cannot be reached and does not have the model cached.
    """
    folder = config.folder
    digest = hashlib.sha256(f"variant={config.variant}\n".encode())
    if folder is None:
        digest.update(f"{config.path}@{_hub_commit(config)}".encode())
        return digest.hexdigest()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or file.suffix.lower() in (".md", ".png", ".jpg", ".jpeg", ".webp") or not file.is_file():
            continue
        digest.update(f"{name} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def _hub_commit(config: ModelConfig) -> str:
    """The commit that the revision stands for now; offline, the one that is cached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        file = hf_hub_download(config.path, "model_index.json", revision=config.revision)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise _hub_error(config, error) from error
    return Path(file).parent.name  # .../snapshots/<commit>/model_index.json


def _hub_error(config: ModelConfig, error: Exception) -> UserError:
    revision = f" at revision {config.revision}" if config.revision else ""
    return UserError(
        f"model.path={config.path}: no such folder here, and the hub did not give a pipeline of that id{revision}: "
        f"check the id, the connection and, for a gated model, the login ({_first_line(error)})"
    )


def outline(config: ModelConfig) -> Outline | None:
    """What the model's configs say of it; of a model on the hub its configs alone are fetched.

    Returns:
        None where the hub cannot be reached, or the configs cannot be read: loading says what is wrong.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = config.folder or Path(
            snapshot_download(config.path, revision=config.revision, allow_patterns=PATTERNS)
        )
        return read_outline(folder)
    except (OSError, ValueError, HfHubHTTPError, HFValidationError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_teacher(
    config: ModelConfig, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
) -> "DiffusionPipeline":
    """Loads the pipeline, frozen and in evaluation mode, without progress bars of its own.

    Args:
        config: Which model.
        device: Where its weights go.
        dtype: Precision of all weights, whatever that of the files is; None means float32.

    Returns:
        The pipeline as stock diffusers loads it; safetensors only.

    Raises:
        UserError: If the model cannot be found or loaded, or its denoiser is quantized.
    """
    check(config)
    hide_notices()
    import torch
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    folder = config.folder
    revision = None if folder is not None else _hub_commit(config)  # the very commit that the fingerprint names
    source = config.path if folder is None else str(folder)
    try:
        with no_progress_bars():
            pipeline = DiffusionPipeline.from_pretrained(
                source,
                revision=revision,
                variant=config.variant,
                dtype=dtype or torch.float32,
                use_safetensors=True,
                local_files_only=folder is not None,
            )
    except (OSError, HfHubHTTPError, ValueError, AttributeError, ImportError, SafetensorError) as error:
        if folder is None:
            raise _hub_error(config, error) from error
        raise UserError(
            f"model.path={config.path}: diffusers cannot load that pipeline ({_first_line(error)}): "
            f"does DiffusionPipeline.from_pretrained({source!r}) work?"
        ) from error
    if getattr(denoiser(pipeline), "hf_quantizer", None) is not None:
        raise bad_value("model.path", config.path, "a model in float weights; this one is quantized already")
    return freeze(pipeline.to(device))


def freeze(pipeline: "DiffusionPipeline") -> "DiffusionPipeline":
    """Turns off gradients, dropout and the sampling bar of a pipeline, and returns it."""
    import torch

    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser_name(pipeline: "DiffusionPipeline") -> str:
    """The denoiser's name in the pipeline: ``"unet"`` or ``"transformer"``.

    Raises:
        UserError: If the pipeline has neither.
    """
    for name in DENOISERS:
        if getattr(pipeline, name, None) is not None:
            return name
    raise UserError(f"{type(pipeline).__name__} has no unet and no transformer: nothing to compress")


def denoiser(pipeline: "DiffusionPipeline") -> "nn.Module":
    """The part of the pipeline that is compressed."""
    return getattr(pipeline, denoiser_name(pipeline))


def set_denoiser(pipeline: "DiffusionPipeline", module: "nn.Module") -> None:
    """Puts another denoiser in the place of the pipeline's, so that saving writes this one."""
    pipeline.register_modules(**{denoiser_name(pipeline): module})
