"""Weights & Biases: one W&B run per stage; its first failure gives a warning and ends tracking."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb

    from compress.track import TrackConfig

INIT_SECONDS = FINISH_SECONDS = 60.0  # W&B's time limits to open a run and to upload one


def settings() -> "wandb.Settings":
    """W&B's settings from its files and the environment, without a prompt or a process."""
    import wandb

    return wandb.setup().settings


def account_configured(found: "wandb.Settings") -> bool:
    """Whether W&B finds credentials without a prompt: in the environment, its settings or a netrc file."""
    import wandb
    from requests.utils import get_netrc_auth

    names = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    urls = [found.base_url]
    if found.base_url == wandb.Settings().base_url:
        urls.append("https://api.wandb.ai")  # the default server's keys are stored under this name
    return any(map(os.environ.get, names)) or bool(found.api_key) or any(map(get_netrc_auth, urls))


class Session:
    """The W&B runs of one run of a recipe, in sequence.

    Args:
        config: Project, entity and mode.
        group: Shared by all W&B runs.
        folder: W&B's files go to ``folder/wandb``.
        run_config: Recorded with every W&B run.
    """

    def __init__(self, config: "TrackConfig", group: str, folder: Path, run_config: dict[str, Any]) -> None:
        self.where = ""  # where the W&B runs are, as text
        self._config, self._group, self._run_config = config, (config.group or group)[:128], run_config
        self._prefix = f"{folder.name}: " if config.group else ""  # tells the runs of a group apart
        self._folder = folder.absolute()
        self._mode = "" if config.mode == "auto" else config.mode
        self._run: Any = None
        self._off = False
        # Tables are staged in these folders, in the home directory by default.
        wanted = {f"WANDB_{name.upper()}_DIR": str(self._folder / "wandb" / name) for name in ("data", "cache")}
        if config.mode == "offline":
            wanted["WANDB_ERROR_REPORTING"] = "false"  # W&B would report its own errors over the network
        self._environment = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ |= self._environment

    def open(self, name: str, job_type: str, config: dict[str, Any]) -> None:
        """Opens a W&B run; offline if the server cannot be reached."""
        self._safely(lambda: self._open(name, job_type, config))

    def log(self, point: Mapping[str, Any]) -> None:
        """Logs a point of each curve, with its ``step``, or other values."""
        self._safely(lambda: self._run.log(dict(point)))

    def images(self, name: str, images: Sequence[tuple[Any, str]], step: int) -> None:
        """Logs images (array, caption) under a name."""

        def call() -> None:
            import wandb

            made = [wandb.Image(pixels, caption=caption) for pixels, caption in images]
            self._run.log({name: made, "step": step})

        self._safely(call)

    def report(self, tables: Mapping[str, tuple[list[str], list[list[Any]]]], images: Mapping[str, Path]) -> None:
        """Logs tables, columns and rows by name, and images from files."""

        def call() -> None:
            import wandb

            made = {name: wandb.Table(columns=c, data=r, allow_mixed_types=True) for name, (c, r) in tables.items()}
            self._run.log({**made, **{name: wandb.Image(str(path)) for name, path in images.items()}})

        self._safely(call)

    def artifact(self, name: str, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Logs a folder as an artifact of type ``model``."""

        def call() -> None:
            import wandb

            artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
            artifact.add_dir(str(folder), policy="immutable", skip_cache=True)  # as it is, without a copy
            self._run.log_artifact(artifact)

        self._safely(call)

    def finish(self, summary: dict[str, Any], images: Sequence[tuple[Any, str]], exit_code: int) -> None:
        """Writes the summary and the images (array, caption), and closes the W&B run."""

        def call() -> None:
            import wandb

            if images:
                self._run.log({"grid": [wandb.Image(pixels, caption=caption) for pixels, caption in images]})
            self._run.summary.update(summary)
            self._run.finish(exit_code=exit_code)

        self._safely(call)

    def close(self) -> None:
        """Restores the environment variables."""
        for name in self._environment:
            os.environ.pop(name, None)

    def _open(self, name: str, job_type: str, config: dict[str, Any]) -> None:
        folder = self._folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True)  # W&B silently uses another folder if it cannot write
        if not self._mode:
            found = settings()
            online = found.mode in ("online", "run", "shared") and account_configured(found)
            self._mode = "online" if online else "disabled" if found.mode == "disabled" else "offline"
        if self._mode == "disabled":
            self._off = True
            return
        try:
            self._run = self._init(name, job_type, config)
        except Exception as error:
            if self._mode != "online":
                raise
            self._mode = "offline"
            self._run = self._init(name, job_type, config)
            _warn(f"W&B cannot be reached ({_first_line(error)}); this run is tracked offline, for `wandb sync`")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.where = (
            f"{self._run.project_url}, group {self._group}"
            if self._mode == "online"
            else f"{folder}, to upload: wandb sync {folder}/offline-run-*"
        )

    def _init(self, name: str, job_type: str, config: dict[str, Any]) -> Any:
        import wandb

        offline = self._mode == "offline"
        return wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._group,
            name=(self._prefix + name)[:128],
            job_type=job_type,
            config={**self._run_config, "stage_name": name, "stage": config},
            dir=str(self._folder),
            mode="offline" if offline else "online",
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                silent=True,
                quiet=True,
                save_code=False,
                disable_code=True,
                disable_git=True,  # else it saves a patch of the repository in the current folder
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                # Both query the cloud's metadata service over the network.
                x_disable_machine_info=offline,
                x_disable_stats=offline,
            ),
        )

    def _safely(self, call: Callable[[], None]) -> None:
        if self._off:
            return
        try:
            call()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - no failure of W&B may end the run
            self._off, self.where = True, ""
            _warn(f"W&B failed ({_first_line(error)}); this run continues without tracking")


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
