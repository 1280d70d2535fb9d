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


def forked(groups: list[list[dict[str, Any]]], folder: Path) -> list[Any]:
    """Exit code and number of changes of files of every run of :mod:`forked`; None for one that was killed."""
    done = subprocess.run(
        [sys.executable, str(FORKED), json.dumps(groups)], cwd=folder, env=ENVIRONMENT, text=True, capture_output=True,
        timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    assert all(outcome is None or outcome[0] == 0 for outcome in found), done.stderr
    return found


def made(folder: Path) -> Counter[str]:
    """How often each checkpoint was finished, by kind and key."""
    found = Counter((folder / "made.txt").read_text().splitlines())
    (folder / "made.txt").unlink()
    return found


def test_a_grid_killed_at_random_moments_ends_as_one_left_alone(tiny_overrides: list[str], tmp_path: Path) -> None:
    grid = ["recipe=prune_distill_int8", "prune=magnitude", "stages.prune.ratio=0.25,0.5,0.75", "quantize=int8,int4"]
    grid += ["stages.distill.steps=4", "stages.distill.save_every=1", "stages.distill.batch_size=2", *tiny_overrides]

    def run(out: str, kill_at: int | None = None) -> list[dict[str, Any]]:
        return [{"arguments": [*grid, f"out={out}", f"store={out}-store"], "kill_at": kill_at}]

    ((_, changes),) = forked([run("whole")], tmp_path)
    once = made(tmp_path)
    assert Counter(line.split()[0] for line in once) == {"prune": 3, "distill": 3, "quantize": 6}
    assert set(once.values()) == {1}, "each shared stage once"

    draw = random.Random(0)
    kills = [run("out", draw.randint(1, changes // 6)) for _ in range(5)]
    assert forked([*kills, run("out")], tmp_path)[:-1] == [None] * 5
    again = made(tmp_path)
    assert set(again.values()) == {1} and again.keys() <= once.keys(), "what is finished is not computed again"
    ends = [tmp_path / "whole", tmp_path / "out"]
    assert ends[0].joinpath("report.csv").read_bytes() == ends[1].joinpath("report.csv").read_bytes()
    whole, found = map(stages, ends)
    assert len(whole) == 6 and found.keys() == whole.keys()
    for name in whole:
        for theirs, ours in zip(whole[name], found[name], strict=True):
            assert all(ours[part] == theirs[part] for part in ("key", "coverage", "curves"))
            weights = [f"{end}-store/{ours['key']}/unet/diffusion_pytorch_model.safetensors" for end in ends]
            assert Path(weights[0]).read_bytes() == Path(weights[1]).read_bytes()
    for end in ends:
        left = [path.name for part in ("work", "locks") for path in Path(f"{end}-store", part).glob("*")]
        assert not left and not list(Path(f"{end}-store").glob(".*"))


def test_two_grids_that_overlap_neither_repeat_nor_corrupt(tiny_overrides: list[str], tmp_path: Path) -> None:
    grid = ["recipe=prune_distill", "prune=magnitude", "stages.distill.steps=2", "stages.distill.batch_size=2"]
    grid += [*tiny_overrides, "store=store"]
    ratios = {"a": "0.25,0.5,0.75", "b": "0.75,0.5,0.25"}
    forked([[{"arguments": [*grid, f"stages.prune.ratio={ratios[n]}", f"out={n}"]} for n in ratios]], tmp_path)
    assert set(made(tmp_path).values()) == {1}
    both = [stages(tmp_path / name) for name in ratios]
    computed = [stage["key"] for of in both for point in of.values() for stage in point if not stage["cached"]]
    assert len(computed) == len(set(computed)) == 6
    assert [[stage["key"] for stage in of[name]] for of in both for name in sorted(of)] == [
        [stage["key"] for stage in both[0][name]] for name in sorted(both[0])
    ] * 2
    from compress.store import Store

    assert all(Store(tmp_path / "store").find(str(key)) for key in computed), "verified"
