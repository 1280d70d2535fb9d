"""Width pruning inside of a transformer's blocks: planted channels and heads go, and stock diffusers loads the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SanaTransformer2DModel
from omegaconf import OmegaConf
from pipelines import PIPELINES, sample

from compress.config.values import build
from compress.errors import UserError
from compress.models.inputs import captured_inputs, example_inputs, predict
from compress.models.macs import count_macs
from compress.models.meta import meta_model
from compress.prune import transformer_width
from compress.prune.transformer_width import Config, check, prune_transformer_width
from compress.store.checkpoint import save_checkpoint

HIDDEN, HEADS, HEAD = 80, 4, 8  # hidden is 2.5 times the width of 32


def sana(**changes: Any) -> SanaTransformer2DModel:
    """The transformer of the tiny pipeline with four heads of cross-attention."""
    given = PIPELINES["sana"]().transformer
    changes = {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD, **changes}
    config = {key: value for key, value in given.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    return SanaTransformer2DModel(**{**config, **changes}).eval()


def difference(model: torch.nn.Module, other: torch.nn.Module) -> float:
    """Largest difference of two models' outputs over the largest output."""
    inputs = example_inputs(model, 2, side=8, tokens=8, seed=0)
    expected = predict(model, inputs)
    return ((predict(other, inputs) - expected).abs().max() / expected.abs().max()).item()


def random_half(size: int, seed: int) -> tuple[list[int], list[int]]:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[: size // 2]), sorted(order[size // 2 :])


@torch.no_grad()
@pytest.mark.parametrize("silent", ["value", "gate", "reader"])
def test_hidden_channels_without_effect_are_those_that_go(silent: str) -> None:
    model, expected = sana(), {}
    for i, block in enumerate(model.transformer_blocks):
        gone, expected[f"transformer_blocks.{i}.ff"] = random_half(HIDDEN, i)
        if silent == "reader":
            block.ff.conv_point.weight[:, gone] = 0
        else:
            rows = [index + (HIDDEN if silent == "gate" else 0) for index in gone]
            for layer in (block.ff.conv_inverted, block.ff.conv_depth):
                layer.weight[rows] = 0
                layer.bias[rows] = 0
    report = prune_transformer_width(model, Config(feed_forward=0.5))
    assert report.channels == expected and not report.heads
    assert report.config_after == {"mlp_ratio": 1.25} and report.config_before == {"mlp_ratio": 2.5}
    assert difference(model, report.transformer) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
@pytest.mark.parametrize("silent", ["to_v", "to_out"])
def test_heads_without_effect_are_those_that_go(silent: str, qk_norm: str | None) -> None:
    model, expected = sana(qk_norm=qk_norm), {}
    for i, block in enumerate(model.transformer_blocks):
        gone, expected[f"transformer_blocks.{i}.attn2"] = random_half(HEADS, i)
        rows = [HEAD * head + i for head in gone for i in range(HEAD)]
        if silent == "to_out":
            block.attn2.to_out[0].weight[:, rows] = 0
        silenced = [block.attn2.to_v] if silent == "to_v" else []
        if qk_norm == "rms_norm_across_heads":  # where queries and keys of all heads share a norm
            silenced += [block.attn2.to_q, block.attn2.to_k]
            block.attn2.norm_q.weight.uniform_(0.5, 1.5)
            for layer in (block.attn2.to_q, block.attn2.to_k):
                layer.weight *= 10  # the norm takes it out again, and its epsilon no longer counts
        for layer in silenced:
            layer.weight[rows] = 0
            layer.bias[rows] = 0
    report = prune_transformer_width(model, Config(feed_forward=0, heads=0.5))
    assert report.heads == expected and not report.channels
    assert report.config_after == {"num_cross_attention_heads": 2}
    assert difference(model, report.transformer) < 1e-5


def test_both_at_once_by_magnitude_with_costs_that_add_up() -> None:
    model = sana(guidance_embeds=True)
    given = {key: values.clone() for key, values in model.state_dict().items()}
    report = prune_transformer_width(model, Config(feed_forward=0.3, heads=0.25))
    assert all(torch.equal(values, given[key]) for key, values in model.state_dict().items())
    left = report.transformer
    assert type(left) is SanaTransformer2DModel and left.config.num_cross_attention_heads == 3
    assert [block.ff.conv_depth.groups for block in left.transformer_blocks] == [2 * 56] * 3
    SanaTransformer2DModel.from_config(left.config).load_state_dict(left.state_dict(), strict=True)
    ff, attn = model.transformer_blocks[1].ff, model.transformer_blocks[1].attn2
    kept, heads = report.channels["transformer_blocks.1.ff"], report.heads["transformer_blocks.1.attn2"]
    narrow = left.transformer_blocks[1]
    rows = kept + [HIDDEN + index for index in kept]
    assert torch.equal(narrow.ff.conv_inverted.weight, ff.conv_inverted.weight[rows])
    assert torch.equal(narrow.ff.conv_depth.bias, ff.conv_depth.bias[rows])
    assert torch.equal(narrow.ff.conv_point.weight, ff.conv_point.weight[:, kept])
    rows = [HEAD * head + i for head in heads for i in range(HEAD)]
    assert torch.equal(narrow.attn2.to_k.weight, attn.to_k.weight[rows])
    assert torch.equal(narrow.attn2.to_out[0].weight, attn.to_out[0].weight[:, rows])

    touched = sum(p.numel() for block in model.transformer_blocks for part in (block.ff, block.attn2)
                  for p in part.parameters())  # fmt: skip
    params = sum(p.numel() for p in model.parameters())
    macs = count_macs(model, example_inputs(model))
    ours = sum(macs.by_module[f"transformer_blocks.{i}.{part}"] for i in range(3) for part in ("ff", "attn2"))
    assert report.share_params == touched / params and report.share_macs == ours / macs.total
    assert report.modules == 3 * (3 + 4)
    assert (report.params_before, report.macs_before) == (params, macs.total)
    assert report.params_after == sum(p.numel() for p in left.parameters()) < params
    assert report.macs_after == count_macs(left, example_inputs(left)).total < macs.total
    assert repr(report).startswith("TransformerWidthReport(21 modules, params 0.")


def test_a_run_leaves_a_stock_pipeline(tmp_path: Path) -> None:
    pipeline = PIPELINES["sana"]()
    model = pipeline.transformer
    config = Config(feed_forward=0.5, heads=0.5)
    expected = prune_transformer_width(model, config, inputs=captured_inputs(pipeline))
    report = transformer_width.run(pipeline, config, None)  # type: ignore[arg-type]
    assert report.coverage["params"] == expected.share_params and report.coverage["macs"] == expected.share_macs
    assert report.details["heads"] == expected.heads
    save_checkpoint(pipeline, tmp_path / "checkpoint", {"stages": []})
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "checkpoint")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is SanaTransformer2DModel
    assert loaded.transformer.config.mlp_ratio == 1.25 and loaded.transformer.config.num_cross_attention_heads == 1
    assert abs(sample(loaded, "sana") - sample(pipeline, "sana")).max() <= 1e-5


@pytest.mark.parametrize(("feed_forward", "multiple"), [(0.1, None), (0.33, 1), (0.51, 8), (0.97, 3)])
def test_the_meta_device_model_of_a_check_is_what_pruning_leaves(feed_forward: float, multiple: int | None) -> None:
    config, model = Config(feed_forward=feed_forward, heads=0.4, multiple=multiple), sana()
    before = check(config, meta_model(type(model), model.config))
    left = prune_transformer_width(model, config).transformer
    assert {name: p.shape for name, p in before.named_parameters()} == {n: p.shape for n, p in left.named_parameters()}
    assert {p.device.type for p in before.parameters()} == {"meta"}
    assert left.transformer_blocks[0].ff.conv_point.in_channels % (multiple or 1) == 0


def test_every_hidden_width_has_a_ratio() -> None:
    """``int(mlp_ratio * width)`` gives what was asked for, also where the quotient was rounded down."""
    model = meta_model(SanaTransformer2DModel, {**sana().config, "attention_head_dim": 9, "cross_attention_dim": 36})
    hidden = model.transformer_blocks[0].ff.conv_point.in_channels
    for left in range(1, hidden):
        narrow: Any = check(Config(feed_forward=1 - left / hidden), model)
        assert narrow.transformer_blocks[0].ff.conv_point.in_channels == left


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "sd 1.x"])
@pytest.mark.parametrize("key", ["feed_forward", "heads"])
def test_what_no_config_key_can_say_is_refused(name: str, key: str) -> None:
    pipeline = PIPELINES[name]()
    given: Any = getattr(pipeline, "unet", None) or pipeline.transformer
    model = meta_model(type(given), given.config)
    with pytest.raises(UserError, match=f"^{key}=0.5: no config key of {type(given).__name__} .*prune=depth"):
        check(Config(**{"feed_forward": 0.0, key: 0.5}), model)


def test_shares_that_remove_nothing_or_all_are_refused() -> None:
    model = meta_model(SanaTransformer2DModel, sana().config)
    with pytest.raises(UserError, match="heads=0.1: expected a share that removes and leaves some of 4 heads of cross"):
        check(Config(heads=0.1), model)
    with pytest.raises(UserError, match="feed_forward=0.999: expected .* 80 hidden channels, in multiples of 1"):
        check(Config(feed_forward=0.999), model)
    with pytest.raises(UserError, match="heads=0.5: qk_norm=layer_norm_across_heads"):
        check(Config(heads=0.5), meta_model(type(model), {**model.config, "qk_norm": "layer_norm_across_heads"}))


def test_config_of_the_project_is_the_default() -> None:
    folder = Path(transformer_width.__file__).parents[2] / "conf" / "prune"
    keys = OmegaConf.to_container(OmegaConf.load(folder / "transformer_width.yaml"))
    assert (keys.pop("kind"), keys.pop("method")) == ("prune", "transformer_width")
    assert build(Config, keys, "stages.prune") == Config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"feed_forward": 1}, r"prune.feed_forward=1.0: expected a number in \[0, 1\)"),
        ({"heads": -0.5}, r"prune.heads=-0.5: expected a number in \[0, 1\)"),
        ({"feed_forward": 0}, r"prune.feed_forward=0.0: expected a number in \(0, 1\) if heads=0"),
        ({"multiple": 0}, r"prune.multiple=0: expected a whole number of at least 1"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Config, values, "prune")
