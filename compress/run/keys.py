"""The keys of a run's checkpoints and evaluations, and whether they are in the store."""

import importlib.metadata
import json
import os
import platform
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compress.data
import compress.models
from compress.assets import resolve
from compress.config.values import flat
from compress.errors import UserError
from compress.evaluate import IMAGES_VERSION, VERSION, EvaluateConfig
from compress.run.config import RunConfig, StageConfig
from compress.store import Store, checkpoint

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "diffusers", "transformers")  # and those that a stage declares


@dataclass(frozen=True)
class Step:
    """A stage with its key.

    Attributes:
        stage: Its config.
        key: Of its checkpoint.
        parent: Key of the checkpoint it starts from; ``None`` is the teacher.
        cached: Whether the checkpoint was in the store when the run began.
    """

    stage: StageConfig
    key: str
    parent: str | None
    cached: bool


class Plan:
    """All keys of a run, from its config and the fingerprints of teacher and data.

    Every entry of the store that the run would use is verified here.

    Args:
        config: Of the run.
        store: Of the run.
        device: Of the run; latencies depend on it.

    Raises:
        UserError: An entry is damaged.
    """

    def __init__(self, config: RunConfig, store: Store, device: "torch.device") -> None:
        self.config, self.store = config, store
        self.teacher = compress.models.fingerprint(config.model)
        self.data = compress.data.fingerprint(config.data)
        self._shared: dict[str, Any] = {
            "evaluate": _of_evaluation(config.evaluate),
            "version": VERSION,
            "files": _hashes(config),
            "data": self.data,
            "seed": config.seed,
            "precision": config.precision,
            "hardware": _hardware(device),
        }
        self._of_images = {
            "version": IMAGES_VERSION,
            "prompts": self._shared["files"].get("prompts", self.data),
            **{key: self._shared[key] for key in ("seed", "precision", "hardware")},
        }
        self._libraries: dict[str, tuple[str, ...]] = {self.teacher: LIBRARIES}  # by the key of a checkpoint
        self.teacher_evaluation = self._evaluation(self.teacher, None)
        self.noise_floor = self._evaluation(self.teacher, self.teacher_evaluation)
        # Evaluations with the same key take about the same time.
        names = ("evaluate", "precision", "hardware")
        self.like = store.key({"model": self.teacher, **{name: self._shared[name] for name in names}})
        self.steps: list[Step] = []
        for stage in config.stages:
            self.steps.append(self._step(stage, self.steps[-1].key if self.steps else None))
        for key in self.evaluations():
            store.evaluation(key)

    def evaluations(self) -> list[str]:
        """Keys of all evaluations."""
        last = [self.accelerated(self.steps[-1])] * (self.config.engine is not None)
        return [self.teacher_evaluation, self.noise_floor, *map(self.evaluation, self.steps), *last]

    def keys(self) -> list[str]:
        """Keys of all checkpoints and evaluations."""
        return [*(step.key for step in self.steps), *self.evaluations()]

    def holds(self) -> bool:
        """Whether the checkpoints that were in the store still are."""
        return all(self.store.path(step.key).exists() for step in self.steps if step.cached)

    def evaluation(self, step: Step) -> str:
        """Key of the evaluation of a step's checkpoint."""
        return self._evaluation(step.key, self.teacher_evaluation, sampled=step.stage.declared.sampled)

    def accelerated(self, step: Step) -> str:
        """Key of the evaluation of a step's checkpoint as ``config.engine`` runs it."""
        return self._evaluation(step.key, self.teacher_evaluation, settings=self.settings(self.config.engine))

    def settings(self, engine: str | None) -> EvaluateConfig:
        """The settings of an evaluation in an engine; None: in that of the config."""
        return self.config.evaluate if engine is None else replace(self.config.evaluate, engine=engine)

    def images(self, checkpoint: str | None, other_seeds: bool, engine: str | None = None) -> str:
        """Key of the images sampled from a checkpoint; None is the teacher."""
        key, settings = checkpoint or self.teacher, self.settings(engine)
        about = {"checkpoint": key, "other_seeds": other_seeds, "libraries": self._versions(key, settings)}
        return self.store.key(about | self._of_images | {"evaluate": settings.of_images})

    def _evaluation(
        self, checkpoint: str, teacher: str | None, sampled: bool = True, settings: EvaluateConfig | None = None
    ) -> str:
        settings = settings or self.config.evaluate
        about = {"checkpoint": checkpoint, "teacher": teacher, "libraries": self._versions(checkpoint, settings)}
        about |= self._shared | {"evaluate": _of_evaluation(settings)}
        return self.store.key(about | ({} if sampled else {"sampled": False}))

    def _versions(self, checkpoint: str, settings: EvaluateConfig) -> dict[str, str]:
        names = (*self._libraries[checkpoint], *(["openvino"] if settings.engine == "openvino" else []))
        return {name: _version(name) for name in names}

    def _step(self, stage: StageConfig, parent: str | None) -> Step:
        key = self.store.key(
            {
                "kind": stage.kind,
                "method": stage.method,
                "config": changed(stage.config),
                "version": stage.declared.version,
                "parent": parent or self.teacher,
                "data": self.data,
                "seed": self.config.seed,
                "precision": self.config.precision,
            }
        )
        self._libraries[key] = (*self._libraries[parent or self.teacher], *stage.declared.libraries)
        found = self.store.find(key)
        if found is not None:
            _check_same(stage, found)
        return Step(stage, key, parent, found is not None)


@cache
def _version(package: str) -> str:
    return importlib.metadata.version(package)


def changed(config: Any, default: Any = None) -> dict[str, Any]:
    """The values of a config that differ from their defaults, as plain values.

    They are hashed into the key of a checkpoint, so a new config key whose default changes nothing keeps the keys of
    old checkpoints.

    Args:
        config: A dataclass, perhaps with dataclasses as values.
        default: Compared with; None: its class with only the fields that have no default given.
    """
    found: dict[str, Any] = {}
    if default is None:
        needed = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
        found = {name: value for name, value in asdict(config).items() if name in needed}
        default = type(config)(**{name: getattr(config, name) for name in needed})
    for field in fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if not is_dataclass(value):
            found |= {field.name: value} if value != usual else {}
        elif type(value) is not type(usual):
            name = f"{type(value).__module__}.{type(value).__qualname__}"
            found[field.name] = {"class": name, **changed(value)}
        elif value != usual:
            found[field.name] = changed(value, usual)
    return found


def _check_same(stage: StageConfig, folder: Path) -> None:
    """Refuses a checkpoint made with other values, as when a default changed without a new version.

    Raises:
        UserError: With the key and both values.
    """
    made = flat(checkpoint.read_info(folder)["stages"][-1]["config"])
    now = flat(json.loads(json.dumps(asdict(stage.config))))
    for key in made.keys() & now.keys():
        if made[key] != now[key]:
            raise UserError(
                f"stages.{stage.name}.{key}={now[key]}: the checkpoint {folder} of that key was made with {made[key]}: "
                f"where a default of {stage.kind}={stage.method} changes, raise the version in its STAGE"
            )


def _of_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that decide an evaluation's content; the keys that came later only if set."""
    values = asdict(config)
    later = {"keep_images": False, "engine": "eager", "few_steps": None, "sampling_engine": "eager"}
    unset = {key for key, usual in later.items() if values[key] == usual}
    return {key: value for key, value in values.items() if key != "noise_floor" and key not in unset}


def _hashes(config: RunConfig) -> dict[str, str]:
    """Hashes of the files that an evaluation reads; of a folder, over all its files."""
    settings = config.evaluate
    named = {"clip": settings.clip, "inception": settings.inception, "prompts": settings.prompts, **settings.encoders}
    named |= {"reference": settings.reference, "data.reference": config.data.reference_file}
    paths = {name: Path(resolve(value)).expanduser() for name, value in named.items() if value is not None}
    return {name: compress.data.content_hash(path) for name, path in paths.items() if path.exists()}


def _hardware(device: "torch.device") -> list[str | int | None]:
    """Hardware that latencies depend on."""
    import torch

    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    return [device.type, platform.machine(), os.cpu_count(), torch.get_num_threads()]
