"""Zeros that were made on purpose survive training: averaged, decayed, resumed, split; others do not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from compress.distill import features
from compress.distill.features import distill
from compress.errors import UserError
from compress.models.sparsity import holds
from compress.prune import sparse, width
from compress.prune.sparse import Config, prune_sparse
from compress.prune.width import Config as WidthConfig
from compress.prune.width import prune_width
from compress.quantize import int8
from tests.distill.test_features import SCHEDULER, examples
from tests.distill.test_resume import launch
from tests.distill.worker import CONFIG, SPARSE, distilled
from tests.tiny import tiny_pipeline, tiny_unet

HARSH = replace(CONFIG, learning_rate=1e-2, weight_decay=0.5)


def zeros(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in unet.named_parameters() if weight.dim() > 1}


def kept(before: dict[str, torch.Tensor], unet: UNet2DConditionModel) -> bool:
    now = zeros(unet)
    return all(torch.equal(now[name], zero) for name, zero in before.items())


def trained(folder: Path | None, student: UNet2DConditionModel, **more: Any) -> Any:
    more = {"keep_zeros": True, "config": HARSH, **more}
    return distill(student, tiny_unet(), examples(), SCHEDULER, folder=folder, **more)


def sparse_unet(seed: int = 1, **keys: Any) -> UNet2DConditionModel:
    unet = tiny_unet(widths=(16, 32), seed=seed)
    prune_sparse(unet, Config(**keys))
    return unet


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_of_a_state_is_zero_there(tmp_path: Path, optimizer: str) -> None:
    student = sparse_unet()
    before = zeros(student)
    start = {name: weight.clone() for name, weight in student.named_parameters()}
    report = trained(tmp_path, student, config=replace(HARSH, optimizer=optimizer))
    assert kept(before, student)
    moved = [name for name, weight in student.named_parameters() if not torch.equal(weight, start[name])]
    assert len(moved) == len(start), "what is not zero has been trained"
    number = sum(int(zero.sum()) for zero in before.values())
    assert report.details["zeros_kept"] == number > 1000
    assert report.coverage["params"] == pytest.approx(1 - number / student.num_parameters())
    state = load_file(max(tmp_path.glob("state-*")))
    for index, (name, weight) in enumerate(student.named_parameters()):
        if name in before:
            moments = [
                kind for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer") if f"{kind}.student.{name}" in state
            ]
            parts = [state[f"{part}.student.{name}"] for part in ("weight", *moments)]
            assert moments and all(
                part[before[name]].count_nonzero() == 0 for part in [*parts, state[f"ema.{index}"]]
            ), name
            assert torch.equal(state[f"ema.{index}"], weight)


def test_stopped_and_resumed_ends_the_same(tmp_path: Path) -> None:
    undisturbed, student = sparse_unet(pattern="2:4"), sparse_unet(pattern="2:4")
    trained(None, undisturbed)

    def fail(metrics: dict[str, float], step: int) -> None:
        if step == 6:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trained(tmp_path, student, log=fail)
    resumed = sparse_unet(pattern="2:4")
    before = zeros(resumed)
    trained(tmp_path, resumed)
    assert kept(before, resumed)
    assert all(torch.equal(weight, undisturbed.state_dict()[name]) for name, weight in resumed.state_dict().items())
    assert holds(resumed.mid_block.resnets[0].conv1.weight, 2, 4)


def test_a_state_without_the_zeros_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, tiny_unet(widths=(16, 32), seed=1))
    with pytest.raises(UserError, match="a student without these zeros"):
        trained(tmp_path, sparse_unet())


def test_zeros_by_accident_are_trained() -> None:
    student = sparse_unet()
    report = trained(None, student, keep_zeros=False)
    assert not any(zero.any() for zero in zeros(student).values())
    assert report.coverage["params"] == 1 and "zeros_kept" not in report.details


def test_only_a_stage_that_made_zeros_counts() -> None:
    assert sparse.STAGE.zeros
    assert not any(module.STAGE.zeros for module in (width, features, int8))


@pytest.mark.parametrize("where", ["history", "before"])
def test_the_stage_keeps_them_for_what_was_done_before(tmp_path: Path, where: str) -> None:
    stages = {"history": [], "before": [], where: [SPARSE]}
    pipeline, report = distilled(tmp_path, replace(HARSH, steps=2), sparse=True, **stages)
    assert report.details["zeros_kept"] == sum(int(zero.sum()) for zero in zeros(pipeline.unet).values()) > 1000


def test_channels_that_leave_later_take_their_zeros_along() -> None:
    unet = tiny_unet(widths=(32, 64))
    prune_sparse(unet, Config(sparsity=0.6))
    narrow = prune_width(unet, WidthConfig([0, 0.25])).unet
    before = zeros(narrow)
    share = sum(int(zero.sum()) for zero in before.values()) / sum(zero.numel() for zero in before.values())
    assert share > 0.5
    trained(None, narrow, config=replace(HARSH, steps=3))
    assert kept(before, narrow)


@pytest.mark.slow
def test_two_processes_keep_them(tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    worker = [str(Path(__file__).with_name("worker.py")), str(tmp_path / "work"), str(tmp_path / "weights"), "--sparse"]
    done = launch([*launcher, *options, *worker])
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"weights.{rank}.safetensors") for rank in (0, 1))
    student = tiny_pipeline(seed=1, widths=(16, 32)).unet
    prune_sparse(student)
    for name, zero in zeros(student).items():
        assert torch.equal(first[name], second[name]) and torch.equal(first[name] == 0, zero), name
