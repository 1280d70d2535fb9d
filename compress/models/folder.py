"""Checks a pipeline's folder without loading a weight: is it complete, and can it be compressed?"""

import json
import re
import struct
from pathlib import Path
from typing import Any

from compress.errors import UserError

DENOISERS = ("unet", "transformer")
MODEL_FILE = Path(__file__).with_name("compressed_model.py")  # copied into checkpoints with shaped layers


def check_folder(folder: Path, variant: str | None = None) -> None:
    """Checks that ``folder`` holds a complete pipeline in diffusers' layout with a float denoiser.

    Reads the configs and the headers of the weight files only.

    Args:
        folder: An existing or missing folder.
        variant: Of the weight files, such as ``"fp16"``; None for the plain ones.

    Raises:
        UserError: If the folder is no pipeline, lacks files, or a weight file is truncated.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise UserError(f"model.path: {folder} has no model_index.json: expected the folder of a diffusers pipeline")
    index = _read_json(index_file)
    if isinstance(index.get("_class_name"), list):
        raise UserError(f"model.path: {folder} needs a custom pipeline class: expected a pipeline of diffusers")
    components = {
        name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and all(entry)
    }
    names = [name for name in DENOISERS if name in components]
    if not names:
        raise UserError(f"model.path: the pipeline {folder} has no unet and no transformer: nothing to compress")
    check_code(folder)
    for name in components:
        _check_component(folder, name, variant)
    config = _read_json(folder / names[0] / "config.json")
    if config.get("quantization_config") or config.get("packed_layers"):
        raise UserError(f"model.path: {folder / names[0]} is quantized already: expected a model in float weights")


def check_code(folder: Path) -> None:
    """Checks that a pipeline needs none of its own code but our model file.

    For the model file the installed class is loaded (see :mod:`compress.models.registration`), so no file of the
    folder is run.

    Raises:
        UserError: If diffusers would have to run a file of the folder, or the model file differs from ours.
    """
    for file in code_files(folder):
        if file.name != MODEL_FILE.name:
            raise UserError(
                f"{file} is code that loading that pipeline would run, and compress never runs code of a model: give a "
                "model.path with classes of diffusers and transformers only"
            )
        if file.read_bytes() != MODEL_FILE.read_bytes():
            raise UserError(
                f"{file} is not the model file of this version of compress and is not run: it was changed, or another "
                "version wrote it; use that version (compress.json names it), or make the checkpoint again"
            )


def code_files(folder: Path) -> list[Path]:
    """Python files that diffusers would run to load a pipeline, by its ``model_index.json``."""
    index = _read_json(folder / "model_index.json")
    entries = {name: entry[0] for name, entry in index.items() if isinstance(entry, list) and entry and entry[0]}
    files = [folder / name / f"{module}.py" for name, module in entries.items()]
    return [file for file in files if file.is_file()]


def _check_component(folder: Path, name: str, variant: str | None) -> None:
    component = folder / name
    if not component.is_dir():
        raise UserError(f"model.path: {component} is missing, but {folder / 'model_index.json'} names it")
    if not (component / "config.json").is_file():
        if name in DENOISERS:
            raise UserError(f"model.path: {component} has no config.json: copy the pipeline again")
        return  # schedulers, tokenizers and image processors have no weights
    files = sorted(component.glob("*.safetensors"))
    wanted = weight_files(component, variant)
    if not wanted:
        raise UserError(_no_weights(component, files, variant))
    for index_file in component.glob("*.safetensors.index*.json"):
        shards = {component / str(shard) for shard in _read_json(index_file).get("weight_map", {}).values()}
        for shard in sorted(shards - set(files)):
            if not variant or _variant(shard) == variant:
                raise UserError(f"model.path: {shard} is missing, but {index_file.name} names it: copy it again")
    for file in wanted:
        check_safetensors(file)


def weight_files(component: Path, variant: str | None = None) -> list[Path]:
    """A model's safetensors files (shards): those of the variant, or the plain ones if it has none."""
    files = sorted(component.glob("*.safetensors"))
    return [file for file in files if variant and _variant(file) == variant] or [f for f in files if not _variant(f)]


def _variant(file: Path) -> str:
    """``fp16`` for ``model.fp16.safetensors`` or ``model.fp16-00001-of-00002.safetensors``; empty for no variant."""
    middle = file.name.split(".")[1:-1]
    return re.sub(r"-\d+-of-\d+$", "", middle[0]) if middle else ""


def _no_weights(component: Path, files: list[Path], variant: str | None) -> str:
    if files:
        variants = sorted({_variant(file) or "none" for file in files})
        return f"model.variant={variant}: {component} has only the variant(s) {', '.join(variants)}: set one of them"
    if any(component.glob("*.bin")):
        return (
            f"model.path: {component} has its weights only as pickle (.bin), which can run code when loaded: "
            "convert them first, with DiffusionPipeline.from_pretrained(...).save_pretrained(...), "
            "and give that folder"
        )
    return f"model.path: {component} has a config.json but no .safetensors file: copy the pipeline again"


def check_safetensors(file: Path) -> None:
    """Checks a safetensors file's length against its header.

    Raises:
        UserError: If the file is truncated, too long, or in another format.
    """
    size = file.stat().st_size
    broken = UserError(f"{file} is damaged: its header cannot be read: copy or download that file again")
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise broken
        length = struct.unpack("<Q", start)[0]
        if length > size - 8:
            raise broken
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise broken from None
    if size != whole:
        raise UserError(f"{file} is damaged: {size} bytes where {whole} are expected: copy or download it again")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): copy that file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: copy that file again")
    return content
