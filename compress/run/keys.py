"""The keys of a run: what decides the content of each checkpoint and evaluation, and whether it is in the store."""

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compress.data
import compress.evaluate
import compress.models
from compress.assets import resolve
from compress.run.config import RunConfig, StageConfig
from compress.store import Store

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "diffusers", "transformers", "torchao")


@dataclass(frozen=True)
class Step:
    """A stage with its place in the store.

    Attributes:
        stage: What to do.
        key: Of the checkpoint it leads to.
        parent: Key of the checkpoint it starts from; ``None`` is the teacher.
        cached: Whether the checkpoint was there when the run began.
    """

    stage: StageConfig
    key: str
    parent: str | None
    cached: bool


class Plan:
    """All keys of a run, from its config and the fingerprints of its teacher and data alone.

    Every entry of the store that the run would use is verified here, before anything is computed.

    Args:
        config: The run's.
        store: Where to look.
        device: Where the run computes; latencies depend on it.

    Raises:
        UserError: An entry is damaged.
    """

    def __init__(self, config: RunConfig, store: Store, device: "torch.device") -> None:
        self.config, self.store = config, store
        self.teacher = compress.models.fingerprint(config.model)
        self.data = compress.data.fingerprint(config.data)
        self._shared: dict[str, Any] = {
            "evaluate": _of_evaluation(config.evaluate),
            "version": compress.evaluate.VERSION,
            "files": _hashes(config),
            "data": self.data,
            "seed": config.seed,
            "precision": config.precision,
            "hardware": _hardware(device),
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }
        self._of_images = {
            "evaluate": config.evaluate.of_images,
            "version": compress.evaluate.IMAGES_VERSION,
            "prompts": self._shared["files"].get("prompts", self.data),
            **{key: self._shared[key] for key in ("seed", "precision", "hardware", "libraries")},
        }
        self.teacher_evaluation = store.key({"checkpoint": self.teacher, "teacher": None, **self._shared})
        self.noise_floor = store.key({"checkpoint": self.teacher, "teacher": self.teacher_evaluation, **self._shared})
        # Evaluations of one such key take about as long as each other.
        names = ("evaluate", "precision", "hardware")
        self.like = store.key({"model": self.teacher, **{name: self._shared[name] for name in names}})
        self.steps: list[Step] = []
        for stage in config.stages:
            self.steps.append(self._step(stage, self.steps[-1].key if self.steps else None))
        for key in (self.teacher_evaluation, self.noise_floor, *map(self.evaluation, self.steps)):
            store.evaluation(key)

    def evaluation(self, step: Step) -> str:
        """Key of the evaluation of a step's checkpoint."""
        return self.store.key({"checkpoint": step.key, "teacher": self.teacher_evaluation, **self._shared})

    def images(self, checkpoint: str | None, other_seeds: bool) -> str:
        """Key of the images that are sampled of a checkpoint, of the teacher where it is None."""
        return self.store.key({"checkpoint": checkpoint or self.teacher, "other_seeds": other_seeds, **self._of_images})

    def _step(self, stage: StageConfig, parent: str | None) -> Step:
        key = self.store.key(
            {
                "kind": stage.kind,
                "method": stage.method,
                "config": asdict(stage.config),
                "version": stage.module.VERSION,
                "parent": parent or self.teacher,
                "data": self.data,
                "seed": self.config.seed,
                "precision": self.config.precision,
            }
        )
        return Step(stage, key, parent, self.store.find(key) is not None)


def _of_evaluation(config: compress.evaluate.EvaluateConfig) -> dict[str, Any]:
    """The settings that decide what an evaluation holds; ``keep_images`` only where it is set."""
    values = asdict(config)
    return {key: values[key] for key in values if key != "noise_floor" and (key != "keep_images" or values[key])}


def _hashes(config: RunConfig) -> dict[str, str]:
    """Hashes of the files that an evaluation looks at; a folder counts with all its files."""
    settings = config.evaluate
    named = {"clip": settings.clip, "inception": settings.inception, "prompts": settings.prompts, **settings.encoders}
    named |= {"reference": settings.reference, "data.reference": config.data.reference_file}
    paths = {name: Path(resolve(value)).expanduser() for name, value in named.items() if value is not None}
    return {name: compress.data.content_hash(path) for name, path in paths.items() if path.exists()}


def _hardware(device: "torch.device") -> list[str | int | None]:
    """What a latency depends on."""
    import torch

    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    return [device.type, platform.machine(), os.cpu_count(), torch.get_num_threads()]
