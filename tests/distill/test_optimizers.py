"""The optimizers of a training."""

import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compress.distill import decoder, dmd, features, lcm, optimizers
from compress.distill.trainer import Trainer
from compress.distill.training import TrainingConfig
from compress.errors import UserError
from compress.models.outline import Outline
from compress.system.random import generator

MUON = TrainingConfig(
    steps=12, log_every=5, batch_size=4, learning_rate=0.01, weight_decay=0.0, optimizer="muon", save_every=4
)


class Layers(nn.Module):
    """A convolution that is a matrix of 16 x 36, with its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 16, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator(0, "layer", parameter.ndim))

    def forward(self, images: Tensor) -> Tensor:
        """The loss as ``(1,)``."""
        return self.layer(images).pow(2).mean().reshape(1)


def test_muon_moves_matrices_by_equal_singular_values_and_all_else_as_adamw() -> None:
    model, other = Layers(), Layers()
    muon = optimizers.make(list(model.parameters()), MUON)
    adamw = torch.optim.AdamW(other.parameters(), 0.01, weight_decay=0.0)
    images = torch.randn(2, 4, 5, 5, generator=generator(0, "images", 0))
    for net, optimizer in ((model, muon), (other, adamw)):
        before = net.layer.weight.detach().clone()
        net(images).backward()
        optimizer.step()
        net.moved = (net.layer.weight.detach() - before).reshape(16, 36)
    values = torch.linalg.svdvals(model.moved) / (0.01 * 0.2 * 36**0.5)
    assert values.min() > 0.5 and values.max() < 1.3
    assert torch.linalg.svdvals(other.moved).max() > 3 * torch.linalg.svdvals(other.moved).min()
    torch.testing.assert_close(model.layer.bias, other.layer.bias)


@pytest.mark.parametrize(
    ("shape", "matrix"), [((64, 16, 1, 1), True), ((64, 15), False), ((4, 64), False), ((64,), False)]
)
def test_small_matrices_and_vectors_are_not_muons(shape, matrix) -> None:
    assert optimizers.is_matrix(torch.zeros(shape)) is matrix


def test_a_killed_training_with_muon_continues_to_the_bit(tmp_path) -> None:
    def train(folder=None, log=None) -> Tensor:
        model = Layers()

        def batches(step: int, part: slice) -> Tensor:
            return torch.randn(4, 4, 5, 5, generator=generator(0, "batch", step))[part]

        Trainer(model, batches, MUON, ["loss"], Accelerator(cpu=True), folder=folder, log=log).train()
        return torch.cat([model.layer.weight.detach().flatten(), model.layer.bias.detach()])

    class Killed(Exception):
        pass

    def kill(values: dict[str, float], step: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(tmp_path, kill)
    assert sorted(tmp_path.glob("state-*.safetensors"))
    assert torch.equal(train(tmp_path), train())


def test_missing_8_bit_optimizer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"adamw_8bit: needs the package bitsandbytes: pip install"):
        optimizers.make([nn.Parameter(torch.zeros(1))], TrainingConfig(optimizer="adamw_8bit"))
    outline = Outline("StableDiffusionPipeline", {}, {})
    for method in (features, lcm, dmd, decoder):  # before a run begins
        with pytest.raises(UserError, match="adamw_8bit: needs the package bitsandbytes"):
            method.check_teacher(method.Config(optimizer="adamw_8bit"), outline)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=None))
    with pytest.raises(UserError, match="needs a GPU"):
        optimizers.make([nn.Parameter(torch.zeros(1))], TrainingConfig(optimizer="adamw_8bit"))
