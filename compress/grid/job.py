"""What Hydra runs: a single run, or one point of a grid. Its errors become a message, a file and an exit code."""

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config import folders
from compress.config.folders import FAILURE
from compress.errors import UserError
from compress.system.files import write_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

arguments: list[str] = []  # of the command line, in the process that it started
codes: list[int] = []  # exit codes of what this process ran


class PointFailed(Exception):
    """A point of a grid that failed; its message has been printed.

    Attributes:
        message: Why.
        code: 2 for a user's mistake, else 1.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)  # both, so that it can be pickled
        self.message, self.code = message, code


def run(cfg: "DictConfig") -> float | None:
    """Runs a composed config; its exit code is added to :data:`codes`.

    Returns:
        The objective that the config names, as measured; None without one.

    Raises:
        PointFailed: In a grid; its message is in the point's ``failure.json`` as well.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings = HydraConfig.get()
    if arguments:
        sys.argv[1:] = arguments  # what a process starts with that does the same
    # Another process of the same grid learns the user's folders from Hydra.
    own = [source.path for source in settings.runtime.config_sources if source.provider == "command-line"]
    folders.config_dirs[:] = [Path(path) for path in own] or folders.config_dirs
    message, code = _guarded(cfg)
    codes.append(code)
    if not code and cfg.get("out"):
        (Path(cfg.out) / FAILURE).unlink(missing_ok=True)
    if settings.mode != RunMode.MULTIRUN:
        return None
    if code:
        write_failure(Path(cfg.out), list(settings.overrides.task), message, code)
        raise PointFailed(message, code)
    return _objective(cfg)


def _objective(cfg: "DictConfig") -> float | None:
    from omegaconf import OmegaConf

    from compress.config.values import build
    from compress.run.objective import SearchObjective, read_report

    if cfg.get("objective") is None:
        return None
    objective = build(SearchObjective, OmegaConf.to_container(cfg.objective, resolve=True), "objective")
    return objective.value(read_report(Path(cfg.out)))


def write_failure(out: Path, overrides: list[str], message: str, code: int) -> None:
    """Writes ``failure.json`` into a point's folder."""
    from compress.system import processes

    if not processes.is_main():
        return
    content: dict[str, Any] = {"overrides": overrides, "message": message, "exit_code": code}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / FAILURE, json.dumps(content, indent=2) + "\n")
    except OSError:
        pass  # the folder cannot be written to or the disk is full, which the message says


def refuse(message: str) -> int:
    """Prints a user's mistake, in the first process; returns its exit code."""
    from compress.system import processes

    if processes.is_main():
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _guarded(cfg: "DictConfig") -> tuple[str, int]:
    """One run, its errors turned into a printed message and an exit code."""
    from compress import jobs
    from compress.run import preflight

    places = [Path(str(cfg.get(key) or ".")) for key in ("out", "store")]
    try:
        jobs.run_job(cfg)
        return "", 0
    except UserError as error:
        return str(error), refuse(str(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted: {_kept(cfg)}; run the same command again to continue", file=sys.stderr)
        raise
    except Exception as error:  # noqa: BLE001 - the last place that can tell a full disk from a mistake of ours
        if preflight.is_disk_full(error, *places):
            message = str(preflight.disk_full(error, *places))
            return message, refuse(message)
        traceback.print_exc()
        return f"{type(error).__name__}: {error}", 1


def _kept(cfg: "DictConfig") -> str:
    """What an interrupted run leaves for the next one."""
    if cfg.job == "score":
        return f"features of the reference are kept in {cfg.store} once they are whole, of images none"
    return f"finished stages, sampled images and the last training state are kept in {cfg.store}"
