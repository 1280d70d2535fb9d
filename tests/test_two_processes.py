"""Two processes find and train what one does: all in one start of both, since a start takes as long as the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distill.worker import distilled
from tests.evaluate.metrics.results import flat, results, same
from tests.evaluate.worker import check_alike, evaluated_alone
from tests.two_processes import __file__ as WORKER

ROOT = Path(__file__).parents[1]


def test_two_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # as the worker; a fixture of all tests sets it back
    alone = evaluated_alone(tmp_path, monkeypatch)
    # Without --multi_gpu, `accelerate launch` starts a single process where there is no GPU.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *options, WORKER, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [json.loads((tmp_path / f"found.{rank}.json").read_text()) for rank in (0, 1)]
    assert [found["processes"] for found in both] == [2, 2]
    assert [found["heard"] for found in both] == ["NaN in process 1"] * 2  # what fails in one process ends all

    expected = flat(results(0, 1, 40, torch.arange(40), 0))
    for found in both:
        for metrics in found["metrics"]:
            same(flat(metrics), expected)
    check_alike(tmp_path, alone, [found["evaluated"] for found in both])

    pipeline, report = distilled(tmp_path / "undisturbed")
    first, second = (load_file(tmp_path / f"weights.{rank}.safetensors") for rank in (0, 1))
    weights = pipeline.unet.state_dict()
    assert first.keys() == second.keys() == weights.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        torch.testing.assert_close(weight, weights[name], atol=3e-5, rtol=1e-3)
    for name, curve in report.curves.items():
        assert [value for _, value in both[0]["curves"][name]] == pytest.approx([v for _, v in curve], abs=1e-5)
