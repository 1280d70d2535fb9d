"""Low-rank pruning: planted ranks are found, targets are met, and what comes out is a model like any other."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.models.inputs import example_inputs, predict, small_inputs
from compress.models.macs import count
from compress.models.outline import Outline
from compress.prune import depth, low_rank
from compress.prune.bk_sdm import prune_bk_sdm
from compress.prune.channels.target import Target
from compress.prune.layers.ranks import Matrix, by_cost, factors, lost_energy
from compress.prune.low_rank import Config, check, prune_low_rank, run
from compress.prune.width import prune_width
from compress.quantize.int8 import quantize_weights
from compress.store.checkpoint import load_checkpoint, save_checkpoint
from tests.models.test_shaped_unet import difference
from tests.prune.architectures import ARCHITECTURES, UNet, random_unet
from tests.tiny import tiny_pipeline, tiny_unet

OUTLINE = Outline("", {}, {})


def plant(unet: UNet) -> dict[str, int]:
    """Gives every layer the product of two random factors, so thin that it is worth having; returns the ranks."""
    generator = torch.Generator().manual_seed(5)
    ranks = {}
    with torch.no_grad():
        for name, layer in unet.named_modules():
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            outputs, inputs = layer.weight.flatten(1).shape
            most = (outputs * inputs - 1) // (outputs + inputs)
            if most < 1:
                continue
            rank = int(torch.randint(1, most + 1, (), generator=generator))
            left, right = (torch.randn(shape, generator=generator) for shape in ((outputs, rank), (rank, inputs)))
            layer.weight.copy_((left @ right / (rank * inputs) ** 0.5).reshape(layer.weight.shape))
            ranks[name] = rank
    return ranks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_planted_ranks_are_found(name: str) -> None:
    unet = random_unet(name)
    ranks = plant(unet)
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    report = prune_low_rank(unet, Config(energy=1.0, include=["*"]))
    assert {name: layer.rank for name, layer in report.layers.items()} == ranks
    assert report.params_after == report.unet.num_parameters() < report.params_before
    assert all(torch.equal(tensor, before[key]) for key, tensor in unet.state_dict().items())
    # In double precision: a deep random UNet tells apart where a pass rounds, and the factors are float32 all the same.
    assert difference(unet.double(), report.unet.double()) < 1e-5


def test_a_planted_rank_is_what_a_target_takes_first() -> None:
    unet = tiny_unet()
    name = "mid_block.resnets.0.conv1"
    weight = unet.get_submodule(name).weight.data
    weight.copy_((torch.randn(64, 8) @ torch.randn(8, 64 * 9) / 70).reshape(weight.shape))
    saved = weight.numel() - 8 * (64 + 64 * 9)
    share = 1 - saved / unet.num_parameters()
    report = prune_low_rank(unet, Config(target=Target(params=share)))
    assert {name: layer.rank for name, layer in report.layers.items()} == {name: 8}
    assert difference(unet, report.unet) < 1e-5


@pytest.mark.parametrize(
    ("name", "unit", "share"), [("sd 1.x", "bytes", 0.7), ("sdxl", "macs", 0.5), ("ddpm", "params", 0.9)]
)
def test_targets_are_met(name: str, unit: str, share: float) -> None:
    unet = random_unet(name)
    report = prune_low_rank(unet, Config(target=Target(**{unit: share})))
    inputs = example_inputs(unet)
    before, after = count(unet, inputs), count(report.unet, inputs)
    left = after.macs / before.macs if unit == "macs" else after.params / before.params
    assert left == pytest.approx(share, rel=0.02)
    assert report.left == pytest.approx(left, abs=1e-9)


def test_energy_is_kept_in_every_layer() -> None:
    unet = tiny_unet()
    report = prune_low_rank(unet, Config(energy=0.8, multiple=4, skip=["*.time_emb_proj"]))
    assert report.layers
    for name, layer in report.layers.items():
        old, new = unet.get_submodule(name), report.unet.get_submodule(name)
        weight = old.weight.detach().flatten(1)
        product = new.expand.weight.detach().flatten(1) @ new.reduce.weight.detach().flatten(1)
        energy = 1 - ((weight - product).square().sum() / weight.square().sum()).item()
        assert energy == pytest.approx(layer.energy, abs=1e-5) and energy >= 0.8 - 1e-5
        assert layer.rank % 4 == 0 and layer.params[1] == product.shape[0] * layer.rank + layer.rank * product.shape[1]
        # no smaller multiple would do
        values = torch.linalg.svdvals(weight.double()).square()
        assert values[: layer.rank - 4].sum() < 0.8 * values.sum()
        assert new.reduce.weight.norm() == pytest.approx(new.expand.weight.norm().item(), rel=1e-4)
    skipped = set(report.skipped.values())
    assert "asked for by skip: *.time_emb_proj" in skipped and "not in include" in skipped
    left_alone = set(prune_low_rank(unet, Config(energy=0.9)).skipped.values())
    assert any("the largest rank that reduces the cost, " in why for why in left_alone)
    everything = {name for name, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(report.layers) | set(report.skipped) == everything
    in_layers = sum(unet.get_submodule(name).weight.numel() for name in report.layers)
    assert report.share_params == in_layers / unet.num_parameters()
    assert 0 < report.share_macs < 1


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 3, 3, 3), (4, 9, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3])
def test_factors_are_the_nearest(shape: tuple[int, ...], rank: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    reduce, expand = factors(weight, rank)
    assert reduce.shape == (rank, *shape[1:]) and expand.shape == (shape[0], rank, *[1] * (len(shape) - 2))
    left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert torch.allclose(expand.flatten(1) @ reduce.flatten(1), nearest, atol=1e-5)
    lost = (values[rank:].square().sum() / values.square().sum()).item()
    assert lost_energy(weight)[rank].item() == pytest.approx(lost, rel=1e-4)


def test_weights_of_zeros_have_factors_of_zeros() -> None:
    reduce, expand = factors(torch.zeros(4, 5), 2)
    assert not (expand @ reduce).any() and not lost_energy(torch.zeros(4, 5)).any()


def test_ranks_of_least_loss_for_what_they_save() -> None:
    sizes = {"a": (5, 9), "b": (8, 8), "c": (12, 6)}
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    for weight in weights.values():
        weight *= torch.arange(1, weight.shape[1] + 1) ** -1.0
    layers = {name: Matrix(*weight.shape, cost=weight.numel()) for name, weight in weights.items()}
    lost = {name: lost_energy(weight) for name, weight in weights.items()}
    options = [[None, *layer.ranks(1)] for layer in layers.values()]

    def figures(choice: dict[str, Any]) -> tuple[float, float]:
        taken = {name: rank for name, rank in choice.items() if rank is not None}
        saved = sum(layers[name].cost - layers[name].at(rank) for name, rank in taken.items())
        return saved, sum(float(lost[name][rank]) for name, rank in taken.items())

    every = [figures(dict(zip(sizes, choice, strict=True))) for choice in itertools.product(*options)]
    for saving in (20.0, 45.0, 70.0, 100.0):
        ranks, _ = by_cost(layers, lost, saving, 1)
        saved, loss = figures(ranks)
        assert abs(saved - saving) <= 20  # half of the dearest rank at most
        assert loss <= 1.1 * min(other for cost, other in every if cost >= saved) + 1e-9


def test_products_stay_and_can_be_pruned_no_further() -> None:
    unet = tiny_unet()
    once = prune_low_rank(unet, Config(target=Target(params=0.8)))
    twice = prune_low_rank(once.unet, Config(target=Target(params=0.8)))
    halves = [name for name, why in twice.skipped.items() if why == "already factored"]
    assert sorted(halves) == sorted(f"{name}.{part}" for name in once.layers for part in ("reduce", "expand"))
    assert twice.unet.num_parameters() / unet.num_parameters() == pytest.approx(0.64, rel=0.03)
    assert set(twice.unet.config.layers) == set(once.layers) | set(twice.layers)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"energy": 0.0}, r"energy=0\.0: expected a number in \(0, 1\]"),
        ({"energy": 1.1}, "energy=1.1"),
        ({"multiple": 0}, "multiple=0: expected a whole number of at least 1"),
        ({"include": [""]}, "include=.* a list of patterns"),
        ({"target": {"params": 1.0}}, "params=1.0"),
    ],
)
def test_wrong_values(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**{**config, **({"target": Target(**config["target"])} if "target" in config else {})})


def test_what_cannot_be_done_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    monkeypatch.setattr("compress.prune.layers.ranks.lost_energy", lambda *_: pytest.fail("it was begun"))
    least = r"target\.params=0\.05: expected at least 0\.\d+: rank 8 in each of the \d+ selected layers"
    with pytest.raises(UserError, match=least):
        prune_low_rank(unet, Config(target=Target(params=0.05), multiple=8))
    with pytest.raises(UserError, match=r"skip=mid_blok\.\*: expected a pattern of layer names, such as conv_in"):
        prune_low_rank(unet, Config(skip=["mid_blok.*"]))
    with pytest.raises(UserError, match="include=.*patterns that leave a Conv2d or Linear"):
        prune_low_rank(unet, Config(skip=["*"]))
    with pytest.raises(UserError, match="low_rank factors the layers of UNet2DConditionModel and UNet2DModel"):
        prune_low_rank(nn.Linear(2, 2))  # type: ignore[arg-type]
    unet.conv_in.weight.data[0] = torch.nan
    unet.mid_block.resnets[0].conv1.weight.data[0] = torch.nan
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv1 has weights that are NaN"):
        prune_low_rank(unet)


def test_a_check_needs_no_weights_and_methods_for_stock_unets_refuse_what_comes_out() -> None:
    with torch.device("meta"):
        empty = tiny_unet()
    assert check(Config(target=Target(macs=0.5)), empty, OUTLINE) is None
    with pytest.raises(UserError, match=r"target\.macs=0\.01: expected at least"):
        check(Config(target=Target(macs=0.01)), empty, OUTLINE)
    new = prune_low_rank(tiny_unet(), Config(target=Target(params=0.8))).unet
    with pytest.raises(UserError, match="its layers have individual shapes"):
        prune_width(new)
    with pytest.raises(UserError, match="BK-SDM is an architecture of UNet2DConditionModel"):
        prune_bk_sdm(new, "small")
    with pytest.raises(UserError, match="blocks cannot be removed from ShapedUNet2DConditionModel"):
        depth.check(depth.Config(), new, OUTLINE)


def test_a_target_between_two_ranks_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "TOLERANCE", 1e-3)
    config = Config(target=Target(params=0.95), include=["*mid_block*"], multiple=8)
    with pytest.raises(UserError, match=r"target.params=0.95: expected about 0.943, the nearest share that ranks"):
        prune_low_rank(random_unet("sd 1.x"), config)


def test_nothing_that_saves_something_is_an_error() -> None:
    with pytest.raises(UserError, match=r"energy=1: no layer can be factored .* keeps 0\.\d+ of its energy"):
        prune_low_rank(tiny_unet(), Config(energy=1.0))
    quantized = tiny_unet()
    quantize_weights(quantized)
    with pytest.raises(UserError, match="the denoiser is quantized"):
        prune_low_rank(quantized)


def test_saved_trained_and_quantized(tmp_path: Any) -> None:
    pipeline = tiny_pipeline()
    report = run(pipeline, Config(target=Target(params=0.8)), None)  # type: ignore[arg-type]
    assert report.coverage["modules"] == len(report.details["ranks"]) > 0
    assert report.details["left"] == pytest.approx(0.8, rel=0.02)
    save_checkpoint(pipeline, tmp_path / "float", {"stages": []})
    unet = load_checkpoint(tmp_path / "float").unet
    assert difference(pipeline.unet, unet) == 0
    unet.train().requires_grad_(True)
    optimizer = torch.optim.SGD(unet.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        loss = unet(**small_inputs(unet), return_dict=False)[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    pipeline.unet.requires_grad_(False)
    before = predict(pipeline.unet, small_inputs(pipeline.unet))
    quantized = quantize_weights(pipeline.unet)
    assert any(name.endswith(".reduce") for name in quantized.modules)
    after = predict(pipeline.unet, small_inputs(pipeline.unet))
    assert (after - before).norm() < 0.05 * before.norm()
    save_checkpoint(pipeline, tmp_path / "int8", {"stages": []})  # which reads it back and compares
    assert (tmp_path / "int8" / "unet" / "compressed_model.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd 1.x", "sdxl", "ddpm"])
def test_it_compiles(name: str) -> None:
    unet = random_unet(name)
    new = prune_low_rank(unet, Config(target=Target(params=0.8))).unet
    inputs = small_inputs(new)
    expected = predict(new, inputs)
    with torch.no_grad():
        found = torch.compile(new, fullgraph=True)(**inputs, return_dict=False)[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
