"""Any config and any ratio: a stock model that loads, or a refusal before any work that names what is possible."""

import json
import math
import re
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from compress.errors import UserError
from compress.models.inputs import predict, small_inputs
from compress.prune.channels.rebuild import prune_unet
from compress.prune.channels.widths import Shape, check_blocks, choose_shape, level_heads

HEADS = ("auto", "narrow", "remove")
COMMON = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False)


@st.composite
def configs(draw: st.DrawFn, most: int = 6) -> tuple[type, dict[str, Any]]:
    """A class and a config that it can be built from; widths are up to ``most`` times what groups and heads need."""
    levels = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    text = draw(st.booleans())
    attention = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    heads = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=levels, max_size=levels))
    head_dim = draw(st.sampled_from([None, 2, 4]))
    step = [math.lcm(groups, heads[i] if text else head_dim or 1) for i in range(levels)]
    kind = "CrossAttn" if text else "Attn"
    config = {
        "sample_size": 8,
        "block_out_channels": tuple(2 * step[i] * draw(st.integers(1, most)) for i in range(levels)),
        "down_block_types": tuple(f"{kind}DownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple(f"{kind}UpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn" if text else "UNetMidBlock2D", None])),
        "layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": groups,
        "time_embedding_dim": draw(st.sampled_from([None, 10])),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.integers(0, 1)),
    }
    if not text:
        return UNet2DModel, {**config, "attention_head_dim": head_dim, "add_attention": draw(st.booleans())}
    one = len(set(heads)) == 1
    config["attention_head_dim"] = heads[0] if one and draw(st.booleans()) else heads
    config["use_linear_projection"] = draw(st.booleans())
    config["cross_attention_dim"] = draw(st.sampled_from([4, 6]))
    return UNet2DConditionModel, config


RATIOS = st.floats(0.01, 0.95)


def asked(draw: st.DrawFn, levels: int) -> list[float]:
    one = draw(st.one_of(st.none(), RATIOS))
    return [one] * levels if one else [draw(st.one_of(st.just(0.0), RATIOS)) for _ in range(levels)]


def meta(cls: type, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return cls(**config)


@given(data=st.data())
@settings(COMMON, max_examples=60)
def test_a_shape_can_be_built_and_is_what_it_says(data: st.DataObject) -> None:
    cls, config = data.draw(configs(most=12))
    config = dict(meta(cls, config).config)
    ratios = asked(data.draw, len(config["block_out_channels"]))
    heads, multiple = data.draw(st.sampled_from(HEADS)), data.draw(st.sampled_from([None, 1, 2, 8, 10]))
    check_blocks(config)
    try:
        shape = choose_shape(config, ratios, heads, multiple)
    except UserError as error:
        event("refused")
        check_nearest(str(error), config, heads, multiple)
        return
    check_shape(shape, config, ratios, heads)
    built = meta(cls, {key: value for key, value in {**config, **shape.changes}.items() if not key.startswith("_")})
    assert list(built.config.block_out_channels) == shape.widths


def check_nearest(message: str, config: dict[str, Any], heads: str, multiple: int | None) -> None:
    """What a refusal offers can be had."""
    found = re.search(r"the nearest that leaves fewer channels is (\[.*?\])", message)
    if found is None:
        assert message.startswith("heads=") or "no ratio leaves fewer channels" in message
        return
    nearest = json.loads(found[1])
    assert choose_shape(config, nearest, heads, multiple).widths != list(config["block_out_channels"])


def check_shape(shape: Shape, config: dict[str, Any], ratios: list[float], heads: str) -> None:
    old = config["block_out_channels"]
    assert heads in ("auto", shape.heads)
    after = level_heads({**config, **shape.changes})
    for i, (new, was) in enumerate(zip(shape.widths, old, strict=True)):
        assert new == was or (
            new < was and ratios[i] > 0 and new % math.lcm(config["norm_num_groups"], shape.multiple) == 0
        )
        before = level_heads(config)[i]
        if before is not None:
            kept = before if shape.heads == "narrow" else before * new / was
            assert after[i] == kept, "heads that are neither kept nor removed as a whole"
    for i in range(len(old) - 1):
        assert old[i] == old[i + 1] or shape.widths[i] != shape.widths[i + 1]


@given(data=st.data())
@settings(COMMON, max_examples=8)
def test_what_is_pruned_loads_and_computes_the_same(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cls, config = data.draw(configs(most=3))
    torch.manual_seed(0)
    unet = cls(**config).eval()
    ratios = asked(data.draw, len(config["block_out_channels"]))
    if not any(ratios):
        ratios[-1] = 0.5
    scored: list[int] = []

    def scorer(group: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        scored.append(group.size)
        return torch.rand(group.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.prune.channels.time_embedding.ITERATIONS", 2)
        try:
            report = prune_unet(unet, ratios, scorer, data.draw(st.sampled_from(HEADS)))
        except UserError:
            event("refused")
            assert scored == [], "refused after work had begun"
            return
    assert report.params_after < report.params_before
    folder = tmp_path_factory.mktemp("unet")
    report.unet.save_pretrained(folder)
    inputs = small_inputs(unet)
    wanted = predict(report.unet, inputs)
    difference = predict(cls.from_pretrained(folder).eval(), inputs) - wanted
    assert wanted.isfinite().all()
    assert difference.abs().max() <= 1e-5 * wanted.abs().max()


SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
SD21 = {**SD15, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("config", "widths", "mode", "heads"),
    [
        (SD15, [256, 512, 960, 960], "narrow", 8),
        (SD21, [256, 512, 960, 960], "remove", [4, 8, 15, 15]),
        (SDXL, [256, 512, 960], "remove", [5, 8, 15]),
    ],
)
def test_large_models_keep_multiples_of_64(config: dict[str, Any], widths: list[int], mode: str, heads: Any) -> None:
    full = dict(meta(UNet2DConditionModel, config).config)
    shape = choose_shape(full, [0.25] * len(widths))
    assert (shape.widths, shape.heads, shape.multiple) == (widths, mode, 64)
    assert shape.changes.get("attention_head_dim", 8) == heads
    assert choose_shape(full, [0.25] * len(widths), "narrow", multiple=1).widths[-1] == 960


def test_a_multiple_that_leaves_nothing_is_refused_with_what_there_is() -> None:
    config = dict(meta(UNet2DConditionModel, SD15).config)
    with pytest.raises(UserError, match="no ratio leaves fewer channels.*by 1280.*level 0: 320; level 1: 640"):
        choose_shape(config, [0.5] * 4, multiple=1280)
    with pytest.raises(UserError, match=r"the nearest that leaves fewer channels is \[0.0, 0.0, 0.05, 0.0\]"):
        choose_shape(config, [0.001, 0.001, 0.02, 0.001])
