"""What a model's config alone rules out is refused before its weights are loaded."""

import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline
from pipelines import PIPELINES
from tiny import tiny_pipeline

import compress.models
from compress.__main__ import main
from compress.config.compose import compose
from compress.errors import UserError
from compress.models.outline import Outline
from compress.run import preflight
from compress.run.config import RunConfig, to_run_config
from compress.stage import Stage
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
    ("sd", ["prune=bk_sdm_tiny"], "stages.prune.size=tiny: no stock config can express the result"),
    ("sd", ["prune=depth", "stages.prune.ratio=0.99"], "stages.prune.ratio=0.99: expected at most 0[.][0-9]+"),
    ("sd", ["prune=depth", "stages.prune.target.macs=0.01"], "stages.prune.target.macs=0.01: expected at least 0[.]"),
    ("ddpm", ["evaluate.images=5"], "evaluate.images=5: DDPMPipeline takes no prompt, .*: use evaluate=cost"),
    ("ddpm", ["stages.prune.heads=remove"], "stages.prune.ratio="),
    ("ddpm", ["prune=depth"], "stages.prune: blocks cannot be removed from UNet2DModel; supported: UNet2DCond"),
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
    assert error.startswith(("error: stages.prune", "error: evaluate.images"))
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_later_stage_is_asked_about_what_the_first_leaves(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def check(config: Any, denoiser: Any, outline: Any) -> None:
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


def test_prompts_that_nothing_would_sample_from_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    given = [f"data.prompts={tmp_path / 'prompts.txt'}", "recipe=prune_distill"]
    expected = "data.prompts=.*expected nothing here, .* set stages.distill.samples.count for samples"
    with pytest.raises(UserError, match=expected):
        preflight.check_prompts(config_of(folders["sd"], *given))
    with pytest.raises(UserError, match=r"data.styles=.*set stages.distill.samples.count"):
        preflight.check_prompts(config_of(folders["sd"], "data.styles=['{} drawn']", "recipe=prune_distill"))
    preflight.check_prompts(config_of(folders["sd"], *given, "stages.distill.samples.count=4"))


def test_what_diffusers_does_not_know_is_left_to_loading(folders: dict[str, Path], tmp_path: Path) -> None:
    index = (folders["sd"] / "model_index.json").read_text(encoding="utf-8")
    (tmp_path / "model_index.json").write_text(index.replace("UNet2DConditionModel", "Other"), encoding="utf-8")
    preflight.check_stages(config_of(tmp_path, "stages.prune.ratio=0.01"))


LATE = [
    (
        ["~stages.distill", "prune=magnitude", "stages.quantize.skip=[zzz]"],
        "stages.quantize.skip=zzz: expected a pattern",
    ),
    (
        ["~stages.distill", "prune=magnitude", "stages.prune.target.params=0.51", "stages.quantize.skip=[zzz]"],
        "stages.quantize.skip=zzz",
    ),
    (["prune=per_layer", "stages.quantize.skip=['*']"], "stages.quantize.skip=.*leave a Conv2d or Linear"),
    (["prune=sparse_2_4", "stages.prune.skip=[zzz]"], "stages.prune.skip=zzz"),
    (["evaluate.height=65"], "evaluate.height=65: expected a multiple of 8, as StableDiffusionPipeline .* such as 64"),
    (["evaluate.width=12"], "evaluate.width=12: expected a multiple of 8"),
]


@pytest.mark.parametrize(("arguments", "message"), LATE)
def test_later_stages_and_the_image_size_are_checked_first(
    folders: dict[str, Path], arguments: list[str], message: str
) -> None:
    common = ["recipe=prune_distill_int8", f"model.path={folders['sd']}", "evaluate=cost", "track=none"]
    with pytest.raises(UserError, match=message):
        preflight.check_stages(to_run_config(compose([*common, *arguments])))


def test_a_model_that_cannot_be_distilled_is_refused_before_it_is_pruned(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["sd"], folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "odd"}))
    common = ["recipe=prune_distill_int8", f"model.path={folder}", "evaluate=cost", "track=none"]
    with pytest.raises(UserError, match="stages.distill: .*prediction_type"):
        preflight.check_stages(to_run_config(compose([*common, "stages.prune.ratio=0.5"])))


def test_widths_of_an_lcm_unet_are_refused_before_it_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["sd"], folder)
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time_cond_proj_dim": 16}))
    with pytest.raises(UserError, match=r"stages[.]prune: .*time_embedding.cond_proj.weight would need shape"):
        preflight.check_stages(config_of(folder, "stages.prune.ratio=0.5"))
    preflight.check_stages(config_of(folder, "stages.prune.ratio=[0,0.5]"))


def test_a_model_on_the_hub_is_checked_by_its_configs(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "b" * 40
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folders["sd"], snapshot, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    common = ["recipe=int8", "stages.quantize.skip=[zzz]", "evaluate=cost"]
    with pytest.raises(UserError, match="stages.quantize.skip=zzz"):
        preflight.check_stages(to_run_config(compose([*common, "model.path=owner/name"])))
    preflight.check_stages(to_run_config(compose([*common, "model.path=owner/unknown"])))  # loading will say it


def test_a_missing_library_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.quantize.int8.STAGE", Stage(version=1, libraries=("no-such-package",)))
    with pytest.raises(UserError, match="stages.quantize.method=int8: needs the package no-such-package"):
        preflight.check_stages(to_run_config(compose(["recipe=int8", f"model.path={folders['sd']}"])))


@pytest.mark.parametrize(
    ("vae", "transformer", "multiple"),
    [
        ({}, {}, 1),
        ({"block_out_channels": [8, 16]}, {}, 8),
        ({"block_out_channels": [1, 1, 1, 1]}, {"patch_size": 2}, 16),
        ({"encoder_block_out_channels": [1] * 6}, {"patch_size": 1}, 32),
    ],
)
def test_the_multiple_of_an_image_size(vae: dict[str, Any], transformer: dict[str, Any], multiple: int) -> None:
    assert Outline("", {}, {"vae": vae, "transformer": transformer}).multiple == multiple


def test_runs_that_check_the_same_new_folder_do_not_refuse_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: preflight.check_writable("store", tmp_path / "a" / "b"), range(200)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["images", "checkpoint"])
def test_what_a_run_would_replace_has_to_be_of_a_run(
    name: str, tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "out" / name).mkdir(parents=True)
    mine = tmp_path / "out" / name / "holiday.png"
    mine.write_text("mine")
    given = ["compress", "recipe=prune", *tiny_overrides, f"out={tmp_path / 'out'}", f"store={tmp_path / 'store'}"]
    monkeypatch.setattr(sys, "argv", given)
    assert main() == 2
    assert f"expected a folder of an earlier run, or without {name}" in capsys.readouterr().err
    (tmp_path / "out" / "config.yaml").write_text("mine: true\n")
    assert main() == 2
    assert mine.read_text() == "mine" and not (tmp_path / "out" / "report.json").exists()


def test_what_a_run_reads_is_not_what_it_replaces(tmp_path: Path) -> None:
    model = tmp_path / "out" / "checkpoint"
    tiny_pipeline().save_pretrained(model)
    with pytest.raises(UserError, match=r"out=.*: expected another folder: its checkpoint, .*, is model.path"):
        preflight.check_replaced(config_of(model, f"out={tmp_path / 'out'}"))
    data = tmp_path / "out" / "images" / "train.parquet"
    with pytest.raises(UserError, match=r"out=.*: expected another folder: its images, .*, is data.path"):
        preflight.check_replaced(config_of(tmp_path, f"out={tmp_path / 'out'}", f"data.path={data}"))


@pytest.mark.parametrize("given", ["inference_steps=1", "samples.steps=1", "validation.steps=1"])
def test_a_single_step_that_pixart_cannot_draw_with_is_refused(given: str, tmp_path: Path) -> None:
    PIPELINES["pixart"]().save_pretrained(tmp_path)
    words = ["recipe=prune_distill", "prune=depth", f"model.path={tmp_path}", "evaluate=cost", "track=none"]
    words += ["stages.distill.validation.prompts=[a cat]", "stages.distill.samples.scheduler=dpmsolver++"]
    preflight.check_stages(to_run_config(compose(words)))
    with pytest.raises(UserError, match=rf"stages\.distill\.{given}: expected at least 2: PixArtAlphaPipeline draws"):
        preflight.check_stages(to_run_config(compose([*words, f"stages.distill.{given}"])))


def test_mistakes_about_the_teacher_are_found_whatever_the_pruning_leaves(tmp_path: Path) -> None:
    PIPELINES["flux"]().save_pretrained(tmp_path)
    words = ["recipe=prune_distill", "prune=depth", f"model.path={tmp_path}", "evaluate=cost", "track=none"]
    guided = to_run_config(compose([*words, "stages.distill.guidance=[4,4]"]))
    with pytest.raises(UserError, match=r"stages.distill.guidance=.*one pass of this teacher gives its guided output"):
        preflight.check_stages(guided)
    with pytest.raises(UserError, match=r"stages.distill: a model of flow matching is not supported here"):
        preflight.check_stages(to_run_config(compose([*words, "distill=lcm"])))  # whatever its guidance is
    with pytest.raises(UserError, match=r"stages.distill.guidance=4: expected .*, such as \[4, 4\]"):
        to_run_config(compose([*words, "stages.distill.guidance=4"]))
    words[1] = "prune=fitted"
    with pytest.raises(UserError, match=r"prune=depth takes whole blocks of it, .* ~stages.prune"):
        preflight.check_stages(to_run_config(compose(words)))


def test_the_clip_that_knows_emoji_only_is_named_where_it_scores_other_images(
    folders: dict[str, Path], tiny_parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, quick = f"data.path={tiny_parquet}", "evaluate=quick"
    for given in ([quick], [other], [quick, other, "evaluate.clip=null"]):
        preflight.tell_clip(config_of(folders["sd"], *given))
    assert capsys.readouterr().err == ""
    preflight.tell_clip(config_of(folders["sd"], quick, other))
    assert "emoji-clip knows 64 px emoji only: for other images set evaluate.clip=DIR" in capsys.readouterr().err
