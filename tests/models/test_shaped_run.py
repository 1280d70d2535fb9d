"""A whole run whose stages hand on a UNet with shaped layers: pruned, distilled, quantized, and begun again from it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.__main__ import main
from compress.config.compose import compose
from compress.errors import UserError
from compress.evaluate import cost
from compress.evaluate.cost.memory import peak_memory
from compress.models.compressed_model import ShapedUNet2DConditionModel
from compress.models.inputs import predict, small_inputs
from compress.run import preflight
from compress.run.config import to_run_config
from compress.store.checkpoint import load_checkpoint, read_info
from tests.tiny import tiny_pipeline

FLAG = "trust_remote_code=True"


@pytest.mark.slow
def test_prune_distill_int8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[Path] = []

    def peak_once(folder: Path, *arguments: Any) -> dict[str, Any]:
        """A process for each stage takes seconds: the first shaped one stands for all."""
        if (folder / "unet" / "compressed_model.py").is_file() and not measured:
            measured.append(folder)
            return peak_memory(folder, *arguments)
        return {"peak_memory_bytes": 1, "method": "none"}

    monkeypatch.setattr(cost, "peak_memory", peak_once)
    prune = [*tiny_overrides, "prune=low_rank", "stages.prune.target.params=0.8"]
    train = ["stages.distill.steps=2", "stages.distill.batch_size=2"]
    out = tmp_path / "out"
    arguments = ["recipe=prune_distill_int8", *prune, *train, f"out={out}", f"store={tmp_path / 'store'}"]
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    assert main() == 0
    printed = capsys.readouterr().out
    assert FLAG in printed and "carries unet/compressed_model.py" in printed
    report = json.loads((out / "report.json").read_text())
    assert [stage["model_file"] for stage in report["stages"]] == ["unet/compressed_model.py"] * 3
    assert "prune, distill, quantize: a stock config cannot express these layers" in (out / "report.md").read_text()
    card = (out / "checkpoint" / "README.md").read_text()
    assert FLAG in card and "stock diffusers classes" not in card
    assert read_info(out / "checkpoint")["model_file"] == "unet/compressed_model.py"

    pruned, distilled, quantized = (load_checkpoint(Path(stage["checkpoint"])).unet for stage in report["stages"])
    assert type(quantized) is type(pruned) is ShapedUNet2DConditionModel
    assert pruned.num_parameters() == pytest.approx(0.8 * tiny_pipeline().unet.num_parameters(), rel=0.02)
    params = [stage["cost"]["params"] for stage in report["stages"]]
    assert params == [pruned.num_parameters()] * 3
    before, after = dict(pruned.named_parameters()), dict(distilled.named_parameters())
    name = next(name for name in before if name.endswith(".reduce.weight"))
    assert not torch.equal(before[name], after[name])  # the products were trained as products
    inputs = small_inputs(distilled)
    expected = predict(distilled, inputs)
    assert 0 < (predict(quantized, inputs) - expected).norm() < 0.05 * expected.norm()

    assert measured == [Path(report["stages"][0]["checkpoint"])]
    assert report["stages"][0]["cost"]["peak_memory_bytes"] > 1

    # A checkpoint with a model file is a teacher like any other, also where no weight is loaded.
    again = ["recipe=prune", *prune, f"model.path={measured[0]}"]
    preflight.check_stages(to_run_config(compose(again)))
    with pytest.raises(UserError, match=r"stages\.prune\.target\.params=0\.01: expected at least 0"):
        preflight.check_stages(to_run_config(compose([*again, "stages.prune.target.params=0.01"])))
    with pytest.raises(UserError, match="its layers have individual shapes"):
        preflight.check_stages(to_run_config(compose([*tiny_overrides, "recipe=prune", f"model.path={measured[0]}"])))
