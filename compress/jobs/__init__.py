"""The jobs that a recipe can be for: its key ``job`` names one."""

import importlib
from typing import TYPE_CHECKING

from compress.config.values import nearest
from compress.errors import UserError
from compress.models.quiet import hide_notices
from compress.system import processes
from compress.system.allocator import keep_freed_memory

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Name in a recipe to the function that does it with the composed config; its module is imported when it is asked for.
JOBS = {
    "run": "compress.jobs:run_stages",
    "score": "compress.jobs.score:run_job",
    "benchmark": "compress.jobs.benchmark:run_job",
    "compare": "compress.jobs.compare:run_job",
    "mixed_bits": "compress.jobs.mixed_bits:run_job",
    "prune_sensitivity": "compress.jobs.sensitivity:run_job",
    "report": "compress.jobs.report:run_job",
}
ALONE = ("benchmark", "compare", "prune_sensitivity")  # run in one process


def run_job(cfg: "DictConfig") -> None:
    """Does what a composed config asks for.

    Raises:
        UserError: There is no such job, or the user can put something else right.
    """
    name = str(cfg.get("job"))
    if name not in JOBS:
        raise UserError(f"job={name}: no such job{nearest(name, list(JOBS))}; known: {', '.join(JOBS)}")
    if name not in ("run", "mixed_bits") and cfg.get("publish") is not None:
        raise UserError(f"publish={cfg.publish}: the recipe {cfg.recipe_name} makes no checkpoint: take publish=null")
    if name in ALONE and processes.count() > 1:
        raise UserError(f"job={name}: it runs in one process: start it without accelerate launch")
    keep_freed_memory()
    hide_notices()  # before any job loads the libraries that say them
    module, _, function = JOBS[name].partition(":")
    if _of_grid():
        from hydra.core.hydra_config import HydraConfig

        from compress.jobs.report import join_group

        join_group(cfg, HydraConfig.get().sweep.dir)
    getattr(importlib.import_module(module), function)(cfg)
    processes.leave()


def run_stages(cfg: "DictConfig") -> None:
    """Runs a recipe of stages."""
    from compress.run.config import to_run_config

    config = to_run_config(cfg)

    from compress.run.recipe import run_recipe

    run_recipe(config, keep=_of_grid())


def _of_grid() -> bool:
    """Whether this is a point of a grid."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
