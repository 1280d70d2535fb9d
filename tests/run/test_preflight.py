"""What a model's config alone rules out is refused before its weights are loaded."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline
from tiny import tiny_pipeline

import compress.models
from compress.__main__ import main
from compress.config.compose import compose
from compress.run import preflight
from compress.run.config import RunConfig, to_run_config
from tests.prune.architectures import random_unet


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline of Stable Diffusion's architecture and one that draws without a prompt."""
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(root / "sd")
    DDPMPipeline(random_unet("ddpm"), DDPMScheduler()).save_pretrained(root / "ddpm")
    return {name: root / name for name in ("sd", "ddpm")}


def config_of(folder: Path, *arguments: str) -> RunConfig:
    return to_run_config(compose(["recipe=prune", f"model.path={folder}", "evaluate=cost", "track=none", *arguments]))


REFUSED = [
    ("sd", ["stages.prune.ratio=0.01"], "stages.prune.ratio=.*the nearest that leaves fewer channels is [[]"),
    ("sd", ["stages.prune.ratio=[0.5]"], "stages.prune.ratio=.*2: one for each level [(]of widths 32, 64[)]"),
    ("sd", ["stages.prune.target.macs=0.01"], "stages.prune.target.macs=0.01: no widths .* nearest: 0"),
    ("sd", ["prune=bk_sdm_base"], "stages.prune.size=base: this UNet has nothing that BK-SDM removes"),
    ("sd", ["prune=bk_sdm_tiny"], "stages.prune.size=tiny: no stock config can express that"),
    ("sd", ["prune=depth", "stages.prune.ratio=0.99"], "stages.prune.ratio=0.99: expected at most 0[.][0-9]+"),
    ("sd", ["prune=depth", "stages.prune.target.macs=0.01"], "stages.prune.target.macs=0.01: expected at least 0[.]"),
    ("ddpm", ["stages.prune.heads=remove"], "stages.prune.ratio="),
    ("ddpm", ["prune=depth"], "stages.prune: blocks cannot be removed from UNet2DModel: known are UNet2DCond"),
    ("ddpm", ["prune=bk_sdm_small"], "stages.prune: BK-SDM is an architecture of UNet2DConditionModel; .* UNet2DModel"),
]


@pytest.mark.parametrize(("model", "arguments", "message"), REFUSED)
def test_the_impossible_is_refused_before_weights_are_loaded(
    model: str,
    arguments: list[str],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.chdir(tmp_path)
    for owner, name in ((compress.models, "load_teacher"), (StableDiffusionPipeline, "from_pretrained")):
        monkeypatch.setattr(owner, name, loaded)
    common = ["recipe=prune", f"model.path={folders[model]}", "evaluate=cost", "track=none", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["compress", *common, *arguments])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: stages.prune")
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_later_stage_is_asked_about_what_the_first_leaves(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def check(config: Any, denoiser: Any) -> None:
        seen.append(denoiser)

    monkeypatch.setattr("compress.distill.features.check", check, raising=False)
    arguments = ["recipe=prune_distill", f"model.path={folders['sd']}", "stages.prune.ratio=0.5"]
    preflight.check_stages(to_run_config(compose(arguments)))
    assert [tuple(denoiser.config.block_out_channels) for denoiser in seen] == [(16, 32)]
    assert {parameter.device.type for parameter in seen[0].parameters()} == {"meta"}


@pytest.mark.parametrize(
    "arguments", [[], ["stages.prune.target.params=0.51"], ["prune=bk_sdm_small"], ["prune=depth"]]
)
def test_what_can_be_done_passes(folders: dict[str, Path], arguments: list[str]) -> None:
    preflight.check_stages(config_of(folders["sd"], *arguments))


def test_what_diffusers_does_not_know_is_left_to_loading(folders: dict[str, Path], tmp_path: Path) -> None:
    index = (folders["sd"] / "model_index.json").read_text(encoding="utf-8")
    (tmp_path / "model_index.json").write_text(index.replace("UNet2DConditionModel", "Other"), encoding="utf-8")
    preflight.check_stages(config_of(tmp_path, "stages.prune.ratio=0.01"))
