"""The report of many runs as a job, and at the end of a multirun."""

import json
from pathlib import Path
from typing import Any

import pytest

import compress.track
from compress.config.compose import compose
from compress.errors import UserError
from compress.jobs import run_job
from compress.jobs.report import join_group, report_grid
from compress.run.config import to_run_config


def run(folder: Path, seed: int) -> Path:
    cost = {"params": 10.0, "bytes": 20.0}
    stage = {"name": "prune", "kind": "prune", "method": "width", "seconds": 1.0, "cached": False, "cost": cost}
    content = {"recipe": "prune", "checkpoint": "x", "seed": seed, "teacher": {"cost": cost}, "stages": [stage]}
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(content))
    return folder


def test_a_glob_of_runs_becomes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        run(tmp_path / "runs" / name, 0)
    out = tmp_path / "out"
    run_job(compose(["recipe=report", f"runs='{tmp_path}/runs/*'", f"out={out}", "title=Two runs"]))
    assert {file.name for file in out.iterdir()} == {
        "points.json", "report.csv", "report.html", "report.md", "report.tex",
    }  # fmt: skip
    assert "<h1>Two runs</h1>" in (out / "report.html").read_text()
    assert f"{out / 'report.html'}: 2 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "runs is missing"),
        (["runs=/no/such/folder"], "runs=/no/such/folder: expected"),
        (["runs=x", "+stages.a={kind: prune}"], "stages=a: expected none"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_job(compose(["recipe=report", *overrides]))


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.yaml", "a: [1"), ("report.json", '{"checkpoint": "x", "stages": [{"name": "a"}]}'), ("report.json", "{")],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    folder = run(tmp_path / "runs" / "a", 0)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"a/{name}: "):
        run_job(compose(["recipe=report", f"runs='{tmp_path}/runs/*'", f"out={tmp_path / 'out'}"]))


def test_a_grid_has_one_group_and_its_table_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = []
    for seed, recipe in enumerate(("prune", "int8")):
        folder = run(tmp_path / "sweep" / f"seed={seed}", seed)
        points.append(compose([f"recipe={recipe}", f"out={folder}", f"seed={seed}"]))
        join_group(points[-1], str(tmp_path / "sweep"))
    group = f"{tmp_path.name}-sweep"
    assert [cfg.track.group for cfg in points] == [group] * 2
    own = compose(["recipe=prune", "track.group=mine"])
    join_group(own, str(tmp_path))
    assert own.track.group == "mine"
    seen: list[Any] = []

    class Tracker:
        def report(self, columns: list[str], rows: list[list[Any]], more: dict[str, Any]) -> None:
            seen.append((columns, rows, more))

        def close(self) -> None:
            seen.append("closed")

    def start(config: Any, group: str, folder: Path, run_config: dict[str, Any]) -> Tracker:
        seen.append((config.group, folder))
        return Tracker()

    monkeypatch.setattr(compress.track, "start", start)
    configs = [to_run_config(cfg) for cfg in points]
    report_grid(configs, [config.out for config in configs], tmp_path / "sweep")
    started, (columns, rows, more), closed = seen
    assert started == (group, tmp_path / "sweep") and closed == "closed"
    assert columns[:3] == ["point", "folder", "seed"] and [row[2] for row in rows[-2:]] == [0, 1]
    page = (tmp_path / "sweep" / "report.md").read_text()
    assert more and all(f"## {title}\n" in page for title in more)
    assert all(f"| {' | '.join(cells)} |" in page.replace("**", "") for _, body in more.values() for cells in body)
    assert (tmp_path / "sweep" / "report.html").is_file()


def test_a_grid_of_which_no_point_could_run_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "failure.json").write_text('{"overrides": [], "message": "x=1: expected y", "exit_code": 2}')
    report_grid([], [tmp_path / "a"], tmp_path)
    assert "x=1: expected y" in (tmp_path / "report.md").read_text()


def test_a_run_that_has_not_finished_is_no_point(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 0)
    content = json.loads((folder / "report.json").read_text())
    del content["checkpoint"]
    (folder / "report.json").write_text(json.dumps(content))
    for report in (True, False):  # stopped at a stage, or before the first was done
        run_job(compose(["recipe=report", f"runs={tmp_path}", f"out={tmp_path / 'out'}"]))
        assert "it has not finished" in (tmp_path / "out" / "report.md").read_text()
        if report:
            (folder / "report.json").unlink()
            (folder / "config.yaml").write_text("seed: 0")
