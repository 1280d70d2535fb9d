"""A whole benchmark: what it writes and prints, and that it goes on where it was."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import compress.jobs.benchmark.process
from compress.config.compose import compose
from compress.errors import UserError
from compress.jobs.benchmark import benchmark
from compress.jobs.benchmark.job import to_job
from compress.jobs.benchmark.screen import print_end
from tests.evaluate.parts import tiny_clip

ROOT = Path(__file__).parents[3]
GRID = [
    "benchmark.images=4",
    "~benchmark.change",
    "~benchmark.schedulers",
    "~benchmark.combine",
    "+benchmark.change={dtype: [bf16], offload: [model], compile: [true]}",
    "+benchmark.schedulers={ddim: [20, 50]}",
]
Go = Callable[..., dict[str, Any]]


def random_inputs(task: Any) -> dict[str, Any]:
    """A row without any work: bf16 is quicker and a little different, compiling fails."""
    choices = task.choices
    if choices.offload != "none":
        return {"skipped": "there is nothing to offload to"}
    if choices.compile:
        return {"failed": "no compiler"}
    rng = np.random.default_rng(0 if choices.scheduler == "pndm" else choices.steps)
    images = rng.integers(0, 200, (len(task.prompts), 3, 16, 16)).astype(np.uint8)
    images += choices.dtype == "bf16"
    seconds = choices.steps * (0.01 if choices.dtype == "bf16" else 0.02)
    cost = {
        "latency_s": seconds, "latency_low_s": 0.99 * seconds, "latency_high_s": 1.01 * seconds, "latency_repeats": 4,
        "throughput": 1 / seconds, "peak_memory_bytes": 5e7, "memory_method": "made up",
    }  # fmt: skip
    found = {"cost": cost, "images": images, "truncated": False}
    return found | ({"others": 255 - images} if task.other_seeds else {})


@pytest.fixture
def go(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """Runs the benchmark with random rows; those measured are listed in ``go.measured``."""
    measured: list[Any] = []
    clip = tiny_clip(tmp_path / "clip")

    def counted(task: Any) -> dict[str, Any]:
        measured.append(task.choices)
        return random_inputs(task)

    monkeypatch.setattr(compress.jobs.benchmark.process, "measure_apart", counted)

    def run(*overrides: str) -> dict[str, Any]:
        measured.clear()
        where = [f"out={tmp_path / 'out'}", f"store={tmp_path / 'store'}"]
        usual = [override for override in tiny_overrides if not override.startswith(("track", "evaluate=cost"))]
        scored = [f"evaluate.clip={clip}", "evaluate.clip_name=tiny", "evaluate.bootstrap=50"]
        run.job = to_job(compose(["recipe=benchmark", *usual, *scored, *GRID, *where, *overrides]))  # type: ignore
        return benchmark(run.job)  # type: ignore[attr-defined]

    run.measured = measured  # type: ignore[attr-defined]
    return run


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["rows"]}


def test_rows_are_measured_compared_and_written(go: Go, tmp_path: Path) -> None:
    result = go("limit.psnr_db=30")
    rows = by_name(result)
    assert list(rows) == ["reference", "bf16", "model offload", "compiled", "DDIM 20", "DDIM 50"]
    assert [row["status"] for row in result["rows"]] == ["measured"] * 2 + ["skipped", "failed"] + ["measured"] * 2
    assert rows["compiled"]["reason"] == "no compiler"
    assert rows["bf16"]["metrics"]["psnr"]["value"] == pytest.approx(20 * np.log10(255))
    assert rows["DDIM 20"]["metrics"]["psnr"]["value"] < 15
    assert rows["DDIM 50"]["dominated_by"] == "DDIM 20" or rows["DDIM 50"]["dominated_by"] == "bf16"
    assert rows["bf16"]["dominated_by"] is None
    assert result["best"] == result["most_images"] == "bf16"
    assert "torch_dtype=torch.bfloat16" in result["code"]
    assert result["settings"]["resolution"] == "16x16"
    assert result["truncated"] is False
    assert 0 < result["noise_floor"]["psnr"]["value"] < 15
    assert result["noise_floor"]["psnr"]["n"] == result["noise_floor"]["clip_difference"]["n"] == 4

    out = tmp_path / "out"
    written = json.loads((out / "benchmark.json").read_text())
    assert written["rows"] == json.loads(json.dumps(result["rows"]))
    assert written["noise_floor"] == json.loads(json.dumps(result["noise_floor"]))
    assert {"best", "best_of", "code", "limit", "model", "environment", "prompts", "seconds", "settings"} <= set(
        written
    )
    report = (out / "report.md").read_text()
    assert "best: bf16 (fastest for one image at a time with at least 30 dB)" in report
    assert "Noise floor, the reference row with other noise: PSNR " in report
    assert "model offload: skipped, there is nothing to offload to" in report
    assert "| bf16 ★ | 0.5 [0.495, 0.505] | 2 | 50 | 48.1 [48.1, 48.1] |" in report
    for name in ("latency_quality.png", "memory_quality.png", "images.png"):
        assert f"(images/{name})" in report
        assert (out / "images" / name).stat().st_size > 5000


def test_a_second_benchmark_measures_only_what_is_new_or_could_not_be(go: Go) -> None:
    first = go()
    again = go()
    assert [choices.compile or choices.offload == "model" for choices in go.measured] == [True, True]  # type: ignore
    assert [row["cost"] for row in again["rows"]] == [row["cost"] for row in first["rows"]]
    assert again["noise_floor"] == first["noise_floor"]
    assert [row["metrics"] for row in again["rows"]] == [row["metrics"] for row in first["rows"]]
    assert [row.get("cached") for row in again["rows"]] == [True, True, False, False, True, True]
    go("benchmark.schedulers.ddim=[20, 30, 50]")
    assert [choices.steps for choices in go.measured] == [50, 50, 30]  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", ["seed=1", "benchmark.guidance=2", "benchmark.repeats=3", "benchmark.height=32"])
def test_what_decides_a_row_decides_its_place_in_the_store(go: Go, change: str) -> None:
    first = go()
    assert not {row["key"] for row in first["rows"]} & {row["key"] for row in go(change)["rows"]}


def test_an_interrupted_benchmark_goes_on(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(task: Any) -> dict[str, Any]:
        if task.choices.scheduler == "ddim":
            raise KeyboardInterrupt
        return random_inputs(task)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compress.jobs.benchmark.process, "measure_apart", interrupted)
        go()
    result = go()
    assert [row.get("cached") for row in result["rows"]] == [True, True, False, False, False, False]


def test_without_a_reference_row_there_is_no_benchmark(go: Go) -> None:
    with pytest.raises(UserError, match=r"benchmark\.reference: .*nothing to offload to"):
        go("benchmark.reference.offload=model")


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_the_table_fits_the_screen(go: Go, width: int) -> None:
    result = go("limit.memory_gb=4")
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_end(result, go.job, console)  # type: ignore[attr-defined]
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width or "torch_dtype" in text
    assert "…" not in text
    assert ("The screen is too narrow for" in text) == (width < 160)
    for part in (
        "DDIM 20",
        "0.4",
        "48.1",
        "compiled: failed, no compiler",
        "best: ",
        "at most 4 GB",
        "from_pretrained",
    ):
        assert part in text


def test_the_command_refuses_a_mistake_before_any_row(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.__main__ import main

    monkeypatch.chdir(tmp_path)
    for override, part in (
        ("model.path=/nowhere", "model.path=/nowhere: expected"),
        ("benchmark.images=1", "benchmark.images=1: expected"),
        ("benchmark=quik", "did you mean quick?"),
        ("evaluate.clip=/nowhere", "evaluate.clip"),
        ("device=cuda:99", "device=cuda:99"),
        ("out=/dev/null/out", "out=/dev/null/out: cannot be written"),
    ):
        usual = [o for o in tiny_overrides if o.partition("=")[0] not in (override.partition("=")[0], "evaluate")]
        monkeypatch.setattr(sys, "argv", ["compress", "recipe=benchmark", *usual, "evaluate.clip_name=x", override])
        assert main() == 2
        assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("DDPMPipeline", "takes no prompt"),
        ("StableDiffusionInpaintPipeline", "needs image and mask_image"),
        ("NoSuchPipeline", "which diffusers"),
    ],
)
def test_a_pipeline_that_does_not_draw_from_text_alone_is_refused(
    go: Go, tiny_model: Path, tmp_path: Path, kind: str, why: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    with pytest.raises(UserError, match=rf"model\.path=.*{kind}.* {why}"):
        go(f"model.path={folder}")
    assert go.measured == []  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_whole_way(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Once as a user starts it, with nothing replaced: every kind of choice on a tiny model."""
    settings = ["benchmark.images=4", "benchmark.repeats=2", "benchmark.reference.steps=3", "evaluate.clip=null"]
    settings.append("benchmark.slowest=100")  # three steps are so quick that chance would decide what takes too long
    usual = [override for override in tiny_overrides if not override.startswith("evaluate")]
    command = [sys.executable, "-m", "compress", "recipe=benchmark", *usual, *settings, "out=out", "store=store"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = by_name(json.loads((tmp_path / "out" / "benchmark.json").read_text()))
    assert {name for name, row in rows.items() if row["status"] == "skipped"} == {
        "model offload",
        "LCM 4",
        "VAE tiling",
    }
    assert {row["status"] for row in rows.values()} == {"measured", "skipped"}
    assert rows["compiled"]["metrics"]["psnr"]["value"] > 50
    assert rows["channels-last"]["metrics"]["psnr"]["value"] > 50
