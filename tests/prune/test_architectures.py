"""Every architecture: pruning finds planted twins; what it leaves is a stock model that loads, trains and quantizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from compress.errors import UserError
from compress.models.inputs import predict, small_inputs
from compress.prune.width import Config, prune_width
from compress.quantize.int8 import quantize_weights
from tests.prune.architectures import ARCHITECTURES, UNet, random_unet
from tests.prune.fresh_load import Lazily, load_in_fresh_process
from tests.prune.widen import widen


def _modes() -> list[tuple[str, str]]:
    # A single head cannot be removed, and heads of one width in all levels cannot be narrowed.
    impossible = {("ddpm", "remove"), ("ddpm with heads", "narrow")}
    return [(name, mode) for name in ARCHITECTURES for mode in ("narrow", "remove") if (name, mode) not in impossible]


@pytest.mark.parametrize(("name", "heads"), _modes())
@torch.no_grad()
def test_twins_go_and_the_function_stays(name: str, heads: str) -> None:
    small = random_unet(name)
    wide, originals = widen(small, heads)
    inputs = small_inputs(small)
    wanted = predict(small, inputs)
    limit = 1e-5 * wanted.abs().max()
    assert (predict(wide, inputs) - wanted).abs().max() < limit, "the widened model is another function"

    with torch.enable_grad():
        report = prune_width(wide, Config(0.5, heads=heads))

    assert report.kept == originals
    assert report.heads == heads
    assert report.time_residual < 1e-6
    for key, tensor in report.unet.state_dict().items():
        if not key.startswith("time_embedding.linear_1"):
            torch.testing.assert_close(tensor, small.state_dict()[key], rtol=1e-6, atol=0, msg=key)
    assert (predict(report.unet, inputs) - wanted).abs().max() < limit


@pytest.fixture(scope="module")
def pruned() -> dict[str, UNet]:
    """Every architecture with half of the channels of its deeper levels."""

    def make(name: str) -> UNet:
        unet = random_unet(name, width=2)
        levels = len(unet.config.block_out_channels)
        found = prune_width(unet, Config([0, *[0.5] * (levels - 1)])).unet
        assert found.num_parameters() < unet.num_parameters()
        return found

    return Lazily(make)


def test_a_fresh_process_loads_them_by_stock_diffusers(
    pruned: dict[str, UNet], tmp_path: Path, stranger: Callable[..., str]
) -> None:
    models = {name: (pruned[name], small_inputs(pruned[name])) for name in ARCHITECTURES}
    load_in_fresh_process(models, tmp_path, stranger)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_of_training_moves_every_weight(pruned: dict[str, UNet], name: str) -> None:
    unet = type(pruned[name]).from_config(pruned[name].config).train()
    unet.load_state_dict(pruned[name].state_dict())
    inputs = small_inputs(unet)
    optimizer = torch.optim.SGD(unet.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = unet(**inputs).sample.square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[1] < losses[0]
    assert [key for key, weight in unet.named_parameters() if weight.grad is None] == []


QUICK = ("sdxl", "ddpm")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ARCHITECTURES])
def test_quantized_and_loaded(pruned: dict[str, UNet], name: str, tmp_path: Path) -> None:
    unet = type(pruned[name]).from_config(pruned[name].config).eval()
    unet.load_state_dict(pruned[name].state_dict())
    report = quantize_weights(unet)
    assert report.params > 0.9
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path, dtype=torch.float32)
    inputs = small_inputs(unet)
    assert torch.equal(predict(loaded, inputs), predict(unet, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled(pruned: dict[str, UNet], name: str) -> None:
    inputs = small_inputs(pruned[name])
    wanted = predict(pruned[name], inputs)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(pruned[name])(**inputs).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("heads", "before", "after", "widths"),
    [("remove", [2, 4, 4], [2, 3, 3], [16, 24, 24]), ("narrow", [2, 4, 4], [2, 4, 4], [16, 24, 24])],
)
def test_heads_by_choice(heads: str, before: list[int], after: list[int], widths: list[int]) -> None:
    unet = random_unet("sd 2.x", width=2)
    assert unet.config.attention_head_dim == before
    report = prune_width(unet, Config([0, 0.25, 0.25], heads=heads))
    assert (report.heads, report.widths_after) == (heads, widths)
    assert report.unet.config.attention_head_dim == after
    assert report.unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads == after[2]


def test_whole_heads_leave() -> None:
    unet = random_unet("sd 2.x", width=2)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    attention = unet.get_submodule(name)
    with torch.no_grad():
        attention.to_out[0].weight[:, 8:16] = 0  # the second of four heads of 8 channels adds nothing
    queries = attention.to_q.bias, attention.to_q.weight
    pruned = prune_width(unet, Config([0, 0.25, 0], heads="remove")).unet.get_submodule(name)
    assert (pruned.heads, pruned.scale) == (3, 8**-0.5)
    assert queries[0] is None
    kept = [0, 1, 2, 3, 4, 5, 6, 7, *range(16, 32)]
    into = [i for i in range(32) if torch.isin(queries[1][kept][:, i], pruned.to_q.weight).all()]
    assert torch.equal(pruned.to_q.weight, queries[1][kept][:, into]), "another head left, or queries were rescaled"


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [
        ("ddpm with heads", "narrow", "heads=narrow: expected remove or auto: a UNet2DModel"),
        ("ddpm", "remove", r"level 1: 32$"),
    ],
)
def test_heads_that_cannot(name: str, heads: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_width(random_unet(name, width=2), Config([0, 0.5], heads=heads))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "down_block_types is SkipDownBlock2D; known: Attn"),
        ({"downsample_type": "resnet"}, "downsample_type is resnet; known: conv"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is fourier; known: positional"),
    ],
)
def test_what_a_plain_unet_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_width(random_unet("ddpm", width=2, **change), Config(0.5))


def test_time_embedding_of_a_plain_unet_stays_as_wide() -> None:
    unet = random_unet("ddpm", width=2)
    report = prune_width(unet, Config(0.5))
    assert isinstance(report.unet, UNet2DModel)
    assert report.unet.config.time_embedding_dim == 64
    assert report.unet.time_embedding.linear_1.weight.shape == (64, 8)
    assert 0 < report.time_residual < 1
