"""From a composed config to one checked, frozen :class:`Job`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.folders import default_out
from compress.config.values import build, unknown_key
from compress.errors import UserError
from compress.jobs.benchmark.config import BenchmarkConfig, Limits
from compress.run.config import Settings

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from compress.data import DataConfig
    from compress.evaluate import EvaluateConfig
    from compress.models import ModelConfig

GROUPS = ("model", "data", "evaluate", "benchmark", "limit")
UNUSED = ("stages", "track")  # groups that every recipe has and this job does not use


@dataclass(frozen=True)
class Job:
    """Everything that a benchmark depends on.

    Attributes:
        model: The pipeline.
        data: Captions to sample, unless ``evaluate.prompts`` is a file.
        evaluate: ``prompts`` and the network of the CLIP score.
        benchmark: The grid.
        limit: Limits of the best row.
        seed: Seed of the choice of prompts; image i has the seed ``seed + i``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        out: Folder of the report.
        store: Folder of measured rows.
    """

    model: "ModelConfig"
    data: "DataConfig"
    evaluate: "EvaluateConfig"
    benchmark: BenchmarkConfig
    limit: Limits
    seed: int
    device: str
    out: Path
    store: Path


def to_job(cfg: "DictConfig") -> Job:
    """Checks a composed config as a whole.

    Raises:
        UserError: A key is unknown, or a value has the wrong type or is out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from compress.data import DataConfig
    from compress.evaluate import EvaluateConfig
    from compress.models import ModelConfig

    try:
        tree: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    names = [field.name for field in dataclasses.fields(Settings)]
    for key in tree:
        if key not in (*names, *GROUPS, *UNUSED):
            raise UserError(unknown_key("", str(key), [*names, *GROUPS]))
    settings = build(Settings, {key: value for key, value in tree.items() if key in names}, "")
    return Job(
        model=build(ModelConfig, tree.get("model"), "model"),
        data=build(DataConfig, tree.get("data"), "data"),
        evaluate=build(EvaluateConfig, tree.get("evaluate"), "evaluate"),
        benchmark=build(BenchmarkConfig, tree.get("benchmark"), "benchmark"),
        limit=build(Limits, tree.get("limit"), "limit"),
        seed=settings.seed,
        device=settings.device,
        out=Path(settings.out) if settings.out else default_out(settings.recipe_name),
        store=Path(settings.store),
    )
