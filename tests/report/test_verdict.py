"""The sentence that says what a run came to."""

import copy
from typing import Any

import pytest

from compress.report import verdict


def metric(value: float, half: float | None = 4.0) -> dict[str, Any]:
    ends = {} if half is None else {"low": value - half, "high": value + half}
    return {"value": value, "n": 256, **ends}


def entry(params: float, size: float, latency: float, **metrics: Any) -> dict[str, Any]:
    cost = {"params": params, "bytes": size, "latency_s": latency}
    return {
        "cost": cost | {"latency_low_s": 0.99 * latency, "latency_high_s": 1.01 * latency},
        "metrics": {name: found and {**found} for name, found in metrics.items()},
    }


@pytest.fixture
def result() -> dict[str, Any]:
    clip = {"network": "emoji-clip"}
    teacher = entry(100, 100, 1.0, fid=metric(115.8), clip_score=metric(50.5, 1.8) | clip, psnr=None)
    floor = entry(0, 0, 0, fid=metric(115.0), clip_score=metric(50.0, 1.8), psnr=metric(13.8, 0.5))
    prune = entry(58, 116, 0.8, fid=metric(286.0), clip_score=metric(6.6, 1.0), psnr=metric(8.1, 0.2))
    last = entry(58, 31, 1.14, fid=metric(133.4), clip_score=metric(41.8, 2.0), psnr=metric(14.5, 0.3))
    return {
        "teacher": teacher, "noise_floor": {"metrics": floor["metrics"]},
        "stages": [{"name": "prune", **prune}, {"name": "quantize", **last}],
    }  # fmt: skip


COST = "After quantize the model has 0.58x of the teacher's parameters and 0.31x of its bytes at 0.88x its speed; "


def test_worse_beyond_the_noise(result: dict[str, Any]) -> None:
    assert verdict(result) == (
        f"{COST}on 256 images FID 133 (teacher 116), emoji-clip score 41.8 (teacher 50.5), PSNR 14.5 dB "
        "(other seeds 13.8): its images are worse than the teacher's beyond the noise."
    )


def test_no_nearer_than_other_seeds(result: dict[str, Any]) -> None:
    result["stages"][-1]["metrics"]["psnr"] = metric(14.0, 0.3)
    ends = "beyond the noise, and they are no nearer to the teacher's than images of other seeds."
    assert verdict(result).endswith(ends)


@pytest.mark.parametrize(
    ("fid", "clip", "says"),
    [
        (117.0, 50.0, ": no difference from the teacher's images beyond the noise."),
        (117.0, 41.0, ": its images are worse than the teacher's beyond the noise."),
        (90.0, 50.0, ": its images are better than the teacher's beyond the noise."),
        (90.0, 41.0, ": FID is better and emoji-clip score is worse than the teacher's, beyond the noise."),
    ],
)
def test_the_noise_decides(result: dict[str, Any], fid: float, clip: float, says: str) -> None:
    result["stages"][-1]["metrics"] |= {"fid": metric(fid), "clip_score": metric(clip, 1.8)}
    assert verdict(result).endswith(says)


def test_cost_only(result: dict[str, Any]) -> None:
    for row in (result["teacher"], *result["stages"]):
        row["metrics"] = {}
    del result["noise_floor"]
    assert verdict(result) == f"{COST}its images were not evaluated."
    result["stages"][-1]["cost"] |= {"params": 100, "latency_s": 1.005}
    assert verdict(result) == (
        "After quantize the model has all of the teacher's parameters and 0.31x of its bytes at its speed within the "
        "noise (1.00x); its images were not evaluated."
    )


def test_one_stage_without_a_noise_floor_or_intervals(result: dict[str, Any]) -> None:
    without = copy.deepcopy(result)
    del without["noise_floor"]
    without["stages"] = without["stages"][-1:]
    assert "PSNR 14.5 dB: its images are worse" in verdict(without)
    for row in (without["teacher"], *without["stages"]):
        row["metrics"] = {"fid": metric(row["metrics"]["fid"]["value"], None)}
    assert verdict(without).endswith("FID 133 (teacher 116): how large the noise is was not measured.")
    assert verdict({"teacher": result["teacher"], "stages": []}) == ""


def test_alternatives_are_no_chain(result: dict[str, Any]) -> None:
    result["stages"].append({"name": "quantize, openvino", "kind": "engine", "cost": {}, "metrics": {}})
    assert verdict(result | {"refused": {}}) == "2 alternatives, each made from the teacher alone: prune, quantize."
    assert verdict(result | {"refused": {"nf4": "no"}}).endswith("prune, quantize; not run: nf4.")


def test_zeros(result: dict[str, Any]) -> None:
    result["stages"][-1]["cost"] |= {"sparsity": 0.5, "sparse_bytes": 10}
    assert "0.31x of its bytes, 50 % zeros among its weights, at 0.88x its speed;" in verdict(result)
