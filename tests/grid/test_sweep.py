"""Grids: points that fail, what is counted, and what a second command finds."""

import errno
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import compress.grid.sweep
import compress.run.preflight
import compress.run.recipe
from compress.__main__ import main
from compress.config.compose import compose
from compress.errors import UserError
from compress.evaluate import Evaluation
from compress.grid.progress import Progress
from compress.grid.sweep import Point, launch
from compress.run.config import to_run_config
from compress.run.keys import Plan
from compress.store import Store
from compress.store.uses import using


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str]) -> Any:
    """A grid in this process, started in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["compress", "-m", *tiny_overrides, *arguments])
        return main()

    return call


def test_a_point_that_fails_leaves_its_message_until_it_succeeds(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors: dict[int, Exception] = {0: UserError("data.path=x: expected y"), 1: ZeroDivisionError("ours")}

    kept: list[bool] = []

    def run_recipe(config: Any, keep: bool) -> None:
        kept.append(keep)
        if config.seed in errors:
            raise errors[config.seed]

    monkeypatch.setattr(compress.run.recipe, "run_recipe", run_recipe)
    arguments = ["recipe=prune", "seed=0,1,2", "out=grid"]
    assert cli(*arguments) == 1, "the worst: a mistake of ours"
    files = {path.parent.name: json.loads(path.read_text()) for path in Path("grid").glob("*/failure.json")}
    assert {name: (found["message"], found["exit_code"]) for name, found in files.items()} == {
        "seed=0": ("data.path=x: expected y", 2),
        "seed=1": ("ZeroDivisionError: ours", 1),
    }
    assert "failed      seed=1: ZeroDivisionError: ours" in capsys.readouterr().out
    assert kept == [True] * 3
    del errors[0]
    monkeypatch.setattr(sys, "argv", [sys.argv[0], *sys.argv[2:-3], "recipe=prune", "seed=0", "out='grid/seed=0'"])
    assert main() == 0, "alone, in the folder of the point"
    assert [file.parent.name for file in Path("grid").rglob("failure.json")] == ["seed=1"]
    errors.clear()
    assert cli(*arguments) == 0
    assert not list(Path("grid").rglob("failure.json"))


class Lost:
    """A launcher that raises once its points have been launched, as for a process that was killed."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def launch(self, overrides: Any, initial_job_idx: int) -> None:
        self.work()
        raise ConnectionError("a worker was killed")


def test_what_a_launcher_loses_is_taken_from_the_folders_of_the_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compress.grid.sweep, "MINUTE", 0.05)
    config = replace(to_run_config(compose(["recipe=prune", *tiny_overrides])), store=tmp_path / "store")
    points = [Point(number, [], [f"p={number}"], tmp_path / str(number), config) for number in range(6)]
    for point in points:
        (point.out / "checkpoint").mkdir(parents=True)
        (point.out / "report.json").write_text("{}")  # of an earlier grid
    threads: list[threading.Thread] = []

    def late() -> None:
        with using(Store(tmp_path / "store"), points[1].out, "prune", []):
            begun.set()
            time.sleep(0.5)
            (points[1].out / "report.json").write_text('{"stopped": "fid"}')

    def work() -> None:
        (points[0].out / "report.json").write_text('{"checkpoint": "checkpoint"}')
        os.utime(points[0].out / "report.json", (1.0, 1.0))  # of a machine whose clock is wrong
        (points[2].out / "failure.json").write_text('{"message": "seed=x: expected y", "exit_code": 2}')
        (points[4].out / "report.json").write_text('{"stages": []}')  # after one of its stages
        (points[5].out / "report.json").write_text('{"stages": [], "refused": {}}')  # of alternatives
        threads.append(threading.Thread(target=late))
        threads[0].start()
        assert begun.wait(30)

    begun = threading.Event()
    launch(points, Lost(work))
    threads[0].join()
    lost = (1, "it was not run, or its process ended before it was done")
    assert [(point.code, point.message) for point in points] == [
        (0, ""), (0, ""), (2, "seed=x: expected y"), lost, lost, (0, "")
    ]  # fmt: skip
    shown = capsys.readouterr()
    assert "ConnectionError: a worker was killed" in shown.err and "waiting for 1 points that still run" in shown.out


def test_a_grid_that_runs_elsewhere_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compress.grid.sweep, "MINUTE", 0.01)
    lines = iter(["grid: 0 of 2 stages", "grid: 0 of 2 stages", "grid: 1 of 2 stages"])
    enough = threading.Event()

    class Counted:
        def line(self) -> str:
            line = next(lines, "")
            if not line:
                enough.set()
            return line or "grid: 1 of 2 stages"

    with compress.grid.sweep._saying(Counted()):  # type: ignore[arg-type]
        assert enough.wait(30)
    assert capsys.readouterr().out == "grid: 1 of 2 stages\n"


def test_a_choice_that_is_unknown_costs_its_points_alone(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(compress.run.recipe, "run_recipe", lambda config, keep: seen.append(config.out))
    assert cli("recipe=prune", "prune=magnitude,nonsense", "seed=0,1", "out=grid") == 2
    assert [out.name for out in seen] == ["prune=magnitude,seed=0", "prune=magnitude,seed=1"]
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    assert "prune=nonsense: no such prune" in errors and "(2 of 4 points: " in errors
    assert len(list(Path("grid").glob("prune=nonsense*/failure.json"))) == 2


def test_a_message_that_begins_with_what_varies_does_not_say_it_twice(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compress.run.recipe, "run_recipe", lambda config, keep: None)
    assert cli("recipe=prune", "stages.prune.ratio=0.5,1.5", "out=named") == 2
    shown = capsys.readouterr()
    for line in (*shown.err.splitlines(), *shown.out.splitlines()):
        assert line.count("stages.prune.ratio=1.5") <= 1, line
    assert "failed      stages.prune.ratio=1.5: expected" in shown.out


def test_a_fixed_key_of_a_choice_that_varies_is_for_the_choices_that_have_it(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        compress.run.recipe, "run_recipe", lambda config, keep: seen.update({config.out.name: config.stages[0].config})
    )
    sparse = ["stages.prune.sparsity=0.5", "stages.prune.include=['*down_block*']"]
    assert cli("recipe=prune", "prune=unstructured,sparse_2_4,depth", *sparse, "out=grid") == 2
    assert list(seen) == ["prune=unstructured", "prune=sparse_2_4"], "only what varies is in the names"
    assert {(config.sparsity, *config.include) for config in seen.values()} == {(0.5, "*down_block*")}
    shown = capsys.readouterr()
    assert "error: stages.prune.sparsity: no such key" in shown.err and shown.err.count("error: ") == 1
    assert "(1 of 3 points: prune@stages.prune=depth)" in shown.err

    Path("mine.yaml").write_text(
        "defaults: [/prune@stages.prune: depth]\nrecipe_name: mine\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {prune@stages.prune: 'width,magnitude', seed: '0,1'}}}\n"
    )
    seen.clear()
    monkeypatch.setattr(sys, "argv", [sys.argv[0], *sys.argv[2:-5], "recipe=./mine.yaml"])
    sys.argv += ["stages.prune.heads=narrow", "stages.prune.calibration.seed=${seed}", "prune/importance=l1"]
    sys.argv += ["out=mine"]
    assert main() == 0
    assert {name: (config.heads, config.calibration.seed) for name, config in seen.items()} == {
        f"prune={prune},seed={seed}": ("narrow", seed) for prune in ("width", "magnitude") for seed in (0, 1)
    }
    assert {config.importance.name for config in seen.values()} == {"l1"}


def test_points_that_would_be_published_under_one_name_are_refused(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(compress.run.recipe, "run_recipe", lambda config, keep: seen.append(config.publish))
    Path("mine.yaml").write_text("defaults: [/prune@stages.prune: magnitude]\nrecipe_name: mine\npublish: me/small\n")
    assert cli("recipe=./mine.yaml", "seed=0,1") == 2
    assert "publish=me/small: 2 points of the grid would replace" in capsys.readouterr().err and not seen
    assert cli("recipe=./mine.yaml", "seed=0,1", "publish=me/small-${seed}") == 0
    assert seen == ["me/small-0", "me/small-1"]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["seed=0,0"], "out=grid/seed=0: 2 points of the grid would write there"),
        (["seed=0,1", "out=a,b"], "out=a: 2 points of the grid would write there"),
        (["seed=0,1", "out=x-${seed}"], "out=x-${seed}: expected a folder; each point has one inside it"),
    ],
)
def test_points_that_would_share_a_folder_are_refused(
    given: list[str], part: str, cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compress.run.recipe, "run_recipe", lambda config, keep: pytest.fail("it ran"))
    assert cli("recipe=prune", "out=grid", *given) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["hydra.launcher.n_job=2"], "hydra.launcher.n_job: no such key of hydra/launcher=basic; known: none"),
        (["hydra/launcher=ray", "hydra.launcher.init.num_cpu=2"], "num_cpu: no such key (did you mean num_cpus?)"),
        (["hydra/launcher=ray"], "hydra/launcher=ray: needs the package ray: pip install 'compress[ray]'"),
    ],
)
def test_a_launcher_that_cannot_be_gets_one_message(
    given: list[str], part: str, cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(compress.run.preflight, "check_stages", lambda config: None)
    assert cli("recipe=prune", "seed=0,1", *given) == 2
    errors = capsys.readouterr().err
    assert part in errors and errors.count("error: ") == 1 and "Traceback" not in errors


def test_a_grid_of_several_processes_is_refused(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli("recipe=prune", "seed=0,1") == 2
    assert "each point of a grid runs in one process" in capsys.readouterr().err


def test_a_disk_that_fills_up_costs_its_points_and_the_report(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run_recipe(config: Any, keep: bool) -> None:
        if config.seed == 0:
            raise full

    def report_grid(*_: Any) -> None:
        raise full

    monkeypatch.setattr(compress.run.recipe, "run_recipe", run_recipe)
    monkeypatch.setattr(compress.grid.sweep, "report_grid", report_grid)
    assert cli("recipe=prune", "seed=0,1", "out=grid") == 2
    captured = capsys.readouterr()
    assert "2 points: 1 computed, 0 from the store, 1 failed" in captured.out
    first, second = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert "the disk is full" in first and "grid: the report of the grid cannot be written (No space left" in second


def test_stages_that_points_share_run_once_and_the_second_command_takes_all_from_the_store(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    compute = compress.run.recipe.compute

    def counted(inputs: Any, step: Any, *rest: Any) -> Any:
        made.append(step.stage.name)
        return compute(inputs, step, *rest)

    def measured(pipeline: Any, *_: Any, **__: Any) -> Evaluation:
        return Evaluation({"params": sum(tensor.numel() for tensor in pipeline.unet.parameters())}, {}, {}, [])

    loaded: list[Any] = []
    load = compress.models.load_teacher
    monkeypatch.setattr("compress.run.work.evaluate", measured)
    monkeypatch.setattr(compress.run.recipe, "compute", counted)
    monkeypatch.setattr(compress.models, "load_teacher", lambda *a: loaded.append(a) or load(*a))
    grid = ["recipe=prune_distill_int8", "~stages.distill", "prune=magnitude", "quantize=int8,int4"]
    grid += ["stages.prune.ratio=0.25,0.5"]
    assert cli(*grid, "out=grid", "store=store") == 0
    assert sorted(made) == ["prune"] * 2 + ["quantize"] * 4
    assert len(loaded) == 2, "measured and pruned, and pruned once more"
    shown = capsys.readouterr().out
    assert "[1/4] quantize@stages.quantize=int8 stages.prune.ratio=0.25; grid: 0 of 6 stages" in shown
    assert "[4/4] quantize@stages.quantize=int4 stages.prune.ratio=0.5; grid: 5 of 6 stages, about " in shown
    assert "4 points: 4 computed, 0 from the store, 0 failed" in shown
    assert re.search(r"time        .+ s; stages and evaluations, each once, .+ s; the rest is \d+\.\d%", shown)
    made.clear()
    done = json.loads(next(Path("grid").glob("*/report.json")).read_text())
    Store(Path("store")).work(done["stages"][0]["key"])  # of a process that was killed before it removed this
    assert cli(*grid, "out=grid", "store=store") == 0
    assert made == [] and not list(Path("store/work").iterdir())
    assert "4 points: 0 computed, 4 from the store, 0 failed" in capsys.readouterr().out


def test_progress_counts_a_shared_stage_once(tiny_overrides: list[str], tmp_path: Path) -> None:
    def config(seed: int, quantize: str) -> Any:
        own = [f"seed={seed}", f"quantize={quantize}", f"store={tmp_path}"]
        return to_run_config(compose(["recipe=prune_distill_int8", *tiny_overrides, *own]))

    import torch

    points = [config(seed, quantize) for seed in (0, 1) for quantize in ("int8", "int4")]
    progress = Progress(points)
    assert progress.line() == "grid: 0 of 8 stages"
    assert Progress([replace(points[0], device="cuda:99")]).line() == "", "of another machine"
    plan = Plan(points[0], Store(tmp_path), torch.device("cpu"))
    (tmp_path / plan.steps[0].key).mkdir()
    assert progress.line() == "grid: 1 of 8 stages"
