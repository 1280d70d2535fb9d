"""Finds, checks and loads the model to compress, and its denoiser."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.assets import PREFIX, resolve
from compress.errors import UserError, bad_value
from compress.models.folder import DENOISERS, check_folder
from compress.models.outline import PATTERNS, Outline, read_outline
from compress.models.quantized import is_quantized
from compress.models.quiet import hide_notices, no_progress_bars, say_truncations_once
from compress.models.sampling import INFO, keep_sampling
from compress.system.files import known_hash

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class ModelConfig:
    """Where the model comes from.

    Attributes:
        path: A folder in diffusers' layout, ``embedded:...``, or a hub id such as ``"owner/name"``.
        revision: Branch, tag or commit on the hub; None for its main branch.
        variant: Variant of the weight files, such as ``"fp16"``; None for the plain ones.
    """

    path: str
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        """Checks the values without reading a file.

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
    """Checks the model's files without loading torch or weights; of a hub model only the form of its id.

    Raises:
        UserError: If the path is no pipeline, or files are missing or damaged.
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
    """SHA256 that identifies the model: 64 hexadecimal digits.

    Of a local folder: over the names and contents of its files without hidden files, documents and images. Of a hub
    model: over its id and current commit.

    Raises:
        UserError: If the hub cannot be reached and the model is not cached.
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
        digest.update(f"{name} {known_hash(file)}\n".encode())
    return digest.hexdigest()


def _hub_commit(config: ModelConfig) -> str:
    """The current commit of the revision; offline, the cached one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        file = hf_hub_download(config.path, "model_index.json", revision=config.revision)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise _hub_error(config, error) from error
    return Path(file).parent.name  # .../snapshots/<commit>/model_index.json


def hub_info(config: ModelConfig) -> Path | None:
    """The folder of the downloaded ``compress.json`` of a hub model; None if it is no checkpoint of ours.

    Raises:
        UserError: The hub cannot be reached and the model is not cached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(config.path, INFO, revision=_hub_commit(config))).parent
    except EntryNotFoundError:
        return None


def _hub_error(config: ModelConfig, error: Exception) -> UserError:
    revision = f" at revision {config.revision}" if config.revision else ""
    return UserError(
        f"model.path={config.path}: no such folder here, and the hub returned no pipeline of that id{revision}: "
        f"check the id, the connection and, for a gated model, the login ({_first_line(error)})"
    )


def outline(config: ModelConfig) -> Outline | None:
    """The outline of the model from its configs; of a hub model only the configs are downloaded.

    Returns:
        None if the hub cannot be reached or a config cannot be read; loading then reports the error.
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
    """Loads the pipeline, frozen and in evaluation mode, without progress bars.

    Args:
        config: Of the model.
        device: For its weights.
        dtype: Of all loaded weights; None means float32.

    Returns:
        The pipeline as stock diffusers loads it, from safetensors only.

    Raises:
        UserError: If the model cannot be found or loaded, its denoiser is quantized, or a weight is missing or not
            finite.
    """
    check(config)
    hide_notices()
    import torch
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    folder = config.folder
    revision = None if folder is not None else _hub_commit(config)  # the commit of the fingerprint
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
    if is_quantized(denoiser(pipeline)):
        raise bad_value("model.path", config.path, "a model in float weights; this one is quantized already")
    _check_weights(pipeline, config)
    say_truncations_once(pipeline)
    return keep_sampling(freeze(pipeline.to(device)), folder or hub_info(config))


def _check_weights(pipeline: "DiffusionPipeline", config: ModelConfig) -> None:
    """Refuses weights that are missing, NaN or infinite, in the precision that they were loaded in.

    Raises:
        UserError: Naming the first.
    """
    import torch

    from compress.models.meta import finite

    for name, part in pipeline.components.items():
        for key, tensor in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            if tensor.is_meta:
                raise UserError(f"model.path={config.path}: {key} of its {name} is in no file: copy the model again")
            if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and not finite(tensor):
                remedy = "use precision=fp32 or bf16, or" if tensor.dtype == torch.float16 else "it is damaged:"
                raise UserError(
                    f"model.path={config.path}: {key} of its {name} holds NaN or infinite values: {remedy} copy or "
                    "download the model again"
                )


def freeze(pipeline: "DiffusionPipeline") -> "DiffusionPipeline":
    """Disables gradients, dropout and the sampling bar of a pipeline, and returns it."""
    import torch

    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser_name(pipeline: "DiffusionPipeline") -> str:
    """Name of the denoiser in the pipeline: ``"unet"`` or ``"transformer"``.

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
    """Replaces the pipeline's denoiser, so that saving writes the new one."""
    pipeline.register_modules(**{denoiser_name(pipeline): module})
