"""Tracks a run: one group per run, one W&B run per stage; a failure in tracking does not stop the run."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    from compress.track.wandb import Session

BACKENDS = ("wandb", "none")
MODES = ("auto", "offline", "online", "disabled")


@dataclass(frozen=True)
class TrackConfig:
    r"""How a run is tracked.

    Attributes:
        backend: ``"wandb"`` or ``"none"``.
        project: W&B project, at most 128 characters, none of ``/\\#?%:``.
        entity: W&B user or team; None takes the account's default.
        artifact: Whether the last checkpoint is logged as an artifact.
        mode: ``"auto"`` is online if an account is configured, else offline, and obeys ``WANDB_MODE``.
        group: Groups the W&B runs of several runs, such as a multirun; None: each run is a group of its own.
    """

    backend: str
    project: str = "compress"
    entity: str | None = None
    mode: str = "auto"
    artifact: bool = False
    group: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise bad_value("backend", self.backend, f"one of {', '.join(BACKENDS)}")
        if self.mode not in MODES:
            raise bad_value("mode", self.mode, f"one of {', '.join(MODES)}")
        if not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise bad_value("project", self.project, "1 to 128 characters without / \\ # ? % :")
        if self.entity is not None and not self.entity:
            raise bad_value("entity", repr(self.entity), "a W&B user or team, or null")
        if self.artifact and (self.backend != "wandb" or self.mode == "disabled"):
            raise bad_value("artifact", self.artifact, "false, or track=wandb and a mode other than disabled")
        if self.group is not None and not self.group:
            raise bad_value("group", repr(self.group), "a name, or null")


def check(config: TrackConfig) -> None:
    """Checks the account before the run starts.

    Raises:
        UserError: ``mode`` is ``"online"`` but no account is configured, so W&B would ask for a login.
    """
    if config.backend != "wandb" or config.mode != "online":
        return
    from compress.track.wandb import account_configured, settings

    try:
        found = settings()
    except Exception:  # noqa: BLE001 - wandb is broken, not the recipe: the run warns and continues
        return
    if not account_configured(found):
        raise UserError(
            "track.mode=online: no W&B account is configured; set WANDB_API_KEY, run `wandb login`, "
            "or take track.mode=offline"
        )


def start(config: TrackConfig, group: str, folder: Path, run_config: dict[str, Any]) -> "Tracker":
    """Starts tracking.

    Args:
        config: Backend, project and mode.
        group: Name of the run, shared by its W&B runs, unless the config names a group; then it is the beginning of
            their names.
        folder: The run's folder; W&B's files go to ``folder/wandb``.
        run_config: The resolved config, recorded with every W&B run.

    Returns:
        A tracker; with ``backend="none"`` or ``mode="disabled"`` one that does nothing.
    """
    if config.backend == "none" or config.mode == "disabled":
        return Tracker(None)
    from compress.track.wandb import Session

    return Tracker(Session(config, group, folder, _plain(run_config)))


class StageRun:
    """One stage's W&B run; does nothing without a session."""

    def __init__(self, session: "Session | None") -> None:
        self._session = session
        self._open = session is not None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds a point to each curve; W&B writes it in a separate process."""
        if self._open and self._session is not None:
            self._session.log({name: float(value) for name, value in metrics.items()} | {"step": int(step)})

    def images(self, name: str, images: Any, captions: Sequence[str], step: int) -> None:
        """Adds images, as :func:`compress.report.images.pixels` takes them, under a name."""
        if self._open and self._session is not None:
            from compress.report.images import pixels

            self._session.images(name, [(pixels(i), c) for i, c in zip(images, captions, strict=True)], step)

    def finish(
        self,
        summary: Mapping[str, Any] | None = None,
        grid: Sequence[Mapping[str, Any]] | None = None,
        exit_code: int = 0,
    ) -> None:
        """Closes the W&B run; a second call does nothing.

        Args:
            summary: Results, flat or nested; ``{"metrics": {"fid": {"value": 3.0, "low": 2.0}}}`` becomes
                ``metrics/fid`` and ``metrics/fid_low``.
            grid: Images as ``{"prompt", "seed", "image"}``, images as
                :func:`compress.report.images.pixels` takes them.
            exit_code: Anything but 0 marks the W&B run as failed.
        """
        if not self._open or self._session is None:
            return
        self._open = False
        images = []
        for cell in grid or []:
            from compress.report.images import pixels

            images.append((pixels(cell["image"]), f"{cell['prompt']} (seed {cell['seed']})"))
        self._session.finish(flat(summary or {}), images, exit_code)


class Tracker:
    """Opens W&B runs one after the other; without a session every method does nothing."""

    def __init__(self, session: "Session | None") -> None:
        self._session = session

    @property
    def where(self) -> str:
        """Where the W&B runs are, as text; empty without any."""
        return self._session.where if self._session is not None else ""

    @contextmanager
    def stage(self, name: str, job_type: str, config: Mapping[str, Any] | None = None) -> Iterator[StageRun]:
        """A W&B run for one stage (``job_type`` is its kind) or for the teacher (``"teacher"``).

        It ends with the block, and is marked as failed if the block raises.
        """
        if self._session is not None:
            self._session.open(name, job_type, _plain(dict(config or {})))
        run = StageRun(self._session)
        try:
            yield run
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()

    def report(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        images: Mapping[str, Path] | None = None,
        more: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] | None = None,
    ) -> None:
        """A final W&B run ``report``.

        Args:
            columns: Of the table of all rows.
            rows: Its cells.
            images: The report's, name to PNG file.
            more: Other tables, title to columns and rows.
        """
        if self._session is None:
            return
        with self.stage("report", "report"):
            tables = {
                "results": (columns, rows),
                **{re.sub(r"[^\w .=-]", "-", key): t for key, t in (more or {}).items()},
            }
            plain = {key: (list(c), [[_plain(cell) for cell in row] for row in r]) for key, (c, r) in tables.items()}
            self._session.report(plain, images or {})

    def artifact(self, name: str, folder: Path, metrics: Mapping[str, Any]) -> None:
        """A W&B run ``checkpoint`` that logs a checkpoint as an artifact of type ``model``.

        Args:
            name: Of the artifact; each run adds a version to it.
            folder: The checkpoint, which must stay where it is until offline runs are synchronized.
            metrics: Results, as for :meth:`StageRun.finish`.

        Raises:
            UserError: The checkpoint is damaged or was never read back.
        """
        if self._session is None:
            return
        from compress.store.checkpoint import verify_shared

        verify_shared(folder)
        with self.stage("checkpoint", "checkpoint"):
            self._session.artifact(re.sub(r"[^\w.-]", "-", name)[:128], folder, flat(metrics))

    def close(self) -> None:
        """Ends tracking and restores the process environment."""
        if self._session is not None:
            self._session.close()


def flat(results: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested results as flat summary values; an entry with a ``value`` keeps its interval and N."""
    values: dict[str, Any] = {}
    for name, entry in results.items():
        key = f"{prefix}{name}"
        if isinstance(entry, Mapping) and "value" in entry:
            values[key] = entry["value"]
            values |= {f"{key}_{part}": entry[part] for part in ("low", "high", "n") if part in entry}
        elif isinstance(entry, Mapping):
            values |= flat(entry, f"{key}/")
        else:
            values[key] = entry
    return {key: value for key, value in values.items() if isinstance(value, int | float | str)}


def _plain(value: Any) -> Any:
    """The value for JSON; non-finite numbers, paths and dtypes become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return json.loads(json.dumps(value, default=str))
