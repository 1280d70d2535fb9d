"""Points at the same time in real processes, with shared work done once; grids that are killed and continued."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
pytestmark = pytest.mark.slow


def command(overrides: list[str], *more: str) -> list[str]:
    return [sys.executable, "-m", "compress", "-m", *overrides, *more]


def stages(out: Path) -> dict[str, list[dict[str, object]]]:
    """The stages of every point."""
    return {file.parent.name: json.loads(file.read_text())["stages"] for file in out.glob("*/report.json")}


@pytest.mark.parametrize(
    ("package", "launcher"),
    [
        ("hydra_plugins.hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        ("hydra_plugins.hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
        ("ray", ["hydra/launcher=ray", "hydra.launcher.init.num_cpus=2"]),
    ],
)
def test_points_at_the_same_time_share_their_stages(
    package: str, launcher: list[str], tiny_overrides: list[str], tmp_path: Path
) -> None:
    pytest.importorskip(package)
    grid = ["recipe=prune_distill_int8", "~stages.distill", "prune=magnitude", "stages.prune.ratio=0.5"]
    grid += ["quantize=int8,int4,nonsense", "out=out", "store=store"]
    done = subprocess.run(
        command(grid, *launcher, *tiny_overrides), cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True,
        timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "3 points: 2 computed, 0 from the store, 1 failed" in done.stdout
    found = stages(tmp_path / "out")
    assert {name: [s["cached"] for s in found[name]].count(False) for name in found} in (
        {"ratio=0.5,quantize=int8": 2, "ratio=0.5,quantize=int4": 1},
        {"ratio=0.5,quantize=int8": 1, "ratio=0.5,quantize=int4": 2},
        {"quantize=int8": 2, "quantize=int4": 1},
        {"quantize=int8": 1, "quantize=int4": 2},
    ), "the pruning is computed by one of the two"
    assert json.loads((tmp_path / "out/quantize=nonsense/failure.json").read_text())["exit_code"] == 2


def test_a_grid_killed_at_random_moments_ends_as_one_left_alone(tiny_overrides: list[str], tmp_path: Path) -> None:
    grid = ["recipe=prune_distill", "prune=magnitude", "stages.prune.ratio=0.25,0.5,0.75", "seed=0,1"]
    grid += ["stages.distill.steps=20", "stages.distill.save_every=2", "stages.distill.batch_size=4", *tiny_overrides]
    draw = random.Random(0)
    for _ in range(5):
        killed = subprocess.Popen(command(grid, "out=out", "store=store"), cwd=tmp_path, env=ENVIRONMENT)
        time.sleep(draw.uniform(10, 60))
        killed.kill()
        killed.wait()
    for name in ("", "whole-"):
        folders = [f"out={name}out", f"store={name}store"]
        assert subprocess.run(command(grid, *folders), cwd=tmp_path, env=ENVIRONMENT, check=False).returncode == 0
    found, whole = stages(tmp_path / "out"), stages(tmp_path / "whole-out")
    assert len(found) == 6 and found.keys() == whole.keys()
    for name in whole:
        for ours, theirs in zip(found[name], whole[name], strict=True):
            assert (ours["key"], ours["coverage"], ours["curves"]) == (
                theirs["key"], theirs["coverage"], theirs["curves"],
            )  # fmt: skip
            for file in ("unet/diffusion_pytorch_model.safetensors",):
                ends = [tmp_path / store / str(ours["key"]) / file for store in ("store", "whole-store")]
                assert ends[0].read_bytes() == ends[1].read_bytes()
    assert not any((tmp_path / "store/work").glob("*"))


def test_two_grids_that_overlap_neither_repeat_nor_corrupt(tiny_overrides: list[str], tmp_path: Path) -> None:
    grid = ["recipe=prune_distill", "prune=magnitude", "stages.distill.steps=4", "stages.distill.batch_size=4"]
    grid += [*tiny_overrides, "store=store"]
    both = [
        subprocess.Popen(command(grid, f"stages.prune.ratio={ratios}", f"out={name}"), cwd=tmp_path, env=ENVIRONMENT)
        for name, ratios in (("a", "0.25,0.5"), ("b", "0.5,0.25"))
    ]
    assert [process.wait(1800) for process in both] == [0, 0]
    made = [stage["key"] for name in "ab" for point in stages(tmp_path / name).values() for stage in point
            if not stage["cached"]]  # fmt: skip
    assert len(made) == len(set(made)) == 4
