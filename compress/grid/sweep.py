"""Runs a grid: every point is checked first, then run; one that fails is reported, and the others go on."""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.compose import explain, quoted
from compress.config.folders import FAILURE, REPORT, default_out
from compress.errors import UserError, bad_value
from compress.grid import job
from compress.grid.points import folder_name, varied
from compress.grid.progress import Progress
from compress.jobs.report import report_grid
from compress.report.runs import has_ended
from compress.system import processes
from compress.system.progress import duration

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext
    from omegaconf import DictConfig

    from compress.run.config import RunConfig

OF_STAGES = ("run", "mixed_bits", "compare")  # jobs whose points are checked before the first one runs
MINUTE = 60.0  # seconds between two lines about a grid whose points run elsewhere


@dataclass
class Point:
    """One combination of values.

    Attributes:
        number: From 1.
        overrides: All of its overrides, ``out`` among them once it is known.
        varies: Those that differ between the points.
        out: Its folder.
        config: Of its stages; None if it has none.
        message: Why it failed; empty if it did not.
        code: Its exit code; None: not yet run.
    """

    number: int
    overrides: list[str]
    varies: list[str]
    out: Path = Path()
    config: "RunConfig | None" = None
    message: str = ""
    code: int | None = None

    @property
    def name(self) -> str:
        """What varies, as text."""
        return " ".join(self.varies)


def run_grid(
    config: "DictConfig",
    context: "HydraContext",
    arguments: Sequence[str],
    launcher: "Callable[[], Launcher]",
) -> list[Point]:
    """Runs all points and prints a summary; adds the exit codes to :data:`compress.grid.job.codes`.

    Args:
        config: The composed config without what varies; ``hydra.sweep.dir`` is set in it.
        context: Of Hydra.
        arguments: Overrides, some with several values.
        launcher: Makes the launcher, once the folder of the grid is known.

    Raises:
        UserError: The points would overwrite each other's results, or there are several processes.
    """
    begun = time.time()
    refuse_processes()
    points, folder = _points(config, context, arguments)
    good = [point for point in points if point.code is None]
    refuse_points([point for point in points if point.code is not None], len(points))
    use_folder(config, folder)
    one_by_one = str(config.hydra.launcher.get("_target_")).endswith(".BasicLauncher")
    if good:
        progress = Progress([point.config for point in good if point.config is not None])
        if one_by_one:
            _one_after_the_other(good, len(points), progress, launcher())
        else:
            _at_once(good, len(points), progress, launcher())
    summarize(points, folder)
    report([point.config for point in good if point.config is not None], points, folder)
    say_times(points, begun, one_by_one)
    return points


def _points(config: "DictConfig", context: "HydraContext", arguments: Sequence[str]) -> tuple[list[Point], Path]:
    """The points, composed and checked as far as that is cheap, and the folder of the grid."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader, begun = context.config_loader, datetime.now()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*given_params(config), *arguments])
    given = [override.value() for override in parsed if override.key_or_group == "out"]
    last = {override.get_key_element(): override for override in parsed}  # a later one replaces that of a recipe
    varying = [key for key, override in last.items() if override.is_sweep_override()]
    rest = [override for override in parsed if override.key_or_group != "out" or override.is_sweep_override()]
    points = [
        Point(number, overrides, varied(overrides, varying))
        for number, overrides in enumerate(BasicSweeper.split_arguments(rest, None)[0], 1)
    ]
    composed = {point.number: compose_point(point, config, loader) for point in points}
    _refuse_shared_repositories(cfg for cfg in composed.values() if cfg is not None)
    recipes = {str(cfg.recipe_name) for cfg in composed.values() if cfg is not None}
    folder = Path(str(given[-1])) if given and given[-1] and "out" not in varying else None
    if folder is not None and "${" in str(folder):
        raise bad_value("out", folder, "a folder; each point has one inside it, named after what varies")
    folder = folder or default_out(recipes.pop() if len(recipes) == 1 else "grid", begun)
    checked: dict[str, str] = {}
    for point in points:
        cfg = composed[point.number]
        point.out = folder / folder_name(point.varies) if point.varies else folder
        if "out" in varying:
            point.out = Path(str(cfg.out)) if cfg is not None else folder
        else:
            point.overrides += quoted([f"out={point.out}"])
        if cfg is not None:
            check_point(point, cfg, checked)
    _refuse_shared_folders(points)
    return points, folder


def given_params(config: "DictConfig") -> list[str]:
    """The overrides in ``hydra.sweeper.params``; what refers to another key is resolved in each point."""
    from omegaconf import OmegaConf

    params: Any = OmegaConf.to_container(config.hydra.sweeper).get("params")  # type: ignore[union-attr]
    return [f"{key}={value}" for key, value in (params or {}).items()]


def _refuse_shared_folders(points: Sequence[Point]) -> None:
    """Refuses a grid of which several points would write into one folder.

    Raises:
        UserError: With the folder.
    """
    for folder, count in Counter(point.out for point in points).items():
        if count > 1:
            raise UserError(
                f"out={folder}: {count} points of the grid would write there: give each value of a key once, and out "
                "as one folder, in which each point has its own"
            )


def _refuse_shared_repositories(composed: "Iterable[DictConfig]") -> None:
    """Refuses a grid that would publish several checkpoints under one name.

    Raises:
        UserError: With the repository.
    """
    for name, points in Counter(str(cfg.publish) for cfg in composed if cfg.get("publish")).items():
        if points > 1:
            raise UserError(
                f"publish={name}: {points} points of the grid would replace each other's checkpoint there: name what "
                "varies, such as publish='owner/name-${seed}', or take publish=null"
            )


def compose_point(point: Point, config: "DictConfig", loader: Any) -> "DictConfig | None":
    """A point's config without Hydra's part; None, with the message in the point, if there is none."""
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    try:
        cfg: DictConfig = loader.load_sweep_config(config, list(point.overrides))
    except (HydraException, OmegaConfBaseException) as error:
        point.message, point.code = explain(error, point.overrides), 2
        return None
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def check_point(point: Point, cfg: "DictConfig", checked: dict[str, str]) -> None:
    """Checks a point's values, and its stages against the model's config; ``checked`` has the results so far."""
    from compress.run import preflight
    from compress.run.config import to_run_config

    if cfg.job not in OF_STAGES:
        return
    try:
        cfg.out = str(point.out)
        point.config = to_run_config(cfg, alternatives=cfg.job == "compare")
        found = repr((point.config.model, point.config.stages, point.config.evaluate))
        if found not in checked:
            checked[found] = ""
            try:
                preflight.check_stages(point.config)
            except UserError as error:
                checked[found] = str(error)
        if checked[found]:
            raise UserError(checked[found])
    except UserError as error:
        point.message, point.code = str(error), 2


def refuse_processes() -> None:
    """Refuses a grid under ``accelerate launch``: where a point fails in one process, the others would wait forever.

    Raises:
        UserError: There are several processes.
    """
    if processes.count() > 1:
        raise UserError(
            "--multirun: each point of a grid runs in one process: take a launcher, such as hydra/launcher=joblib, or "
            "give accelerate launch one point after the other, and recipe=report runs=... at the end"
        )


def use_folder(config: "DictConfig", folder: Path) -> None:
    """Tells Hydra and its launchers where the grid is; Hydra itself writes nothing there."""
    from omegaconf import open_dict, read_write

    with read_write(config), open_dict(config):
        config.hydra.sweep.dir, config.hydra.sweep.subdir = str(folder), "."
        config.hydra.overrides.hydra += quoted([f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=."])


def refuse_points(bad: Sequence[Point], total: int) -> None:
    """Reports the points that cannot run, each message once."""
    for message in dict.fromkeys(point.message for point in bad):
        same = [point for point in bad if point.message == message]
        names = "" if _says(message, same) else f": {_names(same)}"
        job.refuse(message if len(same) == total else f"{message} ({len(same)} of {total} points{names})")
        for point in same:
            job.write_failure(point.out, point.overrides, message, 2)
            job.codes.append(2)


def _one_after_the_other(points: Sequence[Point], total: int, progress: Progress, launcher: "Launcher") -> None:
    for point in points:
        say(f"\n[{point.number}/{total}] {point.name}", progress.line())
        launch([point], launcher)


def _at_once(points: Sequence[Point], total: int, progress: Progress, launcher: "Launcher") -> None:
    say(f"\n{len(points)} of {total} points are launched", progress.line())
    with _saying(progress):
        launch(points, launcher)


@contextmanager
def _saying(progress: Progress) -> Iterator[None]:
    """Prints every minute how far a grid is, where that has changed."""
    done = threading.Event()

    def watch() -> None:
        last = progress.line()
        while not done.wait(MINUTE):
            if (line := progress.line()) != last:
                say(line)
                last = line

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def launch(points: Sequence[Point], launcher: "Launcher") -> None:
    """Runs points and takes their outcomes, from their folders where the launcher lost them.

    Raises:
        UserError: The launcher cannot run anything.
    """
    before = {point.out: _stamps(point.out) for point in points}
    try:
        for point, returned in zip(
            points, launcher.launch([p.overrides for p in points], points[0].number - 1), strict=True
        ):
            finish(point, returned)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a launcher can raise anything, such as for a process that was killed
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        unknown = [point for point in points if point.code is None]
        _wait_for(unknown)
        for point in unknown:
            _look(point, before[point.out])


def _wait_for(points: Sequence[Point]) -> None:
    """Waits while any of the points still runs, in processes that the launcher left alone."""
    from compress.store import Store
    from compress.store.uses import runs

    stores = {point.config.store: Store(point.config.store) for point in points if point.config is not None}
    folders = {Path(os.path.abspath(point.out)) for point in points}
    said = False
    while left := sum(run.active and run.out in folders for store in stores.values() for run in runs(store)):
        if not said:
            say(f"waiting for {left} points that still run")
        said = True
        time.sleep(min(10.0, MINUTE))


def finish(point: Point, returned: Any) -> None:
    """Takes the outcome that a launcher returned."""
    from hydra.core.utils import JobStatus

    if returned.status == JobStatus.COMPLETED:
        point.code = 0
        return
    error = returned._return_value  # the property of that name would print and raise it
    if isinstance(error, job.PointFailed):
        point.message, point.code = error.message, error.code
    else:  # nobody has written it down yet
        mistake = isinstance(error, UserError)
        point.message, point.code = (str(error), 2) if mistake else (f"{type(error).__name__}: {error}", 1)
        job.write_failure(point.out, point.overrides, point.message, point.code)
    job.codes.append(point.code)


def _stamps(out: Path) -> dict[str, tuple[int, int] | None]:
    """What tells whether a point's files were written again: not by a clock, since machines differ."""

    def stamp(file: Path) -> tuple[int, int] | None:
        try:
            found = file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    return {name: stamp(out / name) for name in (FAILURE, REPORT)}


def _look(point: Point, before: dict[str, tuple[int, int] | None]) -> None:
    """Takes the outcome from the point's folder, where a launcher returned none."""
    now = _stamps(point.out)
    new = {name for name, stamp in now.items() if stamp is not None and stamp != before[name]}
    if FAILURE in new:
        found = json.loads((point.out / FAILURE).read_text(encoding="utf-8"))
        point.message, point.code = found["message"], found["exit_code"]
    elif REPORT in new and has_ended(_report(point.out)):
        point.code = 0
    else:
        point.message, point.code = "it was not run, or its process ended before it was done", 1
        job.write_failure(point.out, point.overrides, point.message, 1)
    job.codes.append(point.code)


def summarize(points: Sequence[Point], folder: Path) -> None:
    """Prints how many points are done, from the store, or failed, and why."""
    failed = [point for point in points if point.code]
    cached = sum(not point.code and _is_cached(point.out) for point in points)
    done = len(points) - len(failed) - cached
    early = sum(not point.code and "stopped" in _report(point.out) for point in points)
    counts = f"{done} computed, {cached} from the store, {len(failed)} failed"
    say(f"\ngrid        {len(points)} points: {counts}{f'; {early} ended early' if early else ''}")
    say(f"folder      {folder}")
    for message in dict.fromkeys(point.message for point in failed):
        same = [point for point in failed if point.message == message]
        say(f"failed      {message if _says(message, same) else f'{_names(same)}: {message}'}")


def report(configs: "Sequence[RunConfig]", points: Sequence[Point], folder: Path) -> None:
    """Writes the report of the grid; a disk that is full costs that alone."""
    try:
        report_grid(configs, [point.out for point in points], folder)
    except OSError as error:
        message = f"{folder}: the report of the grid cannot be written ({error.strerror or error})"
        job.codes.append(job.refuse(f"{message}: make room and give recipe=report 'runs={folder}/*'"))


def say_times(points: Sequence[Point], begun: float, one_by_one: bool) -> None:
    """Prints what the grid took, and what of that its stages and evaluations did.

    Args:
        points: That ran.
        begun: When the grid began, as :func:`time.time` has it.
        one_by_one: Whether no two points ran at the same time, so that the difference is what the grid itself costs.
    """
    took, computing = time.time() - begun, 0.0
    for point in points:
        file = point.out / REPORT
        if file.is_file() and file.stat().st_mtime >= begun:
            computing += json.loads(file.read_text(encoding="utf-8")).get("computed_seconds") or 0.0
    rest = f"; the rest is {(took - computing) / took:.1%}" if one_by_one and computing else ""
    say(f"time        {duration(took)}; stages and evaluations, each once, {duration(computing)}{rest}")


def _names(points: Sequence[Point]) -> str:
    """The first points by name."""
    return ", ".join(point.name or "the only point" for point in points[:3]) + (", ..." if len(points) > 3 else "")


def _says(message: str, points: Sequence[Point]) -> bool:
    """Whether a message begins with what its points are named after."""
    return message.startswith(f"{_names(points)}:")


def _is_cached(out: Path) -> bool:
    """Whether all stages of a point were in the store."""
    stages = _report(out).get("stages")
    return stages is not None and all(stage.get("cached", True) for stage in stages)


def _report(out: Path) -> dict[str, Any]:
    """A point's ``report.json``; empty if there is none."""
    try:
        return dict(json.loads((out / REPORT).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def say(*parts: str) -> None:
    """Prints the parts that are not empty as one line, in the first process."""
    if processes.is_main():
        print("; ".join(filter(None, parts)), flush=True)
