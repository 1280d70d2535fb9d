"""Every architecture goes the whole way by the command line, or is refused at the start by one message."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, PNDMScheduler, StableDiffusionPipeline
from pipelines import PIPELINES, SD_BETAS, SD_STEPS, pixart, sample, text_to_image, unet

import compress.models
from compress.__main__ import main

Command = Callable[..., tuple[int, str]]

# How a quarter of the parameters goes; inpainting cannot be distilled.
PRUNE = {
    "sd 1.x": ["prune=magnitude"],
    "sd 2.x v": ["prune=taylor", "stages.prune.calibration.examples=4"],
    "sdxl": ["prune=magnitude"],
    "inpainting": ["prune=magnitude", "~stages.distill"],
    "ddpm": ["prune=magnitude"],
}
DEPTH = ["prune=depth", "stages.prune.calibration.examples=1", "stages.prune.calibration.steps=2"]
DRAW = [name for name in PIPELINES if name not in ("ddpm", "inpainting")]
OFTEN_RUN = ("sd 1.x", "sd 2.x v", "lcm", "pixart sigma", "sana", "inpainting", "ddpm")  # others are of their kind
SIZE = {"flux": ["evaluate.height=32", "evaluate.width=32"]}  # Flux draws 128 x 128 latents where no size is given


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, saved when first asked for."""
    root = tmp_path_factory.mktemp("architectures")

    def folder(name: str) -> Path:
        found = root / name.replace(" ", "_")
        if not found.exists():
            PIPELINES[name]().save_pretrained(found)
        return found

    return folder


@pytest.fixture
def command(
    tiny_parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs the command line; returns its exit code and what it wrote to stderr."""

    def run(model: Path, *words: str) -> tuple[int, str]:
        common = [
            f"model.path={model}",
            f"data.path={tiny_parquet}",
            "data.reference=null",
            "track=none",
            "device=cpu",
            "engine=null",
        ]
        folders = [f"out={tmp_path / 'out'}", f"store={tmp_path / 'store'}"]
        monkeypatch.setattr(sys, "argv", ["compress", *common, *folders, *words])
        return main(), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in OFTEN_RUN else ()) for name in PIPELINES]
)
def test_prune_distill_int8_and_reload(name: str, folders: Callable[[str], Path], command: Command, tmp_path: Path):
    stages = [*PRUNE.get(name, DEPTH), "stages.prune.ratio=0.25"]
    if "~stages.distill" not in stages:
        stages += ["stages.distill.steps=1", "stages.distill.batch_size=2", "stages.distill.max_examples=2"]
        stages += [f"stages.distill.losses.{loss}=0.1" for loss in ("bk_sdm_features", "attention")]
    stages += ["stages.quantize.calibration.examples=1", "stages.quantize.calibration.steps=2"]
    cost = ["evaluate=cost", "evaluate.latency_repeats=1", "evaluate.steps=2", *SIZE.get(name, [])]
    code, error = command(folders(name), "recipe=prune_distill_int8", *stages, *cost)
    assert code == 0, error

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for stage in report["stages"]:
        assert 0 < stage["coverage"]["params"] <= 1 and 0 < stage["coverage"]["macs"] <= 1
    info = json.loads((tmp_path / "out" / "checkpoint" / "compress.json").read_text())
    for details in (stage["details"] for stage in info["stages"] if stage["kind"] == "distill"):
        assert {"bk_sdm_features_loss", "attention_loss"} < details["final"].keys()
        # A plain UNet's attention adds its result to a residual stream, of which only blocks say what they kept.
        how = {**dict.fromkeys(PRUNE, {"kept"}), "ddpm": {"projection"}}.get(name, {"same"})
        assert set(details["attention"].values()) == how
    pruned, quantized = report["stages"][0]["cost"], report["stages"][-1]["cost"]
    assert pruned["params"] < 0.8 * report["teacher"]["cost"]["params"]
    assert quantized["bytes"] < 0.7 * pruned["bytes"]

    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out" / "checkpoint", torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert np.isfinite(sample(loaded, name)).all()


NO_UNET = r"stages\.prune: .* needs a pipeline with a UNet2DConditionModel or UNet2DModel; this one has"
NO_LATENTS = (
    r"stages\.distill: StableDiffusionInpaintPipeline: the denoiser takes 9 channels and its autoencoder gives 4"
)
REFUSED: list[tuple[str, list[str], str]] = [
    ("inpainting", ["recipe=prune_distill", "evaluate=cost"], NO_LATENTS),
    ("inpainting", ["recipe=prune_distill", "prune=depth", "evaluate=cost"], NO_LATENTS),
    ("inpainting", ["recipe=int8"], r"evaluate\.images=256: .* needs image and mask_image besides the prompt"),
    ("ddpm", ["recipe=int8"], r"evaluate\.images=256: DDPMPipeline takes no prompt"),
    ("ddpm", ["recipe=prune", "prune=depth", "evaluate=cost"], r"stages\.prune: blocks .* UNet2DModel"),
    ("ddpm", ["recipe=prune", "prune=bk_sdm_small", "evaluate=cost"], r"stages\.prune: BK-SDM .* UNet2DModel"),
    ("lcm", ["recipe=prune", "stages.prune.ratio=0.5", "evaluate=cost"], r"a ratio of 0 in the list"),
    ("pixart", ["recipe=prune", "evaluate=cost"], NO_UNET),
    ("sana", ["recipe=prune", "prune=per_layer", "evaluate=cost"], NO_UNET),
    ("sd3", ["recipe=prune", "prune=low_rank", "evaluate=cost"], r"stages\.prune: .* SD3Transformer2DModel"),
    ("flux", ["recipe=prune", "prune=taylor", "evaluate=cost"], NO_UNET),
    ("flux", ["recipe=prune", "prune=depth", "stages.prune.ratio=0.99", "evaluate=cost"], r"ratio=0\.99: .* at most"),
    ("pixart", ["recipe=int8", "evaluate=cost", "evaluate.steps=1"], r"evaluate\.steps=1: expected at least 2"),
    (
        "pixart",
        ["recipe=prune", "prune=depth", "stages.prune.calibration.steps=1", "evaluate=cost"],
        r"stages\.prune\.calibration\.steps=1: expected at least 2",
    ),
]


@pytest.mark.parametrize(("name", "words", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_before_a_weight_is_loaded(
    name: str,
    words: list[str],
    message: str,
    folders: Callable[[str], Path],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compress.models, "load_teacher", lambda *_: pytest.fail("weights were loaded"))
    code, error = command(folders(name), *words)
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        ("StableDiffusionImg2ImgPipeline", "image"),
        ("StableDiffusionGLIGENPipeline", "gligen_phrases and gligen_boxes"),
        ("DiTPipeline", "class_labels"),
    ],
)
def test_a_pipeline_that_needs_more_than_a_prompt_is_refused(
    kind: str, needs: str, tiny_model: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress.models, "load_teacher", lambda *_: pytest.fail("weights were loaded"))
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    for words in (["evaluate=cost"], []):
        code, error = command(model, "recipe=prune_distill_int8", *words)
        assert code == 2
        assert f"error: model.path={model}: {kind} needs {needs} besides the prompt: expected " in error


def test_a_denoiser_that_its_pipeline_does_not_serve_is_refused(command: Command, tmp_path: Path) -> None:
    scheduler = PNDMScheduler(**SD_BETAS, **SD_STEPS, skip_prk_steps=True)
    text_to_image(StableDiffusionPipeline, unet("sd 1.x", num_class_embeds=4), scheduler).save_pretrained(
        tmp_path / "m"
    )
    code, error = command(tmp_path / "m", "recipe=int8", "evaluate=cost")
    assert code == 2
    assert "error: StableDiffusionPipeline does not give its denoiser all it needs: class_labels" in error


def small_pixart() -> Any:
    """Of a latent size that is in no list of sizes of the stock pipeline."""
    pipeline = pixart()
    config = {**pipeline.transformer.config, "sample_size": 8}
    pipeline.register_modules(transformer=PixArtTransformer2DModel.from_config(config).eval())
    return pipeline


IMAGES = ["images=5", "steps=2", "grid=1", "noise_floor=false", "bootstrap=10", "set_bootstrap=10", "latency_repeats=1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DRAW, "pixart 8"])
def test_images_are_measured(name: str, folders: Callable[[str], Path], command: Command, tmp_path: Path) -> None:
    if name == "pixart 8":
        small_pixart().save_pretrained(tmp_path / "model")
    model = tmp_path / "model" if name == "pixart 8" else folders(name)
    settings = [f"evaluate.{word}" for word in IMAGES]
    code, error = command(model, "recipe=int8", "evaluate=quick", *settings, *SIZE.get(name, []))
    assert code == 0, error
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stages"][0]["metrics"]["psnr"]["value"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAW)
def test_the_benchmark_measures_it(name: str, folders: Callable[[str], Path], command: Command, tmp_path: Path) -> None:
    grid = ["~benchmark.change", "~benchmark.schedulers", "benchmark.combine=[{batch_size: 2}]"]
    grid += ["benchmark.reference.scheduler=checkpoint", "benchmark.reference.steps=2"]
    grid += ["benchmark.images=4", "benchmark.repeats=2"]
    if name == "flux":
        grid += ["benchmark.height=32", "benchmark.width=32"]
    code, error = command(folders(name), "recipe=benchmark", *grid)
    assert code == 0, error
    assert (tmp_path / "out" / "report.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_int8_in_a_fresh_process(name: str, folders: Callable[[str], Path], command: Command, tmp_path: Path) -> None:
    cost = ["evaluate=cost", "evaluate.latency_repeats=1", "evaluate.steps=2", *SIZE.get(name, [])]
    assert command(folders(name), "recipe=int8", *cost)[0] == 0
    out = tmp_path / "out" / "checkpoint"
    script = (
        "import sys, numpy, torch; from diffusers import DiffusionPipeline\n"
        f"sys.path[:0] = {[path for path in sys.path if 'tests' in path] + [str(Path(__file__).parent.parent)]}\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)\n"
        "from pipelines import sample\n"
        "numpy.save(sys.argv[3], sample(pipeline, sys.argv[2]))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(out), name, str(tmp_path / "image.npy")], check=True)
    loaded = DiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    assert np.abs(np.load(tmp_path / "image.npy") - sample(loaded, name)).max() <= 1e-5
