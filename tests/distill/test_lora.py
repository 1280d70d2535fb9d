"""Adapters: they alone train, are merged, and leave a stock model."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_features import SCHEDULER, examples, state
from worker import distilled

from compress.distill import lora
from compress.distill.features import Config, distill
from compress.distill.lora import Lora, adapted, check_lora
from compress.errors import UserError
from tests.tiny import tiny_unet

LORA = Config(steps=3, batch_size=4, learning_rate=1e-2, lora=Lora(rank=2, targets=["to_q", "conv1"]))


def outputs(unet: UNet2DConditionModel) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, generator=source), 5, torch.randn(2, 3, 16, generator=source)
    with torch.no_grad():
        return unet(*inputs).sample


def test_merged_adapters_change_their_layers_alone_and_leave_a_stock_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    teacher, student = tiny_unet(), tiny_unet(seed=1)
    before, kept = state(student), state(teacher)
    report = distill(student, teacher, examples(), SCHEDULER, LORA)
    after = student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert list(after) == list(before)
    assert changed == {name for name in before if name.endswith(("to_q.weight", "conv1.weight"))}
    for name in changed:
        assert torch.linalg.matrix_rank((after[name] - before[name]).flatten(1), atol=1e-6) <= 2
    assert all(torch.equal(kept[name], tensor) for name, tensor in teacher.state_dict().items())
    assert report.coverage["modules"] == len(changed)
    assert 0 < report.coverage["params"] < 1
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(UNet2DConditionModel.from_pretrained(tmp_path)), outputs(student))


def test_gradients_reach_exactly_the_adapters() -> None:
    pytest.importorskip("peft")
    student = tiny_unet()
    before, start = outputs(student), state(student)
    with adapted(student, Lora(rank=2), seed=0) as names:
        torch.testing.assert_close(outputs(student), before)  # nothing is changed at first
        student(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 3, 16)).sample.square().mean().backward()
        reached = {name for name, p in student.named_parameters() if p.grad is not None}
        assert reached == {f"{name}.lora_{side}.default.weight" for name in names for side in "AB"}
        down = student.get_submodule(f"{names[0]}.lora_A.default").weight.detach().clone()
    again = tiny_unet()
    with adapted(again, Lora(rank=2), seed=0), pytest.raises(RuntimeError), adapted(deepcopy(again), Lora(), seed=0):
        assert torch.equal(again.get_submodule(f"{names[0]}.lora_A.default").weight, down)
        raise RuntimeError
    assert all(torch.equal(start[name], tensor) for name, tensor in student.state_dict().items())


def test_a_training_of_adapters_continues_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = Config(steps=6, batch_size=4, save_every=2, log_every=2, lora=Lora(rank=2))
    undisturbed, _ = distilled(tmp_path / "a", config)

    def stop(metrics: dict[str, float], step: int) -> None:
        if step == 4:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        distilled(tmp_path / "b", config, log=stop)
    assert list((tmp_path / "b").glob("state-*"))
    again, _ = distilled(tmp_path / "b", config)
    for name, tensor in again.unet.state_dict().items():
        assert torch.equal(tensor, undisturbed.unet.state_dict()[name]), name


def test_what_cannot_be_adapted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'lora.rank=4: needs the package peft, .*: pip install "compress\[lora\]"'):
        check_lora(tiny_unet(), Lora(rank=4))
    assert check_lora(tiny_unet(), Lora()) == []
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match=r"lora.targets=to_x: expected the end of a layer's name in the UNet2D"):
        check_lora(tiny_unet(), Lora(rank=4, targets=["to_q", "to_x"]))
    with pytest.raises(UserError, match=r"rank=-1: expected"):
        Lora(rank=-1)
    with pytest.raises(UserError, match=r"lora.rank=2: expected 0: merged adapters would fill the zeros"):
        distill(tiny_unet(), tiny_unet(), examples(), SCHEDULER, Config(lora=Lora(rank=2)), keep_zeros=True)
