"""Per-layer-width widths: what may leave, what it costs, which target is met, and what the result can be used for."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from omegaconf import OmegaConf
from tiny import tiny_pipeline, tiny_unet

from compress.config.compose import compose
from compress.config.values import build
from compress.data import DataConfig, load_data
from compress.data.calibration import CalibrationConfig
from compress.errors import UserError
from compress.models.inputs import example_inputs, predict, small_inputs
from compress.models.macs import count
from compress.models.outline import Outline
from compress.models.shapes import SHAPEABLE, shaped
from compress.prune import per_layer
from compress.prune.channels.groups import Group, Member
from compress.prune.channels.proxy import meta_model
from compress.prune.channels.target import Target
from compress.prune.importance import families, needs_calibration, parse
from compress.prune.layers.widths import find_widths
from compress.prune.per_layer import KINDS, Config, prune_per_layer
from tests.prune.architectures import ARCHITECTURES, random_unet
from tests.prune.calibrated import calibration_of

OUTLINE = Outline("", {}, {})


def macs(unet: Any) -> int:
    return count(unet, example_inputs(unet)).macs


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("sd 1.x", "remove"),
        ("sd 2.x", "narrow"),
        ("ddpm with heads", "narrow"),
        pytest.param("sdxl", "narrow", marks=pytest.mark.slow),
    ],
)
def test_costs_are_those_of_the_model_that_comes_out(name: str, heads: str) -> None:
    unet = random_unet(name, width=2)
    report = prune_per_layer(unet, Config(target=Target(macs=0.6), heads=heads))
    assert report.left["macs"] == pytest.approx(macs(report.unet) / macs(unet), rel=1e-12)
    assert report.left["params"] == report.params_after / report.params_before
    assert report.params_after == report.unet.num_parameters() < unet.num_parameters() == report.params_before


@pytest.mark.parametrize("unit", ["params", "macs", "bytes"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_target_is_met(unit: str, share: float) -> None:
    report = prune_per_layer(tiny_unet(widths=(32, 64)), Config(target=Target(**{unit: share})))
    assert report.left["params" if unit == "bytes" else unit] == pytest.approx(share, rel=0.02)
    assert report.ranked


def test_a_ratio_is_of_the_parameters() -> None:
    report = prune_per_layer(tiny_unet(widths=(32, 64)), Config(0.4))
    assert report.params_after / report.params_before == pytest.approx(0.6, rel=0.02)
    shares = {round(width.after / width.before, 2) for width in report.widths}
    assert len(shares) > 4, "widths that are all alike need no per-layer widths"


@pytest.mark.parametrize("kind", KINDS)
def test_scope(kind: str) -> None:
    report = prune_per_layer(tiny_unet(widths=(32, 64)), Config(0.03, scope=(kind,)))
    assert {width.kind for width in report.widths} == {kind}
    assert any(width.after < width.before for width in report.widths)
    assert 0 < report.share_params < 1
    assert 0 < report.share_macs <= 1


def test_what_stays_at_least() -> None:
    unet = tiny_unet(widths=(32, 64))
    least = Config(target=Target(params=0.5), min_share=0.5)
    assert all(2 * width.after >= width.before for width in prune_per_layer(unet, least).widths)
    report = prune_per_layer(unet, Config(0.3, multiple=16))
    for width in report.widths:
        heads = 2 if width.kind == "attention" else 1
        assert width.after == width.before or width.after % (16 * heads) == 0
    assert report.skipped["down_blocks.0.attentions.0.transformer_blocks.0.attn1"].startswith("no smaller width fits")
    assert prune_per_layer(unet, Config(0.3)).skipped == {}


def test_large_models_keep_multiples_of_8() -> None:
    with torch.device("meta"):
        unet = ARCHITECTURES["sd 1.x"][0](
            block_out_channels=(320, 640), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=8,
        )  # fmt: skip
    for width in find_widths(unet, "narrow", None, 0.1):
        for group in width.groups:
            channels = [width.size(group, left) for left in width.allowed]
            per_head = 8 if width.kind == "attention" else 1
            assert len(channels) > 1
            assert all(size % (8 * per_head) == 0 for size in channels)
            assert channels[-1] >= 0.1 * channels[0]


@pytest.mark.parametrize("heads", ["narrow", "remove"])
def test_norm_groups_lose_equally(heads: str) -> None:
    unet = random_unet("sd 2.x", width=2)
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.bias.copy_(torch.arange(len(module.bias)))  # tells which channels are left
    report = prune_per_layer(unet, Config(0.5, importance="random", heads=heads))
    narrowed = set()
    for name, module in report.unet.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            old = unet.get_submodule(name)
            group = module.bias.long() // (old.num_channels // old.num_groups)
            assert module.num_groups == old.num_groups
            assert torch.equal(
                group, torch.arange(module.num_groups).repeat_interleave(len(group) // module.num_groups)
            )
            narrowed.add(module.num_channels / old.num_channels)
    assert len(narrowed) > 2, "all norms lost the same share"


def test_the_scale_of_narrowed_heads_goes_into_the_query() -> None:
    unet = tiny_unet(widths=(32, 64))
    report = prune_per_layer(unet, Config(0.03, scope=("attention",)))
    width = min(report.widths, key=lambda width: width.after / width.before)
    old, new = unet.get_submodule(width.name), report.unet.get_submodule(width.name)
    assert new.to_q.out_features == width.after < width.before
    assert new.scale == (width.after // 2) ** -0.5
    scaled = old.to_q.weight * (width.after / width.before) ** 0.5
    nearest = torch.cdist(new.to_q.weight, scaled, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 1e-5
    assert torch.equal(new.to_k.weight, old.to_k.weight[nearest.indices]), "queries and keys are of other channels"


@pytest.mark.parametrize(
    ("name", "heads"),
    [("bk-sdm base", "narrow"), ("sd 2.x", "remove"), ("ddpm with heads", "narrow"), ("ddpm with heads", "remove")],
)
def test_a_shaped_unet_has_the_widths_of_a_stock_one_of_its_shape(name: str, heads: str) -> None:
    cls, config = ARCHITECTURES[name]
    with torch.device("meta"):
        small = cls(**config)
        wide = cls(**{**config, "block_out_channels": tuple(2 * width for width in config["block_out_channels"])})
    layers: dict[str, dict[str, int]] = {}
    for layer, module in small.named_modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            layers[layer] = {"channels": len(module.weight)}
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            layers[layer] = {"in": module.weight.shape[1], "out": module.weight.shape[0]}
        elif hasattr(module, "to_q"):
            layers[layer] = {"heads": module.heads}
    same = meta_model(SHAPEABLE[cls], {**wide.config, "layers": layers})
    found, expected = (find_widths(unet, heads, None, 0.1) for unet in (same, small))
    assert [vars(width) | {"groups": len(width.groups)} for width in found] == [
        vars(width) | {"groups": len(width.groups)} for width in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        for group, other in zip(ours.groups, theirs.groups, strict=True):
            assert (group.size, group.borders, group.unit) == (other.size, other.borders, other.unit)
            for member, like in zip(members(group), members(other), strict=True):
                assert member.axis == like.axis
                assert torch.equal(member.index, like.index)
                assert torch.equal(member.root, like.root)


def members(group: Group) -> list[Member]:
    return [*group.members, *group.followers]


def test_twice() -> None:
    once = prune_per_layer(tiny_unet(widths=(32, 64)), Config(0.2))
    twice = prune_per_layer(once.unet, Config(0.3))
    assert [width.before for width in twice.widths] == [width.after for width in once.widths]
    assert twice.params_after / once.params_after == pytest.approx(0.7, rel=0.02)
    assert predict(twice.unet, small_inputs(twice.unet)).isfinite().all()


@pytest.mark.parametrize("name", sorted(families().keys() - {"l2", "random"}))
def test_every_importance_finds_what_nobody_reads(name: str) -> None:
    unet = tiny_unet(widths=(16, 32))
    silent = "mid_block.attentions.0.transformer_blocks.0.ff"
    with torch.no_grad():
        unet.get_submodule(f"{silent}.net.2").weight[:, ::2] = 0
    importance = {"name": name, "timesteps": 3} if name == "diff_pruning" else name
    config = Config(0.08, importance=importance, scope=("ffn_inner",))
    calibration = calibration_of(unet) if needs_calibration(parse(name)) else None
    report = prune_per_layer(unet, config, calibration=calibration)
    left = report.unet.get_submodule(f"{silent}.net.2").weight
    assert (left.abs().sum(0) > 0).all()
    assert report.unet.get_submodule(f"{silent}.net.2").in_features <= 64


def test_the_stage(tiny_parquet: Path) -> None:
    pipeline = tiny_pipeline()
    before = pipeline.unet.num_parameters()
    context = SimpleNamespace(seed=0, data=load_data(DataConfig(str(tiny_parquet), split_column="split")))
    config = Config(importance="activation", calibration=CalibrationConfig(examples=4))
    report = per_layer.run(pipeline, config, context)
    assert pipeline.unet.num_parameters() == report.details["params_after"] < before
    assert report.details["calibration"] == "4 training images with captions"
    json.dumps(report.details)
    assert report.details["config_after"]["ffn_inner channels"] < report.details["config_before"]["ffn_inner channels"]
    assert set(report.coverage) == {"params", "macs", "modules", "skipped"}
    assert {width["kind"] for width in report.details["widths"]} == set(KINDS)
    assert len(report.details["kept"]["mid_block"]) == pipeline.unet.mid_block.resnets[0].conv2.out_channels


def test_a_pipeline_without_text() -> None:
    pipeline = DDPMPipeline(random_unet("ddpm", width=2), DDPMScheduler())
    report = per_layer.run(pipeline, Config(target=Target(macs=0.5)), SimpleNamespace(seed=0))
    assert report.details["left"]["macs"] == pytest.approx(0.5, rel=0.02)


def test_config_of_the_project_is_the_default() -> None:
    stage = OmegaConf.to_container(compose(["recipe=prune", "prune=per_layer"]).stages.prune)
    assert (stage.pop("kind"), stage.pop("method")) == ("prune", "per_layer")
    assert build(Config, stage, "stages.prune") == Config()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"ratio": 1}, "ratio=1.0: expected the share of the parameters to remove, a number in (0, 1)"),
        ({"ratio": "half"}, "ratio=half: expected a number"),
        ({"target": {"macs": 1.5}}, "target.macs=1.5: expected the share to be left"),
        ({"scope": []}, "scope=[]: expected a list of resnet_inner, ffn_inner, attention, residual, at least one"),
        ({"scope": ["heads"]}, "scope=['heads']: expected a list of resnet_inner"),
        ({"normalize": "sum"}, "normalize=sum: expected auto or none or mean or max"),
        ({"per": "mac"}, "per=mac: expected channel or cost"),
        ({"heads": "auto"}, "heads=auto: expected narrow or remove"),
        ({"min_share": 1.1}, "min_share=1.1: expected a number in [0, 1]"),
        ({"multiple": 0}, "multiple=0: expected a whole number of at least 1, or null"),
        ({"importance": "l3"}, "importance=l3: no such importance"),
        ({"ratios": 0.3}, "ratios: no such key (did you mean ratio?)"),
    ],
)
def test_bad_configs(values: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Config, values, "")
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(target=Target(params=0.01)), r"^target\.params=0\.01: no widths in scope leave.*nearest found: 0\.0"),
        (Config(0.2, scope=("attention",)), r"^ratio=0\.2: no widths in scope leave.*nearest found: 0\.94"),
        (Config(multiple=256), r"^ratio=0\.25: no width of this UNet can be narrowed: lower multiple"),
        (Config(importance="taylor"), "importance=taylor: examples are needed"),
    ],
)
def test_what_cannot_be_met(config: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_per_layer(tiny_unet(widths=(32, 64)), config)


def test_models_that_cannot_be_pruned() -> None:
    with pytest.raises(UserError, match="resnet_time_scale_shift is scale_shift; known: default"):
        prune_per_layer(random_unet("ddpm", resnet_time_scale_shift="scale_shift"))
    unet = tiny_unet()
    weight = unet.conv_in.weight.detach()
    layers = {"conv_in": {"in": 4, "out": 32, "rank": 4}}
    parts = {"conv_in.reduce.weight": weight[:4], "conv_in.expand.weight": torch.zeros(32, 4, 1, 1)}
    kept = {key: value for key, value in unet.state_dict().items() if key not in ("conv_in.weight", "conv_in.bias")}
    product = shaped(unet, layers, {**kept, **parts, "conv_in.expand.bias": torch.zeros(32)})
    with pytest.raises(UserError, match=r"1 of its layers are factored \(the first: conv_in\)"):
        prune_per_layer(product)
    with pytest.raises(UserError, match="this one has Linear"):
        per_layer.check(Config(), torch.nn.Linear(1, 1), OUTLINE)
    with pytest.raises(UserError, match="UNet2DConditionModel or UNet2DModel; SimpleNamespace has no unet"):
        per_layer.run(SimpleNamespace(), Config(), SimpleNamespace())
