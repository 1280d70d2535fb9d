"""The sweeper of ``python -m compress -m``; Hydra imports this module whenever it starts."""

from collections.abc import Sequence
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Runs every combination of values; see :mod:`compress.grid.sweep`."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        """``params``, overrides with several values, are read from the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what a launcher needs; it is made once the folder of the grid is known."""
        from compress.models.quiet import hide_notices

        hide_notices()  # before the checks of the points load the libraries that say them
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Sequence[Any]:
        """Runs the grid."""
        from compress.grid.sweep import run_grid

        return run_grid(self.config, self.hydra_context, arguments, self._launcher)

    def _launcher(self) -> Any:
        from hydra.core.plugins import Plugins

        return Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=self.task_function, config=self.config
        )
