"""A recipe says what it is for, and that is what is done."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from compress import jobs
from compress.config.compose import compose
from compress.config.folders import recipe_files
from compress.errors import UserError


@pytest.mark.parametrize("recipe", list(recipe_files()))
def test_every_recipe_names_a_job_that_is_there(recipe: str) -> None:
    cfg = compose([f"recipe={recipe}"])
    assert cfg.job in jobs.JOBS
    assert cfg.stages or cfg.job != "run"


def test_the_named_module_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setitem(sys.modules, "compress.jobs.score", SimpleNamespace(run_job=done.append))
    cfg = OmegaConf.create({"job": "score"})
    jobs.run_job(cfg)
    assert done == [cfg]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=prune", "job=scor"], r"job=scor: no such job \(did you mean score\?\); known: run, score"),
        (["recipe=score", "job=run", "images=a"], "images: no such key"),
        (["recipe=prune", "job=score"], "images is missing"),
    ],
)
def test_a_job_that_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        jobs.run_job(compose(overrides))


@pytest.mark.parametrize("recipe", ["benchmark", "compare_quantization", "prune_sensitivity"])
def test_what_runs_in_one_process_says_so_to_several(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"job=\w+: it runs in one process: start it without accelerate launch"):
        jobs.run_job(compose([f"recipe={recipe}"]))
