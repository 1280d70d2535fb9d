"""Sparse tensor cores: where they are refused, what is converted, and, where there are any, the same output."""

import copy

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.prune.layers.semi_structured import accelerate, check_device, unfit
from compress.prune.sparse import Config, prune_sparse
from tests.tiny import tiny_unet


def test_sparse_kernels_are_refused_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    with pytest.raises(UserError, match=r"device=cpu: 2:4 is faster on NVIDIA GPUs alone, from compute capability 8"):
        accelerate(unet)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    with pytest.raises(UserError, match=r"\(T4, compute capability 7.5\)"):
        check_device(torch.device("cuda"), torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda"), torch.float16)
    with pytest.raises(UserError, match="float32: sparse tensor cores take float16"):
        check_device(torch.device("cuda"), torch.float32)
    assert unfit(nn.Linear(64, 32)) is None
    assert unfit(nn.Linear(64, 40)) == unfit(nn.Linear(32, 32)) == "outputs and inputs are not multiples of 32 and 64"
    assert unfit(nn.Conv2d(64, 32, 1)) == "torch has sparse kernels for linear layers only"


def test_sparse_kernels_that_fail_leave_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's conversion is replaced: it needs a GPU."""
    monkeypatch.setattr("compress.prune.layers.semi_structured.check_device", lambda device, dtype: None)
    unet = tiny_unet(widths=(64, 128))
    with pytest.raises(UserError, match="no layer can run on sparse tensor cores .none has a 2:4 weight"):
        accelerate(unet)
    prune_sparse(unet, Config(pattern="2:4"))
    before = copy.deepcopy(unet.state_dict())

    def fail(weight: torch.Tensor) -> torch.Tensor:
        if weight.shape[0] == 128:
            raise RuntimeError("architecture mismatch\nmore")
        return 2 * weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", fail)
    with pytest.raises(UserError, match="torch's sparse kernels do not run here: architecture mismatch$"):
        accelerate(unet)
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    found = accelerate(unet)
    assert found.difference == 0
    assert all(isinstance(unet.get_submodule(name), nn.Linear) for name in found.layers) and found.layers
    assert found.skipped["mid_block.resnets.0.conv1"] == "torch has sparse kernels for linear layers only"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sparse tensor cores need an NVIDIA GPU")
def test_sparse_kernels_give_the_same() -> None:
    unet = tiny_unet(widths=(64, 128)).to("cuda", torch.float16)
    prune_sparse(unet, Config(pattern="2:4"))
    found = accelerate(unet)
    assert found.layers and found.difference is not None and found.difference < 0.02
