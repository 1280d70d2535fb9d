"""``hydra/sweeper=optuna``: a search by Optuna; Hydra imports this module whenever it starts."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from hydra_plugins.compress_grid import GridSweeper


class OptunaSweeper(GridSweeper):
    """Chooses the points one after the other; see :mod:`compress.grid.search`."""

    def __init__(
        self, n_trials: int, seed: int | None = None, storage: str | None = None, params: DictConfig | None = None
    ) -> None:
        """Every key is read from the config."""

    def sweep(self, arguments: list[str]) -> Sequence[Any]:
        """Runs the search."""
        from compress.grid.search import run_search

        return run_search(self.config, self.hydra_context, arguments, self._launcher)
