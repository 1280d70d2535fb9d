"""What every process of a run does: it loads, computes a stage, and measures a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import compress.data
import compress.models
from compress.config.values import PRECISIONS
from compress.errors import UserError
from compress.evaluate import evaluate
from compress.run import output
from compress.run.config import RunConfig
from compress.run.keys import Step
from compress.stage import StageContext, StageReport
from compress.store import Store, checkpoint
from compress.track import StageRun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.data import Data
    from compress.evaluate.networks import Networks


class Inputs:
    """Teacher, data and networks, loaded on first use by each process."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Loads nothing."""
        self.config = config
        self.device = device
        self.dtype: torch.dtype = getattr(torch, PRECISIONS[config.precision])
        self.store = Store(config.store)

    @cached_property
    def teacher(self) -> "DiffusionPipeline":
        """The reference pipeline, frozen, on the device."""
        return compress.models.load_teacher(self.config.model, self.device, self.dtype)

    @cached_property
    def data(self) -> "Data":
        """Images and captions to train on."""
        return compress.data.load_data(self.config.data, self.config.store / "data")

    @cached_property
    def networks(self) -> "Networks":
        """The networks of the metrics."""
        from compress.evaluate.networks import Networks

        return Networks(self.config.evaluate, self.device)

    @cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Of teacher and data."""
        return compress.models.fingerprint(self.config.model), compress.data.fingerprint(self.config.data)

    def take_over(self, other: "Inputs") -> None:
        """Takes what another run of this process has loaded, where it is the same."""
        ours, theirs = self.config, other.config
        same_device = (self.device, self.dtype) == (other.device, other.dtype)
        model, data = (own == their for own, their in zip(self.fingerprints, other.fingerprints, strict=True))
        same = {
            "teacher": same_device and model and ours.model == theirs.model,
            "data": data and (ours.data, ours.store) == (theirs.data, theirs.store),
            "networks": same_device and ours.evaluate == theirs.evaluate,
        }
        for name, usable in same.items():
            if usable and name in other.__dict__:
                self.__dict__[name] = other.__dict__[name]

    def examples(self) -> Path:
        """The folder for encoded examples: of this teacher, data, precision and device."""
        of = {"of": self.fingerprints, "precision": self.config.precision, "device": self.device.type}
        return self.store.root / "examples" / self.store.key(of)

    def student(self, parent: str | None) -> "DiffusionPipeline":
        """A pipeline to change: the teacher, or a checkpoint of the store.

        A teacher in memory is given away and loaded again when next needed: two large models may not fit.
        """
        if parent is None:
            loaded = self.__dict__.pop("teacher", None)
            return loaded or compress.models.load_teacher(self.config.model, self.device, self.dtype)
        return checkpoint.load_checkpoint(self.store.path(parent), self.device, self.dtype)


@dataclass(frozen=True)
class ToMeasure:
    """A checkpoint or teacher to measure.

    Attributes:
        key: Of the evaluation.
        checkpoint: Key of the checkpoint; None is the teacher.
        folder: Of its files.
        teacher: Key of the teacher's evaluation; None for that evaluation itself.
        sampled: Whether images are sampled from it, if the evaluation samples any.
        engine: What runs it; None: what the evaluation says.
    """

    key: str
    checkpoint: str | None
    folder: Path
    teacher: str | None
    sampled: bool = True
    engine: str | None = None

    @property
    def is_noise_floor(self) -> bool:
        """Whether it is the teacher with other seeds."""
        return self.checkpoint is None and self.teacher is not None


def measure(inputs: Inputs, subject: ToMeasure) -> dict[str, Any]:
    """Measures a checkpoint, in every process; images go to the work folder of the evaluation's key."""
    store = inputs.store
    pipeline = inputs.teacher if subject.checkpoint is None else inputs.student(subject.checkpoint)
    folder = store.work(subject.key)
    settings = inputs.config.evaluate
    if subject.engine is not None:
        settings = replace(settings, engine=subject.engine)
    try:
        found = evaluate(
            pipeline,
            inputs.data,
            settings if subject.sampled else replace(settings, images=0),
            folder,
            device=inputs.device,
            dtype=inputs.dtype,
            seed=inputs.config.seed,
            cost_of=None if subject.is_noise_floor else subject.folder,
            teacher=None if subject.teacher is None else store.evaluation_folder(subject.teacher),
            other_seeds=subject.is_noise_floor,
            networks=inputs.networks,
            cache=store.root / "features",
            graphs=store.root / "graphs",
            variant=inputs.config.model.variant if subject.checkpoint is None else None,
        )
    except FloatingPointError as error:
        raise UserError(f"{subject.folder}: the pipeline cannot be measured ({error}); try precision=fp32") from error
    return {"cost": found.cost, "metrics": found.metrics, "manifest": found.manifest, "grid": found.grid}


def compute(
    inputs: Inputs, step: Step, history: list[dict[str, Any]], run: StageRun
) -> tuple["DiffusionPipeline", StageReport]:
    """Runs a stage's method, in every process that takes part."""
    from accelerate.utils import set_seed

    stage, config = step.stage, inputs.config
    if not history and step.parent is not None:
        history = checkpoint.read_info(inputs.store.path(step.parent))["stages"]
    curves: dict[str, list[list[float]]] = {}

    def log(metrics: dict[str, float], at: int) -> None:
        for name, value in metrics.items():
            curves.setdefault(name, []).append([at, float(value)])
        run.log(metrics, at)

    def show(images: torch.Tensor, prompts: Sequence[str], at: int) -> None:
        from compress.distill.validation import write_row

        write_row(config.out / "validation" / stage.name, images, prompts, at)
        run.images("validation", images, prompts, at)

    set_seed(config.seed)
    context = StageContext(
        load_teacher=lambda: inputs.teacher, data=inputs.data, folder=inputs.store.work(step.key), history=history,
        seed=config.seed, device=inputs.device, dtype=inputs.dtype, log=log,
        before=output.stages_before(config.model), artifact=artifact_folder(inputs, step), examples=inputs.examples,
        graphs=inputs.store.root / "graphs", show=show,
    )  # fmt: skip
    pipeline = inputs.student(step.parent)
    try:
        report = stage.module.run(pipeline, stage.config, context)
    except UserError as error:
        raise stage.explain(error) from error
    return pipeline, StageReport(report.coverage, report.details, report.curves or curves)


def artifact_folder(inputs: Inputs, step: Step) -> Path | None:
    """The folder for a stage's artifact, or None."""
    if step.stage.declared.leaves != "artifact":
        return None
    folder = inputs.store.work(step.key) / "artifact"
    folder.mkdir(exist_ok=True)
    return folder
