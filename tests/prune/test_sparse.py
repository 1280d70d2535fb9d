"""Pruning to a sparsity: which weights go, what is left of every architecture, and what is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from compress.errors import UserError
from compress.models.inputs import predict, small_inputs
from compress.models.sparsity import holds
from compress.prune import sparse
from compress.prune.sparse import Config, prune_sparse
from compress.quantize.int8 import quantize_weights
from tests.prune.architectures import ARCHITECTURES, random_unet
from tests.prune.blocks_models import flux, pixart, sd3
from tests.prune.fresh_load import Lazily, load_in_fresh_process
from tests.tiny import tiny_pipeline, tiny_unet


class Block(nn.Module):
    """Two layers inside a block and one outside, with weights that are given."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"first": layer_of(first), "second": layer_of(second)})
        self.out = nn.Linear(4, 1)


def layer_of(weight: Any) -> nn.Module:
    tensor = torch.tensor(weight, dtype=torch.float32)
    out, inputs, *kernel = tensor.shape
    layer = nn.Conv2d(inputs, out, kernel) if kernel else nn.Linear(inputs, out)
    layer.weight.data = tensor
    return layer


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.weight == 0 for name, module in layers(model).items()}


def test_each_layer_loses_its_smallest_weights() -> None:
    model = Block([[1, -2, 3, -4], [5, -6, 7, -8]], [[0.1, 0.2, -0.3, 0.4]])
    report = prune_sparse(model, Config(sparsity=0.5))
    assert model.block["first"].weight.tolist() == [[0, 0, 0, 0], [5, -6, 7, -8]]
    assert torch.equal(model.block["second"].weight, torch.tensor([[0, 0, -0.3, 0.4]]))
    first = report.layers["block.first"]
    assert (first.weights, first.zeros, first.changed, first.sparsity) == (8, 4, 4, 0.5)
    assert first.lost == pytest.approx((30 / 204) ** 0.5)
    assert report.skipped == {"out": "not in include"}
    assert report.sparsity == 0.5
    assert report.sparsity_denoiser == 6 / 20  # 12 weights and 8 more parameters
    assert report.params == 12 / 20
    assert (report.bytes, report.sparse_bytes) == (80, 80 - 24 + 2 + 0)
    assert model.out.weight.count_nonzero() == 4


def test_one_ranking_over_all_layers() -> None:
    model = Block([[1, -2, 3, -4], [5, -6, 7, -8]], [[0.1, 0.2, -0.3, 0.4]])
    report = prune_sparse(model, Config(sparsity=0.5, scope="global"))
    assert model.block["first"].weight.tolist() == [[0, 0, 3, -4], [5, -6, 7, -8]]
    assert report.emptied == ["block.second"]
    assert (report.layers["block.first"].zeros, report.sparsity) == (2, 0.5)


def test_two_of_four_neighbors_stay() -> None:
    model = Block([[1, -2, 3, -4, 9, 1, 1, 0]], [[[[i + 10 * (c == 3) for i in range(3)]] for c in range(4)]])
    prune_sparse(model, Config(pattern="2:4"))
    assert model.block["first"].weight.tolist() == [[0, 0, 3, -4, 9, 0, 1, 0]]  # of equal ones the first go
    # A group are the four channels at one place of the kernel, not neighbors within it.
    conv = model.block["second"].weight[0, :, 0]
    assert conv.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 2], [10, 11, 12]]


def test_the_same_weights_go_as_by_torch() -> None:
    unet, theirs = tiny_unet(), tiny_unet()
    prune_sparse(unet, Config(sparsity=0.3, scope="global", include=["*"]))
    parameters = [(module, "weight") for module in layers(theirs).values()]
    prune.global_unstructured(parameters, prune.L1Unstructured, amount=0.3)
    for name, module in layers(theirs).items():
        assert torch.equal(unet.get_submodule(name).weight, module.weight), name


ALL: dict[str, Any] = {
    **{name: lambda name=name: random_unet(name) for name in ARCHITECTURES},
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
}
CONFIGS = {"layer": Config(), "global": Config(sparsity=0.7, scope="global"), "2:4": Config(pattern="2:4")}


@pytest.fixture(scope="module")
def pruned() -> dict[str, nn.Module]:
    """Every architecture, in turn by one of the ways."""

    def make(name: str) -> nn.Module:
        how = list(CONFIGS)[list(ALL).index(name) % 3]
        model = ALL[name]()
        report = prune_sparse(model, CONFIGS[how])
        assert set(report.layers) <= {name for name in layers(model) if "block" in name}
        assert report.sparsity == pytest.approx(CONFIGS[how].asked, abs=2e-3)
        assert report.macs is not None and 0 < report.macs < 1
        if how == "2:4":
            assert all(holds(model.get_submodule(name).weight, 2, 4) for name in report.layers)
        return model

    return Lazily(make)


def test_a_fresh_process_loads_them_by_stock_diffusers(
    pruned: dict[str, nn.Module], tmp_path: Path, stranger: Callable[..., str]
) -> None:
    load_in_fresh_process({name: (pruned[name], small_inputs(pruned[name])) for name in ALL}, tmp_path, stranger)


@pytest.mark.parametrize("name", ["sdxl", "ddpm", "inpainting"])
def test_int8_keeps_every_zero_and_loads(pruned: dict[str, nn.Module], name: str, tmp_path: Path) -> None:
    unet = copy.deepcopy(pruned[name])
    before = zeros(unet)
    quantize_weights(unet)
    for layer, zero in before.items():
        weight = unet.get_submodule(layer).weight
        assert weight.qdata[zero].count_nonzero() == 0 and weight.dequantize()[zero].count_nonzero() == 0
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path, torch_dtype=torch.float32)
    inputs = small_inputs(unet)
    assert torch.equal(predict(loaded, inputs), predict(unet, inputs))


@pytest.mark.parametrize("name", ALL)
def test_a_step_of_training_moves_the_rest(pruned: dict[str, nn.Module], name: str) -> None:
    model = copy.deepcopy(pruned[name]).train().requires_grad_(True)
    model(**{**small_inputs(model), "return_dict": False})[0].square().mean().backward()
    assert all(parameter.is_leaf for parameter in model.parameters())
    assert not any(key.endswith(("_mask", "_orig")) for key in model.state_dict())
    assert all(module.weight.grad is not None for module in layers(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled(pruned: dict[str, nn.Module], name: str) -> None:
    inputs = small_inputs(pruned[name])
    wanted = predict(pruned[name], inputs)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(pruned[name])(**inputs).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_more_can_go_later_but_not_the_same_again() -> None:
    unet = tiny_unet()
    prune_sparse(unet, Config(sparsity=0.5))
    before = zeros(unet)
    again = prune_sparse(unet, Config(sparsity=0.5))
    assert not any(layer.changed for layer in again.layers.values()) and again.params == 0
    assert again.skipped["mid_block.resnets.0.conv1"] == "already has as many zeros"
    more = prune_sparse(unet, Config(sparsity=0.75))
    assert more.sparsity == pytest.approx(0.75, abs=1e-3)
    assert all((now >= before[name]).all() for name, now in zeros(unet).items())


def test_half_precision_and_layers_that_have_no_groups() -> None:
    unet = tiny_unet(cross_attention_dim=18).bfloat16()
    report = prune_sparse(unet, Config(pattern="2:4"))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert report.skipped[name] == "18 inputs, not a multiple of 4"
    assert unet.get_submodule(name).weight.count_nonzero() == 32 * 18
    assert unet.mid_block.resnets[0].conv1.weight.dtype == torch.bfloat16
    assert report.sparsity == 0.5


def test_the_stage_reports() -> None:
    pipeline = tiny_pipeline()
    report = sparse.run(pipeline, Config(skip=["*.time_emb_proj"]), SimpleNamespace())  # type: ignore[arg-type]
    assert report.coverage["skipped"]["conv_in"] == "not in include"
    assert report.coverage["skipped"]["mid_block.resnets.0.time_emb_proj"] == "asked for by skip: *.time_emb_proj"
    assert report.coverage["modules"] == len(report.details["zeros"])
    assert 0.8 < report.coverage["params"] < 1 and 0.8 < report.coverage["macs"] < 1
    assert (report.details["sparsity_asked"], report.details["sparsity"]) == (0.5, 0.5)
    assert report.details["sparse_bytes"] < 0.6 * report.details["bytes"]
    assert len(report.details["most_lost"]) == 5
    json.dumps([report.coverage, report.details])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pattern": "4:2"}, "pattern=4:2: expected unstructured, or n:m with 0 < n < m, such as 2:4"),
        ({"pattern": "blocks"}, "pattern=blocks: expected unstructured, or n:m"),
        ({"sparsity": 1.0}, r"sparsity=1.0: expected a number in \(0, 1\)"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"scope": "model"}, "scope=model: expected layer or global"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity=0.6: expected null or 0.5, which is what pattern=2:4 leaves"),
        ({"pattern": "2:4", "scope": "global"}, "scope=global: expected layer: pattern=2:4 is decided within"),
        ({"include": [""]}, "include="),
        ({"skip": [3]}, "skip="),
    ],
)
def test_values_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**keys)


def test_what_cannot_be_pruned_is_refused_and_left_as_it_was() -> None:
    unet = tiny_unet()
    for keys, message in (
        ({"include": ["encoder.*"]}, "include=encoder.*: expected a pattern of layer names, such as conv_in"),
        ({"skip": ["nothing"]}, "skip=nothing"),
        ({"include": ["conv_in"], "skip": ["conv_*"]}, "leave a Conv2d or Linear .*asked for by skip"),
        ({"pattern": "3:7"}, "16 inputs, not a multiple of 7"),
    ):
        with pytest.raises(UserError, match=message):
            prune_sparse(unet, Config(**keys))
    unet.mid_block.resnets[0].conv1.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="mid_block.resnets.0.conv1 has weights that are NaN"):
        prune_sparse(unet)
    assert not any(zero.any() for zero in zeros(unet).values())
    quantize_weights(fresh := tiny_unet())
    with pytest.raises(UserError, match="is quantized"):
        prune_sparse(fresh)
