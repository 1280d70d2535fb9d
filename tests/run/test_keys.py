"""What a key in the store depends on."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.config.compose import compose
from compress.errors import UserError
from compress.run.config import RunConfig, to_run_config
from compress.run.keys import _check_same, changed
from compress.stage import Stage


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str = "inner"
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Twin:
    name: str = "inner"
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    needed: int
    ratio: float = 0.25
    inner: Any = Inner(rate=0.7)


def test_only_what_is_no_default_counts() -> None:
    assert changed(Config(3)) == {"needed": 3}
    assert changed(Config(3, 0.5, Inner())) == {"needed": 3, "ratio": 0.5, "inner": {"rate": 0.5}}
    other = {"class": f"{__name__}.Twin", "rate": 0.1}
    assert changed(Config(3, inner=Twin(rate=0.1))) == {"needed": 3, "inner": other}


def test_another_class_with_the_same_values_is_another_config() -> None:
    assert changed(Config(3, inner=Twin(rate=0.7))) != changed(Config(3))


def stage_parts(*overrides: str) -> list[Any]:
    config: RunConfig = to_run_config(compose(["recipe=prune_distill_int8", *overrides]))
    return [changed(stage.config) for stage in config.stages]


def test_the_default_run_hashes_hardly_anything() -> None:
    prune, distill, quantize = stage_parts("prune=magnitude")
    assert prune == quantize == {}
    assert set(distill) == {
        "steps", "batch_size", "learning_rate", "losses", "ema_decay", "min_snr_gamma", "mixed_precision",
        "teacher_engine", "optimizer",
    }  # fmt: skip
    changes = ["prune=magnitude", "stages.prune.ratio=0.5", "stages.distill.steps=5"]
    assert stage_parts(*changes)[:2] == [{"ratio": 0.5}, {**distill, "steps": 5}]
    importances = [json.dumps(stage_parts(f"prune={name}")[0]) for name in ("magnitude", "taylor", "hessian", "random")]
    assert len(set(importances)) == 4


def test_a_new_key_with_its_default_keeps_the_keys_of_old_checkpoints() -> None:
    longer = dataclasses.make_dataclass("Longer", [("loss_weight", float, 0.0)], bases=(Config,), frozen=True)
    assert changed(longer(3, 0.5)) == changed(Config(3, 0.5))
    assert changed(longer(3, 0.5, loss_weight=1.0)) != changed(Config(3, 0.5))


def test_a_default_that_changed_without_a_version_is_found(tmp_path: Path) -> None:
    made = {"stages": [{"config": {"needed": 3, "ratio": 0.3}}]}
    (tmp_path / "compress.json").write_text(json.dumps(made))
    stage: Any = SimpleNamespace(name="p", kind="prune", method="m", declared=Stage(version=1), config=Config(3))
    with pytest.raises(UserError, match=r"stages[.]p[.]ratio=0[.]25: .* made with 0[.]3: .* version in its STAGE"):
        _check_same(stage, tmp_path)
    made["stages"][0]["config"] = {"needed": 3, "ratio": 0.25}
    (tmp_path / "compress.json").write_text(json.dumps(made))
    _check_same(stage, tmp_path)
