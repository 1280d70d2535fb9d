"""The store: checkpoints and evaluations, each under the hash of everything that decides its content."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.system.files import file_hash, known_hash, link
from compress.system.leases import leased

if TYPE_CHECKING:
    import torch

MANIFEST = "sha256.json"


class Store:
    """A folder of checkpoints (``<key>/``), evaluations (``evaluations/<key>/``) and unfinished work (``work/<key>/``).

    Encoded examples (``examples/<key>/``), features (``features/``), compiled graphs (``graphs/``) and what the check
    of the data found (``data/``) are computed again where they are missing. ``runs/`` says which runs use the store
    (:mod:`compress.store.uses`).

    Any number of runs may share one: entries are written to a temporary path and renamed, and the process that computes
    an entry holds its lock. It shows that it lives by touching the lock's file; another process takes the lock over as
    soon as its holder has ended, or on another machine has not touched it for a time (:mod:`compress.system.leases`).
    Machines are told apart by their host names.

    Args:
        root: The folder; created on the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sound: set[Path] = set()  # verified by this process, so that each is hashed once

    @staticmethod
    def key(parts: dict[str, Any]) -> str:
        """16 hexadecimal digits of the SHA-256 of ``parts`` as JSON; the order of keys does not matter."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, key: str) -> Path:
        """Path of the checkpoint of ``key``, existing or not."""
        return self.root / key

    def find(self, key: str) -> Path | None:
        """The checkpoint of ``key``, verified against its manifest, or ``None``.

        Raises:
            UserError: The checkpoint is damaged; the message names the file and the remedy.
        """
        from compress.store.checkpoint import verify_checkpoint

        folder = self.path(key)
        if not folder.exists():
            return None
        if folder not in self._sound:
            verify_checkpoint(folder)
            self._sound.add(folder)
        return folder

    def work(self, key: str) -> Path:
        """The folder for training states or images of ``key``, created if missing; it is kept after a crash."""
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, key: str) -> None:
        """Removes the training states of ``key``, once its checkpoint is in the store."""
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps other runs from computing ``key``; removes a half-written checkpoint of a crashed run.

        Args:
            key: Of a checkpoint or an evaluation.
            waiting: Called once if another run holds the lock.
        """
        with leased(self.lock_file(key), waiting):
            for stale in self.root.glob(f".{key}*"):
                shutil.rmtree(stale, ignore_errors=True)
            yield

    def lock_file(self, key: str) -> Path:
        """The file of the lock of ``key``, held or not."""
        return self.root / "locks" / f"{key}.lease"

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """The evaluation of ``key``, its grid's images as uint8 tensors (3, height, width), or ``None``.

        Raises:
            UserError: One of its files is damaged.
        """
        folder = self.evaluation_folder(key)
        if not folder.exists():
            return None
        if folder not in self._sound:
            verify_manifest(folder)
            self._sound.add(folder)
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        for cell in evaluation["grid"]:
            cell["image"] = _read_image(folder / cell["image"])
        return evaluation

    def put_evaluation(self, key: str, evaluation: dict[str, Any], *, keep_images: bool = True) -> None:
        """Turns the work folder of ``key``, with its images, into an evaluation.

        Args:
            key: Of the evaluation.
            evaluation: JSON-able; ``image`` of each cell in ``evaluation["grid"]`` is a path inside the folder.
            keep_images: Whether to keep all files in ``images/``, or only those of the grid.
        """
        place, folder = self.evaluation_folder(key), self.work(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        for partial in folder.rglob(".*"):  # left by a process that was killed while writing
            partial.unlink()
        (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2), encoding="utf-8")
        (folder / MANIFEST).unlink(missing_ok=True)
        names = [file.relative_to(folder).as_posix() for file in _files(folder)]
        shown = {cell["image"] for cell in evaluation["grid"]}
        dropped = [] if keep_images else [name for name in names if name.startswith("images/") and name not in shown]
        hashes = {name: file_hash(folder / name) for name in names if name not in dropped}
        (folder / MANIFEST).write_text(json.dumps(hashes, indent=2), encoding="utf-8")
        if place.exists():  # another run on a file system without locks was faster: the same content
            shutil.rmtree(folder)
        else:
            os.rename(folder, place)
            for name in dropped:  # only now: a run killed before this continues with the sampled images
                (place / name).unlink()

    def adopt(self, images: str, key: str) -> None:
        """Links images kept by finished evaluations with the same sampling into the work folder of ``key``.

        Args:
            images: Key of the images, as evaluations have it under ``"images"``.
            key: Of the evaluation to compute.

        Raises:
            UserError: A file of such an evaluation is damaged.
        """
        for file in sorted((self.root / "evaluations").glob("*/evaluation.json")):
            if _has_images(file, images):
                with self.lock(file.parent.name):  # so that it is not removed meanwhile
                    if _has_images(file, images):
                        self._adopt(file.parent, self.work(key))

    def _adopt(self, folder: Path, target: Path) -> None:
        self.evaluation(folder.name)  # verified
        (target / "images").mkdir(exist_ok=True)
        for name in json.loads((folder / MANIFEST).read_text(encoding="utf-8")):
            if name.startswith("images/") and not (target / name).exists():
                link(folder / name, target / name)

    def evaluation_folder(self, key: str) -> Path:
        """Path of the evaluation of ``key``, existing or not."""
        return self.root / "evaluations" / key


def _has_images(file: Path, images: str) -> bool:
    """Whether an evaluation is there and has the images of that key."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("images") == images)
    except FileNotFoundError:
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def verify_manifest(folder: Path) -> None:
    """Checks the files of an evaluation against their SHA-256.

    Raises:
        UserError: One is missing or changed.
    """
    remedy = f"delete {folder} and run the same command again"
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if known_hash(folder / name) != expected:
                raise UserError(f"{folder / name} is damaged (its SHA-256 is not the one it was stored with): {remedy}")
    except (FileNotFoundError, ValueError, AttributeError) as error:
        name = getattr(error, "filename", None) or folder / MANIFEST
        raise UserError(f"{name} is missing or damaged: {remedy}") from error


def _read_image(file: Path) -> "torch.Tensor":
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
