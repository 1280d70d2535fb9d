"""A run on data and weights as users have them: images with text files beside them, fp16 variant files alone."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from compress.__main__ import main


@pytest.mark.slow
def test_variant_files_and_a_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "fp16", variant="fp16")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        pixels = rng.integers(0, 256, (20, 24, 4), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text(f"a cat {index}")
    (tmp_path / "images" / "3.png").write_bytes(b"")
    arguments = [
        "recipe=int8", "model.path=fp16", "model.variant=fp16", "data.path=images", "track=none", "device=cpu",
        "evaluate.images=5", "evaluate.grid=0", "evaluate.steps=1", "evaluate.latency_repeats=1", "out=out",
        "store=store", "evaluate.noise_floor=false", "evaluate.bootstrap=10", "evaluate.set_bootstrap=10",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    assert main() == 2
    assert "1 of 8 images cannot be used (3.png: no image of a known format)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    sys.argv.append("data.on_error=skip")
    assert main() == 0
    assert "1 of 8 images of the data are skipped (3.png: no image of a known format)" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {key: report["data"][key] for key in ("path", "examples", "skipped")} == {
        "path": "images", "examples": 7, "skipped": 1,
    }  # fmt: skip
    assert report["teacher"]["metrics"]["fid"]["n_reference"] == 7
    assert "compared with 7 of the run's own training images" in (tmp_path / "out" / "report.md").read_text()
    assert set(report["teacher"]["cost"]["bytes_by_dtype"]) == {"F16"}
