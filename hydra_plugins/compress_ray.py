"""``hydra/launcher=ray``: the points of a grid as tasks of Ray; Hydra imports this module whenever it starts."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class RayLauncher(Launcher):
    """Runs each point as one task, on a cluster or on this machine.

    Args:
        init: Arguments of ``ray.init``.
        remote: Options of each task, such as ``num_cpus`` and ``num_gpus``.
    """

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self.init, self.remote = (OmegaConf.to_container(given, resolve=True) for given in (init, remote))

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what the tasks need."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the points and waits for all of them; one whose process is lost fails alone.

        Raises:
            UserError: Ray is not installed.
        """
        import os

        from hydra.core.singleton import Singleton

        from compress.errors import UserError

        try:
            import ray
        except ImportError as error:
            raise UserError("hydra/launcher=ray: needs the package ray: pip install 'compress[ray]'") from error
        ray.init(**self.init)
        try:
            task: Any = ray.remote(**self.remote)(_run)
            context = (self.hydra_context, self.config, self.task_function, Singleton.get_state(), os.getcwd())
            shared = ray.put(context)
            points = enumerate(job_overrides, initial_job_idx)
            running = [task.remote(shared, list(point), number) for number, point in points]
            return [self._outcome(ray, one) for one in running]
        finally:
            ray.shutdown()

    @staticmethod
    def _outcome(ray: Any, running: Any) -> JobReturn:
        """What a task returned, or the error that ended its process or its machine."""
        try:
            found: JobReturn = ray.get(running)
        except ray.exceptions.RayError as error:
            found = JobReturn(status=JobStatus.FAILED)
            found.return_value = error
        return found


def _run(shared: tuple[Any, ...], overrides: list[str], number: int) -> JobReturn:
    """One point, in a process of Ray."""
    import os

    from hydra.core.hydra_config import HydraConfig
    from hydra.core.singleton import Singleton
    from hydra.core.utils import run_job, setup_globals
    from omegaconf import open_dict

    context, master, task, state, folder = shared
    os.chdir(folder)
    setup_globals()
    Singleton.set_state(state)
    config = context.config_loader.load_sweep_config(master, overrides)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    HydraConfig.instance().set_config(config)
    return run_job(
        hydra_context=context,
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
