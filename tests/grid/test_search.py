"""A search finds the best point that keeps to the bounds."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import compress.run.recipe
from compress.__main__ import main

pytest.importorskip("optuna")


@pytest.mark.parametrize(("bound", "best"), [("", "0.5"), (", subject_to: {psnr: 12}", "0.25")])
def test_the_best_point_within_the_bounds_is_named(
    bound: str, best: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    tried: list[float] = []

    def run_recipe(config: Any, keep: bool) -> None:
        tried.append(config.stages[0].config.ratio)
        ratio = config.stages[0].config.ratio
        config.out.mkdir(parents=True, exist_ok=True)
        row = {"cost": {"bytes": 1000 * (1 - ratio)}, "metrics": {"psnr": {"value": 20 * (1 - ratio)}}, "cached": False}
        (config.out / "report.json").write_text(json.dumps({"stages": [row]}))

    monkeypatch.setattr(compress.run.recipe, "run_recipe", run_recipe)
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", f"objective={{minimize: bytes{bound}}}", "out=search"]
    tiny_overrides = [*tiny_overrides, "evaluate.images=8"]
    given = ["compress", "-m", "recipe=prune", "stages.prune.ratio=0.25,0.5", *search, *tiny_overrides]
    monkeypatch.setattr(sys, "argv", given)
    assert main() == 0
    shown = capsys.readouterr().out
    assert f"with stages.prune.ratio={best}\n" in shown.split("best        ")[1]
    assert sorted(tried) == [0.25, 0.5] and "trials      8, of 2 different points" in shown
    assert "2 points: 2 computed, 0 from the store, 0 failed" in shown


def test_a_trial_that_measures_nothing_fails_alone_and_a_storage_is_continued_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import optuna

    monkeypatch.chdir(tmp_path)
    steps: list[int] = []

    def run_recipe(config: Any, keep: bool) -> None:
        steps.append(config.evaluate.latency_repeats)
        psnr = None if len(steps) == 2 else 20.0
        config.out.mkdir(parents=True, exist_ok=True)
        row = {"name": "prune", "cost": {"bytes": steps[-1]}, "metrics": {"psnr": {"value": psnr}}, "cached": False}
        (config.out / "report.json").write_text(json.dumps({"stages": [row]}))

    monkeypatch.setattr(compress.run.recipe, "run_recipe", run_recipe)
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.storage=sqlite:///search.db"]
    search += ["objective={minimize: bytes, subject_to: {psnr: 12}}", "evaluate.latency_repeats=interval(1,90)"]
    given = [*(word for word in tiny_overrides if "latency_repeats" not in word), "evaluate.images=8"]
    for seed in (0, 1):  # of the sampler
        arguments = [*search, f"hydra.sweeper.seed={seed}", f"out=search{seed}"]
        monkeypatch.setattr(sys, "argv", ["compress", "-m", "recipe=prune", *arguments, *given])
        assert main() == 2 - 2 * seed
    assert "the row prune of the report has no psnr" in capsys.readouterr().err
    assert all(isinstance(step, int) for step in steps), "an interval of whole numbers, as the key is one"
    study = optuna.load_study(study_name=None, storage="sqlite:///search.db")
    assert [trial.state.name for trial in study.trials].count("FAIL") == 1 and len(study.trials) == 8


def test_a_trial_beyond_a_bound_after_a_stage_runs_no_further(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import optuna

    monkeypatch.chdir(tmp_path)
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.storage=sqlite:///search.db"]
    search += ["objective={minimize: bytes, stop_after: {prune: {params: 600000}}}", "~stages.distill"]
    given = ["compress", "-m", "recipe=prune_distill_int8", "prune=magnitude", "stages.prune.ratio=0.1,0.5", *search]
    for again in (False, True):
        monkeypatch.setattr(sys, "argv", [*given, "out=search", *tiny_overrides])
        assert main() == 0
        shown = capsys.readouterr().out
        assert "; 1 ended early" in shown and "with stages.prune.ratio=0.5\n" in shown.split("best        ")[1]
        assert ("stopped early by objective.stop_after: params" in shown) or again
    early, whole = (
        json.loads((tmp_path / "search" / f"ratio={r}" / "report.json").read_text()) for r in ("0.1", "0.5")
    )
    assert [stage["name"] for stage in early["stages"]] == ["prune"] and "checkpoint" not in early
    assert [stage["name"] for stage in whole["stages"]] == ["prune", "quantize"]
    config = ["compress", "recipe=prune_distill_int8", "prune=magnitude", "~stages.distill", "out=search/ratio=0.5"]
    bound = "objective={minimize: bytes, stop_after: {prune: {params: 1000}}}"
    page = (tmp_path / "search" / "report.md").read_text()
    assert "1 run, 1 ended early" in page and early["stopped"] in page
    study = optuna.load_study(study_name=None, storage="sqlite:///search.db")
    states = {trial.params["stages.prune.ratio"]: trial.state.name for trial in study.trials}
    assert states == {"0.1": "PRUNED", "0.5": "COMPLETE"}
    assert (tmp_path / "search/ratio=0.5/checkpoint").is_dir()
    artifact = ["track=wandb", "track.mode=offline", "track.artifact=true", "stages.prune.ratio=0.5"]
    monkeypatch.setattr(sys, "argv", [*config, bound, *tiny_overrides, *artifact])
    assert main() == 0 and not (tmp_path / "search/ratio=0.5/checkpoint").exists()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("storage=search.db", "hydra.sweeper.storage=search.db: expected null or the address of a database"),
        ("storage=sqlite:///no/such/search.db", "hydra.sweeper.storage=sqlite:///no/such/search.db: expected"),
        ("seed=abc", "hydra.sweeper.seed=abc: expected a whole number"),
        ("n_trials=0", "hydra.sweeper.n_trials=0: expected a whole number of at least 1"),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    given: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    search = ["hydra/sweeper=optuna", f"hydra.sweeper.{given}", "objective={minimize: bytes}", "seed=0,1"]
    monkeypatch.setattr(sys, "argv", ["compress", "-m", "recipe=prune", *search, *tiny_overrides])
    assert main() == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "part"),
    [
        ("null", "objective=null: a search needs one"),
        ("{minimize: speed}", "objective.minimize=speed: expected one of"),
        ("{subject_to: {fid: 1}}", "expected exactly one of them"),
        ("{minimize: bytes, stop_after: {prune: {fit: 1}}}", "stop_after.prune=fit: expected one of"),
        ("{minimize: bytes, subject_to: {fid: 1}}", "objective: fid is not measured: give evaluate.images"),
        ("{minimize: bytes, stop_after: {cut: {fid: 1}}}", "objective.stop_after=cut: expected names of stages: prune"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(
    objective: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = ["recipe=prune", "seed=0,1", "hydra/sweeper=optuna", f"objective={objective}", *tiny_overrides]
    monkeypatch.setattr(sys, "argv", ["compress", "-m", *given])
    assert main() == 2
    assert part in capsys.readouterr().err
