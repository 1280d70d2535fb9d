"""Zeros are in the report of a run, survive its distillation, and are known to runs that start from its checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from compress.config.compose import compose
from compress.evaluate.cost import count_zeros
from compress.run.config import to_run_config
from compress.run.recipe import run_recipe
from compress.store.checkpoint import read_info
from tests.run.test_run import quick_evaluate

QUICK = ["recipe=prune_distill", "stages.distill.steps=2", "stages.distill.batch_size=4"]


def measured(pipeline: Any, data: Any, config: Any, folder: Path, **more: Any) -> Any:
    """The quick evaluation, with zeros."""
    found = quick_evaluate(pipeline, data, config, folder, **more)
    if more["cost_of"] is not None:
        found.cost.update(count_zeros(pipeline.unet, more["cost_of"] / "unet"))
    return found


def test_zeros_outlast_the_run_that_made_them(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.run.work.evaluate", measured)

    def go(out: str, *overrides: str) -> dict[str, Any]:
        folders = [f"out={tmp_path / out}", f"store={tmp_path / 'store'}"]
        run_recipe(to_run_config(compose([*QUICK, *tiny_overrides, *folders, *overrides])))
        return json.loads((tmp_path / out / "report.json").read_text())

    first = go("first", "prune=sparse_2_4")
    prune, distill = (stage["cost"] for stage in first["stages"])
    assert prune["sparsity"] == distill["sparsity"] == pytest.approx(0.49, abs=0.01)
    assert prune["sparse_bytes"] == pytest.approx(distill["sparse_bytes"], rel=0.01)  # biases are zero no longer
    assert distill["sparse_bytes"] < 0.6 * distill["params"] * 4
    assert prune["sparsity_2_4"] == distill["sparsity_2_4"] > 0.95
    assert "zeros (%)" in (tmp_path / "first" / "report.md").read_text()
    assert first["teacher"]["cost"]["sparse_bytes"] is None

    narrowed = go(
        "second", f"model.path={tmp_path / 'first' / 'checkpoint'}", "prune=magnitude", "stages.prune.ratio=[0,0.25]"
    )
    prune, distill = (stage["cost"] for stage in narrowed["stages"])
    assert distill["sparsity"] == prune["sparsity"] > 0.4
    info = read_info(tmp_path / "second" / "checkpoint")
    assert [stage["method"] for stage in info["before"]] == ["sparse", "features"]
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "second" / "checkpoint" / "unet")
    assert unet.config.block_out_channels == [32, 48]
    assert info["stages"][1]["details"]["zeros_kept"] > 0.4 * unet.num_parameters()
