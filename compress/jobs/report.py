"""``recipe=report``: one report of many runs that have finished; also at the end of a multirun."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.values import build
from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from compress.run.config import RunConfig
    from compress.track import TrackConfig


@dataclass(frozen=True)
class ReportConfig:
    """What to report.

    Attributes:
        runs: A glob of folders of runs, or of folders that hold them.
        title: Of the page.
        out: Folder of the report; None for a new one under ``runs/``.
    """

    runs: str
    title: str = "report"
    out: str | None = None


def run_job(cfg: "DictConfig") -> None:
    """Reports the runs that a composed config names.

    Raises:
        UserError: There are none, or their files cannot be read.
    """
    from omegaconf import OmegaConf

    from compress.config.folders import default_out
    from compress.report.runs import find_runs
    from compress.run import preflight
    from compress.track import TrackConfig

    tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    if tree.get("runs") in (None, "???"):
        raise UserError("runs is missing: give runs=GLOB, the folders of the runs to report, such as 'runs/prune/*'")
    if tree["stages"]:
        raise bad_value("stages", ", ".join(tree["stages"]), "none, because nothing is compressed here")
    config = build(ReportConfig, {key: tree[key] for key in ("runs", "title", "out") if key in tree}, "")
    out = Path(config.out or default_out("report"))
    preflight.check_writable("out", out)
    report_runs(find_runs(config.runs), out, config.title, build(TrackConfig, tree.get("track"), "track"))


def join_group(cfg: "DictConfig", folder: str) -> None:
    """Groups the W&B runs of a grid's point with those of the others, unless the user named a group.

    Args:
        cfg: Composed config of the point; changed.
        folder: Of the grid.
    """
    from omegaconf import open_dict

    if cfg.track.get("backend") == "wandb" and cfg.track.get("group") is None:
        with open_dict(cfg.track):
            cfg.track.group = _group(Path(folder))


def report_grid(configs: Sequence["RunConfig"], folders: Sequence[Path], out: Path) -> None:
    """Reports the points of a grid in the folder of the grid.

    Args:
        configs: Of the points that run stages and could be; the first says how they are tracked.
        folders: Of all points.
        out: Folder of the grid.

    Raises:
        UserError: A file cannot be read.
    """
    recipes = list(dict.fromkeys(config.recipe_name for config in configs))
    track = replace(configs[0].track, group=configs[0].track.group or _group(out)) if configs else None
    report_runs(folders, out, ", ".join(recipes) or out.name, track)


def _group(folder: Path) -> str:
    """The W&B group of a grid: one, whatever recipes its points have."""
    return "-".join(part for part in folder.parts[-2:] if part not in (folder.anchor, ".."))


def report_runs(folders: Sequence[Path], out: Path, title: str, track: "TrackConfig | None" = None) -> None:
    """Writes one report of many runs and prints where it is; does nothing if no folder holds a run.

    Args:
        folders: Of the runs; one that failed holds a ``failure.json``.
        out: Folder of the report, such as that of the multirun.
        title: Of the page.
        track: Where its table goes besides; None: nowhere.

    Raises:
        UserError: A file cannot be read.
    """
    from compress.report.many import write_many
    from compress.report.runs import read_runs
    from compress.system import processes

    if not processes.is_main():
        return
    runs, failed = read_runs(folders)
    if not runs and not failed:
        return
    (columns, rows), content = write_many(out, title, runs, failed)
    if track is not None:
        import compress.track

        tracker = compress.track.start(track, track.group or out.name, out, {"runs": [str(f) for f in folders]})
        shown = {
            table.title: ([*table.headings], [[name, *(c.line() for c in cells)] for name, cells in table.rows])
            for table in content.tables
        }
        tracker.report(columns, rows, more=shown)
        tracker.close()
    print(f"\nreport      {out / 'report.html'}: {content.lead.rstrip('.')}")
