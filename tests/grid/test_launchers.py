"""Points at the same time in real processes, with shared work done once; grids that are killed and continued."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FORKED = Path(__file__).with_name("forked.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
ENVIRONMENT |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
pytestmark = pytest.mark.slow


def command(overrides: list[str], *more: str) -> list[str]:
    return [sys.executable, "-m", "compress", "-m", *overrides, *more]


def launched(grid: list[str], overrides: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The ended process of a grid that was started in a folder."""
    line = command(grid, *overrides)
    return subprocess.run(line, cwd=folder, env=ENVIRONMENT, text=True, capture_output=True, timeout=1800, check=False)


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
    grid = ["recipe=prune_distill_int8", "~stages.distill", "prune=unstructured"]
    grid += ["quantize=int8,int4,nonsense", "out=out", "store=store"]
    done = launched(grid, [*launcher, *tiny_overrides], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "3 points: 2 computed, 0 from the store, 1 failed" in done.stdout
    found = stages(tmp_path / "out")
    assert {name: [s["cached"] for s in found[name]].count(False) for name in found} in (
        {"quantize=int8": 2, "quantize=int4": 1},
        {"quantize=int8": 1, "quantize=int4": 2},
    ), "the pruning is computed by one of the two"
    assert json.loads((tmp_path / "out/quantize=nonsense/failure.json").read_text())["exit_code"] == 2


KILLER = """
import os
from dataclasses import dataclass

from compress.stage import Stage, StageReport

STAGE = Stage(version=1, tag="killed")


@dataclass(frozen=True)
class Config:
    kill: bool


def run(pipeline, config, context):
    if config.kill:
        os.kill(os.getpid(), 9)
    pipeline.unet.conv_in.weight.data *= 0.5
    return StageReport(coverage={"params": 0.01, "macs": None, "modules": 1, "skipped": {}})
"""


@pytest.mark.parametrize(
    ("package", "launcher"),
    [
        ("hydra_plugins.hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
        ("ray", ["hydra/launcher=ray", "hydra.launcher.init.num_cpus=2", "+hydra.launcher.remote.max_retries=0"]),
    ],
)
def test_a_process_that_is_lost_costs_its_point_alone(
    package: str, launcher: list[str], tiny_overrides: list[str], tmp_path: Path
) -> None:
    pytest.importorskip(package)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "killer.py").write_text(KILLER)
    grid = ["recipe=prune", "~stages.prune", "+stages.last={kind: killed, method: own.killer, kill: false}"]
    grid += ["stages.last.kill=true,false", "out=out", "store=store"]
    done = launched(grid, [*launcher, *tiny_overrides], tmp_path)
    assert done.returncode == 1, done.stderr
    assert "2 points: 1 computed, 0 from the store, 1 failed" in done.stdout, done.stdout + done.stderr
    assert list(stages(tmp_path / "out")) == ["kill=False"]
    assert json.loads((tmp_path / "out/kill=True/failure.json").read_text())["exit_code"] == 1
    assert (tmp_path / "out" / "report.html").is_file()


def test_grids_that_are_killed_and_grids_that_overlap_end_as_one_left_alone(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    shared = [*tiny_overrides, "prune=unstructured", "stages.distill.steps=2", "stages.distill.batch_size=2"]
    shared += ["stages.distill.teacher_engine=eager"]  # the threads of OpenVINO do not survive a fork
    grid = ["recipe=prune_distill_int8", "stages.distill.save_every=1", *shared]
    grid += ["stages.prune.sparsity=0.3,0.5,0.7", "quantize=int8,int4"]

    def run(out: str, kill_at: float | None = None) -> list[dict[str, Any]]:
        return [{"arguments": [*grid, f"out={out}", f"store={out}-store"], "kill_at": kill_at}]

    draw = random.Random(0)
    killed = [run("out", draw.uniform(0.01, 0.15)) for _ in range(5)]
    pair = [
        {"arguments": ["recipe=prune_distill", *shared, f"stages.prune.sparsity={values}", f"out={out}", "store=both"]}
        for out, values in (("a", "0.3,0.5"), ("b", "0.5,0.3"))
    ]
    groups = [run("whole"), *killed, run("out"), pair]
    done = subprocess.run(
        [sys.executable, str(FORKED), json.dumps(groups)], cwd=tmp_path, env=ENVIRONMENT, text=True,
        capture_output=True, timeout=3600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, *[None] * 5, 0, 0, 0], done.stderr

    made = Counter((tmp_path / "made.txt").read_text().splitlines())
    assert set(made.values()) == {1}, "nothing that was finished is computed again, nothing twice at the same time"
    once = {line.removeprefix("whole-store ") for line in made if line.startswith("whole-store ")}
    assert Counter(line.split()[0] for line in once) == {"prune": 3, "distill": 3, "quantize": 6}
    assert {line.removeprefix("out-store ") for line in made if line.startswith("out-store ")} <= once
    assert Counter(line.split()[1] for line in made if line.startswith("both ")) == {"prune": 2, "distill": 2}

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert (whole / "report.csv").read_text().replace('"whole/', '"out/') == (out / "report.csv").read_text()
    assert len(stages(whole)) == 6
    same(whole, out)
    same(tmp_path / "a", tmp_path / "b")
    for store in ("whole-store", "out-store", "both"):
        left = [path.name for part in ("work", "locks") for path in (tmp_path / store / part).glob("*")]
        left = [name for name in left if not name.startswith("run-")]  # of killed runs, until store prune
        assert not left and not list((tmp_path / store).glob(".*"))


def same(one: Path, other: Path) -> None:
    """Asserts that two grids have the same stages, with the same weights."""
    found = [stages(out) for out in (one, other)]
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        for pair in zip(found[0][name], found[1][name], strict=True):
            assert all(pair[0][part] == pair[1][part] for part in ("key", "coverage", "curves"))
            folders = [one.parent / str(stage["checkpoint"]) / "unet" for stage in pair]
            weights = [(folder / "diffusion_pytorch_model.safetensors").read_bytes() for folder in folders]
            assert weights[0] == weights[1]
