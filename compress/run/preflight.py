"""Checks before any weight is loaded: model, data, device, folders, disk space."""

import errno
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import compress.models
from compress.errors import UserError, bad_value
from compress.run.config import RunConfig

if TYPE_CHECKING:
    from compress.data import Verified
    from compress.evaluate import EvaluateConfig
    from compress.models.outline import Outline

FULL = (errno.ENOSPC, errno.EDQUOT)
REPLACED = ("images", "checkpoint")  # folders of an earlier run that a run replaces
SPARE = 64 * 1024**2  # bytes for reports, images and logs


def check(config: RunConfig) -> "Verified | None":
    """Checks all that can be checked before the run begins.

    Returns:
        The result of :func:`compress.data.verify`.

    Raises:
        UserError: With the config key, its value and what would be right.
    """
    import compress.data
    import compress.track
    import compress.track.hub
    from compress.evaluate import check as check_evaluation

    compress.models.check(config.model)
    compress.data.check(config.data)
    check_evaluation(config.evaluate)
    check_reference(config)
    compress.track.check(config.track)
    if config.publish is not None:
        compress.track.hub.check(config.publish)
    check_device(config.device)
    check_prompts(config)
    check_stages(config)
    for key, folder in (("out", config.out), ("store", config.store)):
        check_writable(key, folder)
    check_replaced(config)
    tell_clip(config)
    return compress.data.verify(config.data, config.store / "data")


def check_replaced(config: RunConfig) -> None:
    """Refuses a folder whose ``images`` or ``checkpoint``, which a run replaces, are not those of an earlier run.

    Raises:
        UserError: They are somebody else's, or the run reads something in them.
    """
    from compress.assets import resolve
    from compress.run.output import is_config

    inputs = {"data.path": config.data.path, "model.path": config.model.path, "evaluate.reference": None}
    inputs["evaluate.reference"] = config.evaluate.reference
    for name in REPLACED:
        folder = (config.out / name).resolve()
        for key, given in inputs.items():
            place = Path(resolve(given)).expanduser().resolve() if given is not None else None
            if place is not None and folder in (place, *place.parents):
                raise bad_value("out", config.out, f"another folder: its {name}, which the run replaces, is {key}")
        there = folder.is_dir() and any(folder.iterdir())
        if there and not is_config(config.out / "config.yaml"):
            raise bad_value("out", config.out, f"a folder of an earlier run, or without {name}, which a run replaces")
    if (config.out / "config.yaml").is_file() and not is_config(config.out / "config.yaml"):
        raise bad_value("out", config.out, "another folder: its config.yaml, which a run replaces, is of no run")


def check_reference(config: RunConfig) -> None:
    """Refuses metrics that need real images where there are none.

    Raises:
        UserError: With the metrics.
    """
    import compress.data
    from compress.evaluate.config import SETS

    settings = config.evaluate
    if not settings.images or settings.reference is not None or compress.data.has_images(config.data):
        return
    wanted = [*filter(settings.wants, SETS), *settings.encoders]
    if wanted:
        raise UserError(
            f"data.path={config.data.path} has prompts without images, and {', '.join(wanted)} compare with real "
            "images: set evaluate.reference to a folder of images, or leave these metrics out (evaluate.leave_out)"
        )


def tell_clip(config: RunConfig) -> None:
    """Says where the CLIP network that knows emoji only would score images of other data."""
    from compress.evaluate.config import EMBEDDED_CLIP, OTHER_CLIP
    from compress.evaluate.networks import OF_CLIP_IMAGES, OF_CLIP_TEXT
    from compress.system.progress import say

    settings = config.evaluate
    measured = settings.images and any(map(settings.wants, (*OF_CLIP_IMAGES, *OF_CLIP_TEXT)))
    if measured and settings.clip == EMBEDDED_CLIP and not config.data.is_embedded:
        say(OTHER_CLIP)


def check_prompts(config: RunConfig) -> None:
    """Refuses prompts for the teacher's samples where there are images and no stage samples.

    Raises:
        UserError: With the key that makes it sample.
    """
    import compress.data

    samples = [getattr(stage.config, "samples", None) for stage in config.stages]
    if not compress.data.has_images(config.data) or any(one is not None and one.count for one in samples):
        return
    names = [stage.name for stage, one in zip(config.stages, samples, strict=True) if one is not None]
    key = f"stages.{names[0]}.samples.count" if names else "samples.count of a stage that distills"
    for name, usual in (("prompts", None), ("styles", ())):
        if (given := getattr(config.data, name)) and given != usual:
            shown = list(given) if name == "styles" else given
            raise bad_value(f"data.{name}", shown, f"nothing here, since no sample is drawn; set {key} for samples")


def check_stages(config: RunConfig) -> None:
    """Runs the methods' checks against the model, before a weight is loaded.

    A method's ``check(config, denoiser, outline)`` gets a meta-device model of the denoiser that the stages before will
    leave, and the :class:`compress.models.outline.Outline` of the teacher. It returns the denoiser that its stage would
    leave, or None if weights or examples decide that. After a None, only stages that look at nothing but names of
    layers (``Stage.by_names``) are checked, as long as no stage may have changed the names.

    A method's ``check_teacher(config, outline)`` is called before that and does not depend on the stages before.

    Raises:
        UserError: With the stage's key, its value and what would be right.
    """
    for stage in config.stages:
        try:
            stage.declared.check_installed(stage.method)
        except UserError as error:
            raise UserError(f"stages.{stage.name}.{error}") from error
    outline = compress.models.outline(config.model)
    if outline is None:
        return
    import diffusers

    from compress.models.call import check_call, check_draws, check_steps
    from compress.models.schedulers import exchanged

    kind = getattr(diffusers, outline.kind, None)
    check_call(kind, config.model.path)
    check_draws(kind, config.evaluate.images)
    own, name = outline.scheduler(), config.evaluate.scheduler
    other = exchanged(own, name) if own is not None and name != "checkpoint" else None
    check_steps(outline.kind, own if other is None else other, config.evaluate.steps, "evaluate.steps")
    check_size(config.evaluate, outline)
    for stage in config.stages:
        try:
            if check_teacher := getattr(stage.module, "check_teacher", None):
                check_teacher(stage.config, outline)
        except UserError as error:
            raise stage.explain(error) from error
    denoiser = outline.denoiser()
    exact = True
    for stage in config.stages:
        check_method = getattr(stage.module, "check", None)
        if denoiser is None or check_method is None or not (exact or stage.declared.by_names):
            return
        try:
            left = check_method(stage.config, denoiser, outline)
        except UserError as error:
            raise stage.explain(error) from error
        exact = exact and left is not None
        if left is not None:
            denoiser = left
        elif not stage.declared.keeps_names:
            return


def check_size(config: "EvaluateConfig", outline: "Outline") -> None:
    """Refuses an image size that the pipeline would refuse.

    Raises:
        UserError: With the key, its value and the nearest valid one.
    """
    for key in ("height", "width"):
        value, multiple = getattr(config, key), outline.multiple
        if value is not None and value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise bad_value(
                f"evaluate.{key}", value, f"a multiple of {multiple}, as {outline.kind} needs it, such as {near}"
            )


def check_device(device: str) -> None:
    """Refuses a device that this machine does not have.

    Raises:
        UserError: With the available devices.
    """
    import torch

    kind, _, index = device.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind in count and int(index or 0) >= count[kind]:
        there = ["cpu", *(f"cuda:{i}" for i in range(count["cuda"])), *["mps"] * count["mps"]]
        raise bad_value("device", device, f"a device of this machine: auto, {', '.join(there)}")


def check_writable(key: str, folder: Path) -> None:
    """Writes and removes a file in ``folder``, or where it would be created.

    Raises:
        UserError: The folder cannot be created or written to.
    """
    name = f".probe-{uuid.uuid4().hex}"
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    try:
        (there / name).write_bytes(b"probe")
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(error, folder) from error
        reason = error.strerror or str(error)
        raise UserError(f"{key}={folder}: cannot be written to ({reason}); give {key}= a folder that can") from error
    finally:
        with suppress(OSError):
            (there / name).unlink()


def check_room(folder: Path, checkpoint_bytes: int, checkpoints: int) -> None:
    """Refuses to start if the disk lacks space.

    Args:
        folder: The store, existing or not.
        checkpoint_bytes: Size of the teacher; a checkpoint is at most twice that (half precision becoming fp32).
        checkpoints: Number of checkpoints to write.

    Raises:
        UserError: With the bytes needed and free.
    """
    wanted = SPARE + 2 * checkpoint_bytes * checkpoints
    free = shutil.disk_usage(existing(folder)).free
    if free < wanted:
        raise UserError(
            f"store={folder}: the disk has {free / 1e6:.0f} MB free, and this run may need {wanted / 1e6:.0f} MB: "
            "make room or give store= a folder on another disk"
        )


def existing(folder: Path) -> Path:
    """The folder, or the nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def disk_full(error: BaseException, *folders: Path) -> UserError:
    """The message for a full disk: of the file that could not be written, else of the folder with the least space."""
    name = getattr(error, "filename", None) or min(folders, key=lambda at: shutil.disk_usage(existing(at)).free)
    reason = str(error) if len(str(error)) < 200 else os.strerror(errno.ENOSPC)  # copying a tree lists all its files
    return UserError(
        f"{name}: the disk is full ({reason}); finished stages are kept: make room, or give out= and store= on another "
        "disk, and run the same command again"
    )


def is_disk_full(error: BaseException, *folders: Path) -> bool:
    """Whether an error or one of its causes means a full disk.

    Some writers (safetensors, torch) hide the system's error in their own, so the free space is checked too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        if os.strerror(errno.ENOSPC) in str(seen) or os.strerror(errno.EDQUOT) in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    writing = isinstance(error, OSError) or "writ" in str(error).lower()
    return writing and any(shutil.disk_usage(existing(folder)).free < 64 * 1024 for folder in folders)
