"""Recipes that are grids: all their points can run, and a value on the command line replaces theirs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import compress.run.recipe
from compress.__main__ import main
from compress.config.folders import recipe_files

POINTS = {
    "importance_ratio": 24, "width_depth_free": 18, "stage_order": 9, "schedulers_steps": 12,
    "distillation_losses": 18, "distillation_levers": 21, "data_size": 12,
    "bits_ptq_qat": 18, "bits_int8_inputs": 18, "one_training_or_two": 9,
}  # fmt: skip
ALL = [name.partition("/")[2] for name in recipe_files() if name.startswith("ablations/")]


def configs(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Any]:
    """The configs that would run; nothing is computed."""
    seen: list[Any] = []
    monkeypatch.setattr(compress.run.recipe, "run_recipe", lambda config, keep: seen.append(config))
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    assert main() == 0
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_point_can_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    seen = configs(monkeypatch, f"recipe=ablations/{name}", "track=none")
    assert len(seen) == POINTS[name] == len({config.out for config in seen})
    assert {config.out.parts[:2] for config in seen} == {("runs", name)}


def test_what_is_given_replaces_what_the_recipe_varies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = configs(monkeypatch, "recipe=ablations/stage_order", *tiny_overrides, "seed=3", "out=grid")
    assert {config.seed for config in seen} == {3} and len(seen) == 3
    assert [stage.name for stage in seen[1].stages] == ["prune", "prune_more", "distill", "distill_more", "quantize"]
    assert all("seed" not in config.out.name for config in seen)


def test_an_order_of_unknown_stages_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for order in ("[prune,train]", "[prune,prune]", "[]"):
        monkeypatch.setattr(sys, "argv", ["compress", "recipe=prune_distill", *tiny_overrides, f"order={order}"])
        assert main() == 2
        assert "expected names of stages, each once: prune, distill" in capsys.readouterr().err


def test_a_failed_point_is_named_by_its_values(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compress.run.recipe, "run_recipe", lambda config, keep: None)
    given = ["recipe=ablations/stage_order", *tiny_overrides, "seed=0", "order=[prune],[train]", "out=grid"]
    monkeypatch.setattr(sys, "argv", ["compress", *given])
    assert main() == 2
    (failure,) = (json.loads(file.read_text()) for file in Path("grid").rglob("failure.json"))
    assert "order=['train']: expected" in failure["message"] and "order=[train]" in failure["overrides"]
