"""Layers of a pruned denoiser that are fitted by least squares to what they gave before."""

import copy
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.prune import per_layer, width
from compress.prune.channels.fit import ReconstructConfig
from compress.prune.channels.reconstruct import _patches, reconstruct
from compress.prune.sparse import Config as SparseConfig
from compress.prune.sparse import prune_sparse
from tests.prune.calibrated import calibration_of, small_unet


class Two(nn.Module):
    """Two layers without anything between them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, hidden, 3, padding=1), nn.Conv2d(hidden, 4, 3, stride=2, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(images))


def examples(count: int = 32) -> SimpleNamespace:
    """Stands for a calibration: images, and how a model is run on a part of them."""
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    parts = [slice(start, start + 8) for start in range(0, count, 8)]
    return SimpleNamespace(latents=images, parts=lambda: parts, predict=lambda model, part: model(images[part]))


@torch.no_grad()
def test_channels_that_others_can_stand_in_for_leave_no_error() -> None:
    torch.manual_seed(0)
    teacher = Two(6)
    mix = torch.randn(3, 3)  # the last three channels are mixtures of the first three
    teacher.first.weight[3:] = torch.einsum("oi,ihwk->ohwk", mix, teacher.first.weight[:3])
    teacher.first.bias[3:] = mix @ teacher.first.bias[:3]
    student = Two(3)
    student.first.weight.copy_(teacher.first.weight[:3])
    student.first.bias.copy_(teacher.first.bias[:3])
    student.last.weight.copy_(teacher.last.weight[:, :3])
    student.last.bias.copy_(teacher.last.bias)
    wanted, before = teacher(examples().latents), copy.deepcopy(teacher.state_dict())
    errors = reconstruct(teacher, student, {"first": torch.arange(3)}, {}, examples(), places=2000, ridge=1e-7)
    torch.testing.assert_close(student(examples().latents), wanted, atol=1e-3, rtol=0)
    assert errors["first"][0] == errors["first"][1] < 1e-10
    assert errors["last"][0] > 0.1 > 1e-5 > errors["last"][1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_are_what_a_convolution_multiplies(stride: int) -> None:
    layer, images = nn.Conv2d(3, 5, 3, stride=stride, padding=1), torch.randn(2, 3, 8, 6)
    output = layer(images)
    rows = output.movedim(1, -1).flatten(0, 2)
    index = torch.tensor([0, 3, 7, len(rows) - 1])
    found = _patches(layer, images, index) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(found, rows[index])


@pytest.mark.parametrize(("method", "prune"), [(width, width.prune_width), (per_layer, per_layer.prune_per_layer)])
def test_a_pruned_unet_comes_nearer_to_its_teacher(method: ModuleType, prune: Callable[..., Any]) -> None:
    unet = small_unet()
    seen, unseen = calibration_of(unet, 48, 12), calibration_of(unet, 8)
    fit = ReconstructConfig(examples=48, places=4000)
    fitted = prune(unet, method.Config(reconstruct=fit), calibration=seen)
    pruned = prune(unet, method.Config())
    part = slice(0, 8)
    with torch.no_grad():
        wanted = unseen.predict(unet, part)
        errors = [float((unseen.predict(r.unet, part) - wanted).square().mean()) for r in (pruned, fitted)]
    assert errors[1] < 0.7 * errors[0]
    assert {name: t.shape for name, t in pruned.unet.state_dict().items()} == {
        name: t.shape for name, t in fitted.unet.state_dict().items()
    }
    assert all(after <= before for before, after in fitted.reconstructed.values())
    assert not pruned.reconstructed


@pytest.mark.parametrize(
    ("key", "value"), [("examples", 3), ("places", 10), ("ridge", 0.0), ("ridge", float("nan")), ("prompt_dropout", 2)]
)
def test_ranges_are_checked(key: str, value: float) -> None:
    with pytest.raises(UserError, match=key):
        ReconstructConfig(**{key: value})


def test_zeros_of_sparse_pruning_stay() -> None:
    unet = small_unet()
    prune_sparse(unet, SparseConfig(sparsity=0.3))
    before = [int((p == 0).sum()) for p in unet.parameters()]
    fit = ReconstructConfig(examples=48, places=4000)
    fitted, pruned = (
        width.prune_width(unet, width.Config(reconstruct=how), calibration=calibration_of(unet, 48, 12))
        for how in (fit, ReconstructConfig())
    )
    weights = {name: p for name, p in pruned.unet.named_parameters() if name.endswith("weight") and p.ndim > 1}
    assert sum(before) > 0 and fitted.reconstructed
    for name, weight in fitted.unet.named_parameters():
        if name in weights and not name.startswith("time_embedding"):
            assert not weight[weights[name] == 0].any(), name
