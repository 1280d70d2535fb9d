"""Saves checkpoints that stock diffusers reads back with the same outputs, and verifies them later.

A checkpoint is a folder in diffusers' layout with two more files: ``compress.json`` (origin, measurements, result of
the read-back) and ``compress.sha256.json`` (the SHA256 of every other file). A model with layers that a stock config
cannot express adds its model file: a copy of ``compress/models/compressed_model.py``, with which diffusers loads it
where ``compress`` is not imported.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.errors import UserError
from compress.models import denoiser, denoiser_name, freeze
from compress.models.folder import MODEL_FILE, check_code
from compress.models.quantized import plain_tensors, read_ranges, set_ranges, write_ranges
from compress.models.quiet import hide_notices, no_progress_bars
from compress.models.sampling import INFO, keep_sampling
from compress.system.files import file_hash, flush, known_hash, replace_folder_with, replace_with, sort_header

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

MANIFEST = "compress.sha256.json"
TOLERANCE = 1e-5  # of the largest output, unless it must agree bit for bit
PROBE_SEED = 0


def save_checkpoint(
    pipeline: "DiffusionPipeline",
    folder: Path,
    info: dict[str, Any],
    card: str | None = None,
    *,
    store: Path | None = None,
    exact: bool = False,
    libraries: Sequence[str] = (),
    artifact: Path | None = None,
) -> None:
    """Writes a pipeline to a temporary folder, checks that stock diffusers reads back the same, and renames it.

    An existing folder is replaced. On any error, ``folder`` is unchanged.

    Args:
        pipeline: Any pipeline with a denoiser whose weights diffusers can save.
        folder: Where to put the checkpoint.
        info: Content of ``compress.json``, JSON-able; ``"probe"`` and ``"versions"`` are added.
        card: Text of the model card, ``README.md``.
        store: A folder of checkpoints on the same disk. Files that one of them already holds, such as the VAE and the
            text encoder, become hard links to it.
        exact: Whether outputs must read back bit for bit, as quantized weights allow; else within 1e-5 of the largest.
        libraries: Packages besides diffusers that loading needs; their versions are recorded.
        artifact: A folder of further files, such as an export; it is copied into the checkpoint as ``artifact``.

    Raises:
        UserError: If a weight or an output is not finite, or the disk is full or cannot be written.
        RuntimeError: If the read-back differs from what was saved.
    """
    folder = Path(folder).absolute()
    _check_finite(pipeline)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(pipeline, folder)
        with replace_folder_with(folder) as beside:
            _write_pipeline(pipeline, beside)
            write_ranges(denoiser(pipeline), beside / denoiser_name(pipeline))
            probe = _read_back(pipeline, beside, exact)
            full_info = {**info, "probe": probe, "versions": _versions(libraries)}
            (beside / INFO).write_text(json.dumps(full_info, indent=2) + "\n", encoding="utf-8")
            if artifact is not None:
                shutil.copytree(artifact, beside / "artifact")
            if card is not None:
                (beside / "README.md").write_text(card, encoding="utf-8")
            manifest = {name: file_hash(beside / name) for name in _files(beside)}
            (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            if store is not None:
                _link_equal(beside, manifest, store)
            _settle(beside)
    except OSError as error:
        raise _write_error(folder, error) from error


def load_checkpoint(
    folder: Path, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
) -> "DiffusionPipeline":
    """Loads a checkpoint as stock diffusers does, frozen; float32 unless ``dtype`` says otherwise.

    Raises:
        UserError: If it carries code other than our own model file.
    """
    check_code(Path(folder))
    hide_notices()
    import torch
    from diffusers import DiffusionPipeline

    with no_progress_bars():
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), dtype=dtype or torch.float32, use_safetensors=True, local_files_only=True
        )
    set_ranges(denoiser(pipeline), read_ranges(denoiser(pipeline), Path(folder) / denoiser_name(pipeline)))
    return keep_sampling(freeze(pipeline.to(device)), Path(folder))


def model_file(pipeline: "DiffusionPipeline") -> str | None:
    """The model file in the checkpoint of a pipeline, such as ``"unet/compressed_model.py"``, or None."""
    name = denoiser_name(pipeline)
    own = getattr(pipeline, name).__module__ == MODEL_FILE.stem
    return f"{name}/{MODEL_FILE.name}" if own else None


def read_info(folder: Path) -> dict[str, Any]:
    """The content of ``compress.json``.

    Raises:
        UserError: If the folder has none or it cannot be read.
    """
    return _read_json(folder, INFO)


def verify_checkpoint(folder: Path) -> None:
    """Checks every file of a checkpoint against its SHA256.

    Raises:
        UserError: If a file is missing, changed or unexpected.
    """
    manifest = _read_json(folder, MANIFEST)
    present = set(_files(folder))
    for name in sorted(present | set(manifest)):
        if name not in present:
            raise _damaged(folder, folder / name, "is missing")
        if name not in manifest:
            raise _damaged(folder, folder / name, "does not belong there")
        if known_hash(folder / name) != manifest[name]:
            raise _damaged(folder, folder / name, "is not what was saved: its SHA256 has changed")


def verify_shared(folder: Path) -> None:
    """Checks a checkpoint before it is given to others.

    Raises:
        UserError: A file is missing, changed or unexpected, or the checkpoint was never read back.
    """
    verify_checkpoint(folder)
    needed = {
        "model card (README.md)": (folder / "README.md").is_file(),
        "result of a read-back": "probe" in read_info(folder),
    }
    missing = [name for name, there in needed.items() if not there]
    if missing:
        raise UserError(f"{folder}: the checkpoint has no {' and no '.join(missing)}, so it is not shared")


def _write_pipeline(pipeline: "DiffusionPipeline", folder: Path) -> None:
    from safetensors import SafetensorError

    with no_progress_bars():
        try:
            pipeline.save_pretrained(str(folder), safe_serialization=True)
        except SafetensorError as error:  # how safetensors says that the disk is full
            raise OSError(str(error)) from error
    for file in folder.rglob("*.safetensors"):
        sort_header(file)


def _read_back(pipeline: "DiffusionPipeline", folder: Path, exact: bool) -> dict[str, Any]:
    """Loads the saved pipeline and compares weights and outputs; returns the comparison for ``compress.json``."""
    import torch

    from compress.models.inputs import captured_inputs, predict, small_inputs

    ours: Any = denoiser(pipeline)
    try:
        loaded = load_checkpoint(folder, ours.device, ours.dtype)
    except Exception as error:
        raise RuntimeError(f"stock diffusers cannot load what was saved, so it is not kept: {error}") from error
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            _compare_weights(name, component, getattr(loaded, name))
    inputs = small_inputs(ours, PROBE_SEED) or captured_inputs(pipeline, seed=PROBE_SEED)
    theirs = denoiser(loaded)
    expected, output = predict(ours, inputs), predict(theirs, inputs)
    if not torch.isfinite(expected).all():
        raise UserError(f"the denoiser gives NaN or infinite outputs in {ours.dtype}: use precision=fp32 or bf16")
    largest = expected.float().abs().max().item()
    difference = (output.float() - expected.float()).abs().max().item()
    same = torch.equal(output, expected) if exact else difference <= TOLERANCE * largest
    if not same:
        raise RuntimeError(
            f"the denoiser read back by stock diffusers gives different outputs: outputs of up to {largest:.3g} differ "
            f"by up to {difference:.3g}; the checkpoint is not kept"
        )
    return {
        "seed": PROBE_SEED,
        "sha256": hashlib.sha256(expected.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        "dtype": str(ours.dtype).removeprefix("torch."),
        "device": ours.device.type,
        "largest_difference": difference,
        "largest_output": largest,
    }


def _compare_weights(name: str, ours: "nn.Module", loaded: "nn.Module") -> None:
    import torch

    expected, found = dict(plain_tensors(ours)), dict(plain_tensors(loaded))
    if expected.keys() != found.keys():
        names = ", ".join(sorted(expected.keys() ^ found.keys())[:3])
        raise RuntimeError(f"{name}: stock diffusers reads back different weights from those saved: {names}, ...")
    for key, tensor in expected.items():
        # All was loaded in the denoiser's precision; another component may have been saved in another.
        if not torch.equal(tensor.to(found[key].dtype).cpu(), found[key].cpu()):
            raise RuntimeError(f"{name}: {key} reads back different from what was saved; the checkpoint is not kept")


def _check_finite(pipeline: "DiffusionPipeline") -> None:
    import torch

    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            for key, tensor in plain_tensors(component):
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():  # float8 has no isfinite
                    raise UserError(f"{name}: {key} holds NaN or infinite values, so nothing is saved: lower the lr")


def _check_space(pipeline: "DiffusionPipeline", folder: Path) -> None:
    """Checks the free space before writing: a disk that fills up while a file is mapped can kill the process."""
    import torch

    needed = sum(
        tensor.numel() * tensor.element_size()
        for component in pipeline.components.values()
        if isinstance(component, torch.nn.Module)
        for _, tensor in plain_tensors(component)
    )
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise UserError(
            f"no space left on the disk that holds {folder.parent}: {needed / 1e6:.1f} MB are needed and "
            f"{free / 1e6:.1f} MB free: free some, or name another disk with out= or store="
        )


def _write_error(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    free = shutil.disk_usage(next(parent for parent in folder.parents if parent.exists())).free
    return UserError(
        f"the checkpoint {folder} cannot be written ({reason}; {free / 1e6:.1f} MB free there) and was removed; "
        "make room or make the folder writable, or name another place with out= or store="
    )


def _versions(libraries: Sequence[str]) -> dict[str, str]:
    names = ["torch", "diffusers", "transformers", *libraries]
    return {"compress": __version__, **{name: version(name) for name in names}}


def _settle(folder: Path) -> None:
    """Gives new files the usual permissions (safetensors' are private) and flushes them to disk."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            if path.stat().st_nlink > 1:  # another checkpoint's
                continue
            path.chmod(0o666 & ~mask)
        flush(path)


def _link_equal(folder: Path, manifest: dict[str, str], store: Path) -> None:
    """Replaces files of a new checkpoint by hard links to equal files in the store."""
    missing = dict(manifest)
    for file in sorted(store.glob(f"[!.]*/{MANIFEST}")):
        try:
            theirs = {digest: file.parent / name for name, digest in _read_json(file.parent, MANIFEST).items()}
        except UserError:
            continue  # damaged: a run that needs that checkpoint reports it
        for name in [name for name, digest in missing.items() if digest in theirs]:
            try:
                if known_hash(theirs[missing[name]]) == missing[name]:
                    with replace_with(folder / name) as beside:
                        os.link(theirs[missing[name]], beside)
                    del missing[name]
            except OSError:  # just deleted, not ours, or a file system without hard links
                continue


def _files(folder: Path) -> list[str]:
    """Names of all files but the manifest, relative to the folder."""
    files = (path.relative_to(folder).as_posix() for path in sorted(Path(folder).rglob("*")) if not path.is_dir())
    return [name for name in files if name != MANIFEST]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _damaged(folder, Path(folder) / name, "is missing or cannot be read") from None
    if not isinstance(content, dict):
        raise _damaged(folder, Path(folder) / name, "is missing or cannot be read")
    return content


def _damaged(folder: Path, file: Path, what: str) -> UserError:
    return UserError(
        f"the checkpoint is damaged: {file} {what}: delete the folder {folder} and run again; it is then computed again"
    )
