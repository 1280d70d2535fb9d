"""What a stage is given and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from compress.data import Data


@dataclass
class StageContext:
    """What a stage may use besides the pipeline it changes.

    Attributes:
        load_teacher: Gives the uncompressed pipeline, frozen, on ``device``; the same one each time.
        data: Training images and captions.
        folder: A folder of this stage alone that outlives a crash; training states go here.
        history: The entries of the stages before, as ``compress.json`` holds them.
        before: What was done to the teacher by earlier runs, where its folder says so: ``name``, ``kind`` and
            ``method`` of each stage.
        seed: Seed of everything random in the stage.
        device: Where to compute.
        dtype: The precision of the run.
        log: Takes metrics and a step; they become curves.
    """

    load_teacher: "Callable[[], DiffusionPipeline]"
    data: "Data"
    folder: Path
    history: list[dict[str, Any]]
    seed: int
    device: "torch.device"
    dtype: "torch.dtype"
    log: Callable[[dict[str, float], int], None]
    before: list[dict[str, Any]] = field(default_factory=list)

    @property
    def teacher(self) -> "DiffusionPipeline":
        """The uncompressed pipeline, which takes memory from when it is asked for."""
        return self.load_teacher()


@dataclass(frozen=True)
class StageReport:
    """What a stage did.

    Attributes:
        coverage: Shares of the denoiser's ``params`` and ``macs`` that were touched, in [0, 1], the number of
            ``modules`` touched and those ``skipped`` with the reason.
        details: Whatever later stages or readers need, ready for JSON.
        curves: Name to ``[[step, value], ...]``.
    """

    coverage: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        shares = {name: self.coverage[name] for name in ("params", "macs") if self.coverage.get(name) is not None}
        return one_line(self, self.coverage.get("modules", 0), **shares)


def one_line(report: object, modules: int, **facts: Any) -> str:
    """A report in one line, as its ``repr``: the number of layers it touched and a few facts, no tensors and no lists.

    Args:
        report: Gives its class's name.
        modules: Number of layers.
        facts: Name to a number or a short text.
    """
    texts = [f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()]
    return f"{type(report).__name__}({', '.join([f'{modules} modules', *texts])})"
