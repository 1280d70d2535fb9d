"""Sensitivity: dead blocks, dead heads and twins are seen as worth nothing, and the job's files."""

import json
from pathlib import Path

import pytest
import torch
from calibrated import calibration_of, small_unet
from PIL import Image
from tiny import tiny_unet
from widen import widen

from compress.config.compose import compose
from compress.errors import UserError
from compress.jobs.sensitivity import run_job
from compress.prune.importance import make_scorer, parse
from compress.prune.sensitivity.blocks import inner_groups, measure_blocks, measure_heads, unread
from compress.prune.sensitivity.error import MOST, UnchangedPrediction
from compress.prune.sensitivity.levels import narrow_levels
from compress.prune.width import Config, pruner

L2 = make_scorer(parse("l2"), None, 0)


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.channels.time_embedding.ITERATIONS", 3)


def test_error_of_a_known_change() -> None:
    unet = tiny_unet(widths=(16, 32))
    reference = UnchangedPrediction(calibration_of(unet, 4, 3))
    assert reference.error(unet).relative == 0
    assert reference.error(unet).psnr == MOST
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.9)
        unet.conv_out.bias.mul_(0.9)
    assert reference.error(unet).relative == pytest.approx(0.1, rel=1e-4)


def test_twins_are_worth_nothing() -> None:
    torch.manual_seed(1)
    wide, _ = widen(small_unet())
    reference = UnchangedPrediction(calibration_of(wide, 2, 2))
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    groups = inner_groups(wide)
    assert "mid_block.attentions.0" in groups
    assert "down_blocks.0.resnets.0" in groups
    found = measure_blocks(wide, groups, L2, reference, [0.5, 0.75])
    for name, points in found.items():
        assert points[0.5].psnr > 90, name
        assert points[0.75].psnr < points[0.5].psnr - 20, name
    assert all(torch.equal(tensor, before[name]) for name, tensor in wide.state_dict().items())


def test_a_dead_head_is_found() -> None:
    unet = tiny_unet(widths=(16, 32), heads=4)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    with torch.no_grad():
        unet.get_submodule(name).to_out[0].weight[:, 8:12] = 0  # the third of four
    reference = UnchangedPrediction(calibration_of(unet, 2, 2))
    found = measure_heads(unet, inner_groups(unet), L2, reference, [0.1, 0.25, 0.5])
    assert found[name][0.25].psnr == MOST
    assert found[name][0.5].psnr < 100
    assert all(list(points) == [0.25, 0.5] for points in found.values())


def test_readers_are_deaf_inside_and_hear_again_even_after_errors() -> None:
    unet = tiny_unet(widths=(16, 32))
    name = "down_blocks.0.resnets.0"
    (group,) = inner_groups(unet)[name]
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[3] = False
    before = unet.get_parameter(f"{name}.conv2.weight").clone()
    with pytest.raises(KeyError, match="stop"), unread(unet, [(group, keep)]):
        assert unet.get_parameter(f"{name}.conv2.weight")[:, 3].abs().max() == 0
        assert torch.equal(unet.get_parameter(f"{name}.conv2.weight")[:, 4], before[:, 4])
        raise KeyError("stop")
    assert torch.equal(unet.get_parameter(f"{name}.conv2.weight"), before)


def test_levels_are_narrowed_one_by_one() -> None:
    unet = tiny_unet(widths=(16, 32))
    reference = UnchangedPrediction(calibration_of(unet, 2, 2))
    found = narrow_levels((16, 32), pruner(unet, Config(), L2), reference, [0.25, 0.5, 0.01])
    # 16 channels in 8 groups can lose a half alone; a quarter of them is nearest to none.
    assert [(one.level, one.width) for one in found] == [(0, 8), (1, 24)]
    assert all(one.error.relative > 0 for one in found)
    with pytest.raises(UserError, match="expected ratios that leave fewer channels"):
        narrow_levels((16, 32), pruner(unet, Config(), L2), reference, [0.01])


def test_the_job_writes_a_plan_and_a_heat_map(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["stages.prune.calibration.examples=2", "stages.prune.sensitivity.ratios=[0.5]", f"out={tmp_path}"]
    run_job(compose(["recipe=prune", *tiny_overrides, *overrides, "stages.prune.target.macs=0.5"]))
    result = json.loads((tmp_path / "sensitivity.json").read_text())
    assert [row["name"] for row in result["levels"]] == ["level 0 (32 wide)", "level 1 (64 wide)"]
    assert result["plan"]["left"] == pytest.approx(0.5, rel=0.02)
    assert result["plan"]["measured"]["relative"] > 0
    assert {row["name"] for row in result["heads"]} >= {"mid_block.attentions.0.transformer_blocks.0.attn2"}
    assert Image.open(tmp_path / "heat_map.png").size[0] > 500
    assert (tmp_path / "config.yaml").exists()
    assert "recipe=prune stages.prune.ratio=[" in capsys.readouterr().out


def test_the_job_wants_one_stage_and_a_target(tiny_overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"prune \(prune=width\), quantize \(quantize=w8a8\)"):
        run_job(compose(["recipe=prune_distill_int8", *tiny_overrides, "~stages.distill"]))
    with pytest.raises(UserError, match=r"stages\.prune\.target=null: expected a share of params, .* or latency"):
        run_job(compose(["recipe=prune", *tiny_overrides]))
