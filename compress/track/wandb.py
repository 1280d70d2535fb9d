"""Weights & Biases: all calls in one thread of their own, so that neither an error nor a hang reaches the run.

W&B talks to a service process and, when online, to a server. The queue keeps a training step from ever waiting for
either; opening and finishing a W&B run wait, but not for ever.
"""

import contextlib
import netrc
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import wandb

    from compress.track import TrackConfig

INIT_SECONDS = 60.0
"""W&B gives up on opening a run after this time."""
FINISH_SECONDS = 60.0
"""W&B gives up on uploading after this time; what is missing stays on disk for ``wandb sync``."""
GRACE_SECONDS = 30.0
"""How much longer than W&B's own limits its thread is waited for."""


def settings() -> "wandb.Settings":
    """W&B's settings from its files and the environment; asks for nothing and starts nothing."""
    import wandb

    return wandb.setup().settings


def account_configured(found: "wandb.Settings") -> bool:
    """Whether W&B finds credentials without asking: in the environment, its settings or a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or found.api_key:
        return True
    import wandb

    hosts = {urlsplit(found.base_url).netloc}
    if found.base_url == wandb.Settings().base_url:
        hosts.add("api.wandb.ai")  # where the keys of the default server are filed, whatever it is called
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(candidate).expanduser() for candidate in candidates):
        if not path.exists():
            continue
        try:
            entries = netrc.netrc(path).hosts
        except (netrc.NetrcParseError, OSError):
            return False
        return any(host in entries for host in hosts)
    return False


class Session:
    """The W&B runs of one run of a recipe, one after the other.

    Args:
        config: Project, entity and mode.
        group: Shared by all W&B runs.
        folder: W&B's files go to ``folder/wandb``.
        run_config: Recorded with every W&B run.
    """

    def __init__(self, config: "TrackConfig", group: str, folder: Path, run_config: dict[str, Any]) -> None:
        self._config = config
        self._group = group
        self._folder = folder.absolute()
        self._run_config = run_config
        self._mode: str | None = None
        self._run: Any = None
        self._warning: str | None = None
        self._off = False
        self._environment: list[str] = []
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # A daemon: a call that never returns must not keep the process alive.
        threading.Thread(target=self._work, name="wandb", daemon=True).start()

    def open(self, name: str, job_type: str, config: dict[str, Any]) -> None:
        """Opens a W&B run and waits for it: the start of W&B's service would disturb what is measured next."""
        self._submit(lambda: self._open(name, job_type, config))
        self._wait("opening a run", 2 * INIT_SECONDS + GRACE_SECONDS)

    def log(self, point: dict[str, float]) -> None:
        """One point of each curve, with its ``step``."""
        self._submit(lambda: self._run.log(point))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table."""

        def call() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=columns, data=rows, allow_mixed_types=True)})

        self._submit(call)

    def image(self, name: str, path: Path) -> None:
        """A image from a file."""

        def call() -> None:
            import wandb

            self._run.log({name: wandb.Image(str(path))})

        self._submit(call)

    def finish(self, summary: dict[str, Any], images: list[tuple[Any, str]], exit_code: int) -> None:
        """Writes the summary and the images (array, caption), closes the W&B run and waits for it."""

        def call() -> None:
            import wandb

            if images:
                self._run.log({"grid": [wandb.Image(pixels, caption=caption) for pixels, caption in images]})
            self._run.summary.update(summary)
            self._run.finish(exit_code=exit_code)

        self._submit(call)
        self._wait("finishing a run", FINISH_SECONDS + GRACE_SECONDS)

    def close(self) -> None:
        """Takes back the environment variables it set."""
        while self._environment:
            os.environ.pop(self._environment.pop(), None)

    def _open(self, name: str, job_type: str, config: dict[str, Any]) -> None:
        # W&B would quietly take another folder where it cannot write.
        (self._folder / "wandb").mkdir(parents=True, exist_ok=True)
        if self._mode is None:
            self._prepare()
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
            self._warning = (
                f"W&B cannot be reached ({_first_line(error)}); this run is tracked offline in {self._folder / 'wandb'}"
                ", to be uploaded with `wandb sync`"
            )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _prepare(self) -> None:
        # Tables are staged and the service logs in these folders, in the home directory by default.
        self._set("WANDB_DATA_DIR", str(self._folder / "wandb" / "data"))
        self._set("WANDB_CACHE_DIR", str(self._folder / "wandb" / "cache"))
        mode = self._config.mode
        if mode == "auto":
            found = settings()
            mode = "disabled" if found.mode == "disabled" else "offline"
            if found.mode in ("online", "run", "shared") and account_configured(found):
                mode = "online"
        if mode == "offline":
            # Reports of W&B's own errors and usage go over the network even when the run is offline.
            self._set("WANDB_ERROR_REPORTING", "false")
        self._mode = mode

    def _set(self, name: str, value: str) -> None:
        if name not in os.environ:
            self._environment.append(name)
            os.environ[name] = value

    def _init(self, name: str, job_type: str, config: dict[str, Any]) -> Any:
        import wandb

        offline = self._mode == "offline"
        return wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._group,
            name=name,
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
                disable_git=True,  # it would save a patch of whatever repository is the current folder
                use_dot_wandb=False,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                # Both ask the cloud's metadata service, over the network, what machine this is.
                x_disable_machine_info=offline,
                x_disable_stats=offline,
            ),
        )

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if self._off:
                continue
            try:
                call()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - nothing W&B does may end the run
                self._stop(_first_line(error))

    def _stop(self, why: str) -> None:
        if self._off:
            return
        self._off = True
        self._warning = f"W&B failed ({why}); this run goes on without tracking"

    def _submit(self, call: Callable[[], None]) -> None:
        self._warn()
        if not self._off:
            self._calls.put(call)

    def _wait(self, what: str, seconds: float) -> None:
        done = threading.Event()
        self._calls.put(done.set)  # its turn comes when all calls before it are through
        deadline = time.monotonic() + seconds
        while not self._off and not done.wait(0.02):
            if time.monotonic() > deadline:
                self._stop(f"{what} took longer than {seconds:.0f} s")
                _end_service_at_exit()
        self._warn()

    def _warn(self) -> None:
        # From the run's own thread, where filters and consoles are set up.
        if self._warning is not None:
            message, self._warning = self._warning, None
            warnings.warn(message, RuntimeWarning, stacklevel=4)


def _end_service_at_exit() -> None:
    """Ends W&B's service process if it outlives the program: W&B would wait for it, without limit, at exit."""
    import psutil

    service = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]

    def wait() -> None:
        threading.main_thread().join()
        time.sleep(GRACE_SECONDS)
        for child in service:
            with contextlib.suppress(psutil.Error):
                child.kill()

    threading.Thread(target=wait, name="wandb-exit", daemon=True).start()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
