"""The store: checkpoints and evaluations, each under the hash of everything that decides its content."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError

if TYPE_CHECKING:
    import torch

MANIFEST = "sha256.json"


class Store:
    """A folder of checkpoints (``<key>/``), training states (``work/<key>/``) and ``evaluations/<key>/``.

    Any number of runs may share one: entries are written beside their place and renamed into it, and who computes
    an entry holds its lock, which the system releases however the process ends.

    Args:
        root: The folder; made when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sound: set[Path] = set()  # what this process has verified; hashing is done once

    @staticmethod
    def key(parts: dict[str, Any]) -> str:
        """16 hexadecimal digits of the SHA-256 of ``parts`` as JSON; the order of keys does not matter."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, key: str) -> Path:
        """Where the checkpoint of ``key`` is or will be."""
        return self.root / key

    def find(self, key: str) -> Path | None:
        """The checkpoint of ``key``, verified against its manifest, or ``None``.

        Raises:
            UserError: The checkpoint is damaged; the message names the file and the remedy.
        """
        from compress.checkpoint import verify_checkpoint

        folder = self.path(key)
        if not folder.exists():
            return None
        if folder not in self._sound:
            verify_checkpoint(folder)
            self._sound.add(folder)
        return folder

    def work(self, key: str) -> Path:
        """The folder for training states of ``key``, made if need be; it outlives a crash."""
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, key: str) -> None:
        """Removes the training states of ``key``; for when its checkpoint is in the store."""
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps other runs from computing ``key``; what a crashed run left half written is removed.

        Args:
            key: A checkpoint's or an evaluation's.
            waiting: Called once if another run holds the lock.
        """
        import filelock

        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            waiting()
            lock.acquire()
        try:
            for parent in (self.root, self.root / "evaluations"):
                for stale in parent.glob(f".{key}*"):
                    shutil.rmtree(stale, ignore_errors=True)
            yield
        finally:
            lock.release()

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """The evaluation of ``key``, its grid's pictures as uint8 tensors (3, height, width), or ``None``.

        Raises:
            UserError: A file of it is damaged.
        """
        folder = self._evaluation_folder(key)
        if not folder.exists():
            return None
        if folder not in self._sound:
            _verify(folder)
            self._sound.add(folder)
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        for cell in evaluation["grid"]:
            cell["image"] = _read_picture(folder / cell["image"])
        return evaluation

    def images(self, key: str) -> "torch.Tensor | None":
        """All pictures of an evaluation in the store, uint8 of shape (n, 3, height, width); ``None`` without any."""
        import torch

        files = sorted((self._evaluation_folder(key) / "images").glob("sample-*.png"))
        return torch.stack([_read_picture(file) for file in files]) if files else None

    def put_evaluation(self, key: str, evaluation: dict[str, Any], images: "torch.Tensor | None") -> None:
        """Writes an evaluation beside its place and renames it.

        Args:
            key: Its key.
            evaluation: JSON-able, but for the ``image`` of each cell in ``evaluation["grid"]``, a uint8 tensor of shape
                (3, height, width).
            images: The pictures the metrics were computed from, uint8 of shape (n, 3, height, width), or ``None``.
        """
        place = self._evaluation_folder(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = place.with_name(f".{key}-{uuid.uuid4().hex}")
        try:
            (folder / "images").mkdir(parents=True)
            for index, image in enumerate(images if images is not None else ()):
                _write_picture(folder / "images" / f"sample-{index:06d}.png", image)
            grid = []
            for index, cell in enumerate(evaluation["grid"]):
                name = f"images/grid-{index:03d}.png"
                _write_picture(folder / name, cell["image"])
                grid.append({**cell, "image": name})
            text = json.dumps({**evaluation, "grid": grid}, indent=2)
            (folder / "evaluation.json").write_text(text, encoding="utf-8")
            hashes = {file.relative_to(folder).as_posix(): _hash(file) for file in _files(folder)}
            (folder / MANIFEST).write_text(json.dumps(hashes, indent=2), encoding="utf-8")
            if not place.exists():  # a run on a file system without locks may have been faster: the same content
                os.rename(folder, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _evaluation_folder(self, key: str) -> Path:
        return self.root / "evaluations" / key


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verify(folder: Path) -> None:
    remedy = f"delete {folder} and run the same command again"
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if _hash(folder / name) != expected:
                raise UserError(f"{folder / name} is damaged (its SHA-256 is not the one it was stored with): {remedy}")
    except (FileNotFoundError, ValueError, AttributeError) as error:
        name = getattr(error, "filename", None) or folder / MANIFEST
        raise UserError(f"{name} is missing or damaged: {remedy}") from error


def _write_picture(file: Path, image: "torch.Tensor") -> None:
    from PIL import Image

    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file)


def _read_picture(file: Path) -> "torch.Tensor":
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(file) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
