"""What is kept of an ablation."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tools.results import keep, main


def metric(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1, "n": 2}


def test_numbers_tables_and_a_chart_are_kept_without_what_is_large(tmp_path: Path) -> None:
    runs = [
        {
            "name": f"bits=4, seed={seed}",
            "seed": seed,
            "folder": "/x",
            "config": {"a": 1},
            "metrics": {"fid": metric(100 + seed / 3)},
        }
        for seed in (0, 1)
    ]
    found = {"points": [{"name": "bits=4", "metrics": {"fid": metric(100.16666666)}}], "runs": runs, "fronts": []}
    (tmp_path / "points.json").write_text(json.dumps(found))
    (tmp_path / "report.md").write_text("a table")
    keep(tmp_path, tmp_path / "kept")
    kept = json.loads((tmp_path / "kept" / "points.json").read_text())
    assert kept["points"][0]["metrics"]["fid"]["value"] == 100.167
    assert [run["seed"] for run in kept["runs"]] == [0, 1] and not any(
        {"config", "folder"} & run.keys() for run in kept["runs"]
    )
    assert (tmp_path / "kept" / "report.md").read_text() == "a table"
    with Image.open(tmp_path / "kept" / "quality.png") as image:
        assert image.width > 300


def test_an_unknown_ablation_is_named_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bits", "seed=0"]) == 2
    assert "bits_ptq_qat" in capsys.readouterr().err
