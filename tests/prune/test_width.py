"""Magnitude pruning of a random UNet: shapes, what the report says, the refit, and bad input."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from omegaconf import OmegaConf

from compress.config.compose import compose
from compress.config.values import build
from compress.errors import UserError
from compress.prune import width
from compress.prune.channels.time_embedding import refit
from compress.prune.channels.widths import choose_shape, level_steps
from compress.prune.width import Config
from tests.prune.by_magnitude import prune_channels

Change = dict[str, object]


def unet_of(**config: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
    }
    return UNet2DConditionModel(**{**defaults, **config}).eval()


def two_levels(**config: object) -> UNet2DConditionModel:
    blocks = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return unet_of(**{**blocks, **config})


@torch.no_grad()
def output(unet: UNet2DConditionModel, **more: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return unet(sample, torch.tensor([3, 700]), text, **more).sample


@pytest.fixture
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.channels.time_embedding.ITERATIONS", 3)


@pytest.mark.usefixtures("few_iterations")
def test_saved_and_loaded_by_stock_diffusers(tmp_path: Path) -> None:
    unet = unet_of()
    report = prune_channels(unet, 0.5)
    assert report.widths_after == [8, 16, 32]
    report.unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert loaded.config.block_out_channels == [8, 16, 32]
    assert loaded.config.time_embedding_dim == 64
    wanted = output(report.unet)
    assert (output(loaded) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert unet.config.block_out_channels == (16, 32, 64), "the model given was changed"


@pytest.mark.usefixtures("few_iterations")
def test_layers_narrow_with_their_level() -> None:
    pruned = prune_channels(unet_of(), 0.5).unet
    block = pruned.down_blocks[2].attentions[0].transformer_blocks[0]
    assert block.attn2.to_q.weight.shape == (32, 32)
    assert block.attn2.to_k.weight.shape == (32, 12)
    assert (block.attn1.heads, block.attn1.scale) == (4, 8**-0.5)
    assert block.ff.net[0].proj.weight.shape == (2 * 4 * 32, 32)
    assert block.ff.net[2].weight.shape == (32, 4 * 32)
    assert pruned.down_blocks[2].resnets[0].time_emb_proj.weight.shape == (32, 64)
    assert pruned.up_blocks[0].upsamplers[0].conv.weight.shape == (32, 32, 3, 3)


@pytest.mark.usefixtures("few_iterations")
def test_geglu_halves_lose_the_same_channels() -> None:
    unet = two_levels()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net"
    alive = torch.zeros(64, dtype=torch.bool)
    alive[torch.randperm(64)[:32]] = True
    with torch.no_grad():
        unet.get_submodule(f"{name}.2").weight[:, ~alive] = 0
        unet.get_submodule(f"{name}.0.proj").bias.copy_(torch.arange(128))
    pruned = prune_channels(unet, 0.5).unet
    kept = torch.arange(64)[alive]
    assert torch.equal(pruned.get_submodule(f"{name}.0.proj").bias.long(), torch.cat([kept, kept + 64]))


def test_one_ratio_per_level() -> None:
    report = prune_channels(unet_of(), [0, 0.5, 0.25])
    assert report.widths_after == [16, 24, 48]  # 16 would do away with the shortcut between the levels
    assert report.ratios_achieved == [0, 0.25, 0.25]
    assert report.time_residual == 0
    assert report.kept["down_blocks.0"] == list(range(16))
    assert {name: len(kept) for name, kept in report.kept.items()} == {
        "down_blocks.0": 16,
        "down_blocks.1": 24,
        "down_blocks.2": 48,
        "mid_block": 48,
        "up_blocks.0": 48,
        "up_blocks.1": 24,
        "up_blocks.2": 16,
    }
    # Levels 1 and 0 are concatenated and lost different shares.
    assert "up_blocks.1.resnets.1.norm1" in report.norms_regrouped
    assert "conv_norm_out" not in report.norms_regrouped
    assert output(report.unet).isfinite().all()


def test_equal_widths_pruned_differently_get_a_shortcut_of_the_kept_channels() -> None:
    unet = unet_of(block_out_channels=(32, 32, 64))
    report = prune_channels(unet, [0, 0.5, 0])
    assert report.widths_after == [32, 16, 64]
    shortcut = report.unet.down_blocks[1].resnets[0].conv_shortcut
    kept = report.unet.down_blocks[1].resnets[0].conv2.weight.shape[0]
    assert shortcut.weight.sum(1).flatten().tolist() == [1.0] * kept
    assert shortcut.bias.abs().max() == 0
    assert output(report.unet).isfinite().all()


@pytest.mark.parametrize(
    ("widths", "ratios", "wanted"),
    [
        ((24, 40, 56), [0.3, 0.3, 0.3], [16, 32, 40]),
        ((16, 48, 80), [0.3, 0.3, 0.3], [8, 32, 56]),
        ((16, 32, 64), [0.2, 0.2, 0.2], [16, 24, 48]),
        ((32, 32, 64), [0.25, 0.5, 0], [24, 16, 64]),
    ],
)
def test_widths_are_the_nearest_possible(widths: tuple[int, ...], ratios: list[float], wanted: list[int]) -> None:
    assert choose_shape(unet_of(block_out_channels=widths).config, ratios).widths == wanted


def test_widths_fit_groups_and_the_heads_of_levels_with_attention() -> None:
    config = unet_of(block_out_channels=(16, 48, 96), attention_head_dim=(3, 12, 16)).config
    assert level_steps(config, "narrow") == [8, 24, 16]
    assert level_steps(config, "remove") == [8, 8, 24]
    assert level_steps(config) == [8, 8, 24]  # twelve widths to choose from against ten
    assert level_steps(config, "remove", multiple=6) == [24, 24, 24]


@pytest.mark.usefixtures("few_iterations")
def test_odd_widths_and_a_level_that_cannot_follow() -> None:
    unet = two_levels(block_out_channels=(24, 40), attention_head_dim=4)
    report = prune_channels(unet, 0.3)
    assert report.widths_after == [16, 32]
    assert report.ratios_asked == [0.3, 0.3]
    assert report.ratios_achieved == pytest.approx([1 / 3, 0.2])
    assert report.skipped == {}
    assert output(report.unet).isfinite().all()
    report = prune_channels(two_levels(), 0.2)
    assert report.widths_after == [16, 24]
    assert list(report.skipped) == ["level 0"]


@pytest.mark.usefixtures("few_iterations")
def test_like_sdxl() -> None:
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = unet_of(
        **extra,
        projection_class_embeddings_input_dim=6 * 8 + 10,
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2, 3],
        attention_head_dim=[2, 4, 8],
    )
    added = {"text_embeds": torch.ones(2, 10), "time_ids": torch.ones(2, 6)}
    report = prune_channels(unet, 0.5)
    assert report.widths_after == [8, 16, 32]
    assert len(report.unet.mid_block.attentions[0].transformer_blocks) == 3
    assert output(report.unet, added_cond_kwargs=added).isfinite().all()


@pytest.mark.usefixtures("few_iterations")
def test_half_precision_stays_and_nothing_is_random() -> None:
    unet = two_levels().to(torch.bfloat16)
    torch.manual_seed(1)
    first = prune_channels(unet, 0.5).unet.state_dict()
    state = torch.get_rng_state()
    second = prune_channels(unet, 0.5).unet.state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_combine_decides_about_a_channel_that_nothing_reads() -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = two_levels(**blocks, mid_block_type=None)
    name = "down_blocks.1.resnets.0"
    with torch.no_grad():
        unet.get_submodule(f"{name}.conv2").weight[:, 0] = 0
        unet.get_submodule(f"{name}.conv1").weight[0] = 9
    for combine, survives in (("product", False), ("sum", True)):
        pruned = prune_channels(unet, [0, 0.25], combine=combine).unet
        assert (pruned.get_submodule(f"{name}.conv1").weight == 9).any() == survives


def test_time_embedding_is_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.channels.time_embedding.ITERATIONS", 200)
    unet = two_levels(block_out_channels=(32, 48))
    with torch.no_grad():  # a trained embedding uses high frequencies little
        frequencies = torch.exp(-torch.arange(16) / 16 * 9.2).repeat(2)
        unet.time_embedding.linear_1.weight.mul_(3 / (1 + 50 * frequencies))
    report = prune_channels(unet, 0.25)
    assert report.widths_after == [24, 40]
    steps = torch.arange(1000)
    with torch.no_grad():
        wanted = unet.time_embedding(unet.time_proj(steps))
        found = report.unet.time_embedding(report.unet.time_proj(steps))
    error = float((found - wanted).norm() / wanted.norm())
    assert error == pytest.approx(report.time_residual, rel=1e-3)
    assert error < 0.1


@torch.no_grad()
def test_refit_finds_an_exact_solution() -> None:
    embedding = two_levels().time_embedding
    narrow = torch.randn(1000, 16)
    fitted, residual = refit(embedding, narrow, torch.cat([narrow @ torch.randn(16, 16), torch.randn(1000, 8)], 1))
    assert residual < 1e-6
    assert fitted.linear_1.weight[:, 16:].abs().max() < 1e-6


class Pipeline(DiffusionPipeline):
    """The least that has a denoiser."""

    def __init__(self, unet: torch.nn.Module, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


@pytest.mark.usefixtures("few_iterations")
def test_stage_replaces_the_unet_and_reports() -> None:
    unet = two_levels()
    pipeline = Pipeline(unet, DDPMScheduler())
    report = width.run(pipeline, Config(ratio=0.5), SimpleNamespace(seed=0))
    assert pipeline.unet.config.block_out_channels == (8, 16)
    details, coverage = json.loads(json.dumps(report.details, allow_nan=False)), report.coverage
    assert details["params_before"] == unet.num_parameters()
    assert details["params_after"] == pipeline.unet.num_parameters()
    assert (details["widths_before"], details["widths_after"]) == ([16, 32], [8, 16])
    # Every layer reads or writes a level, but for the time embedding, which is refitted.
    assert coverage == {"params": 1.0, "macs": 1.0, "modules": coverage["modules"], "skipped": {}}


def test_coverage_counts_only_what_lost_channels() -> None:
    unet = unet_of()
    coverage = width.run(Pipeline(unet, DDPMScheduler()), Config(ratio=[0, 0, 0.5]), SimpleNamespace(seed=0)).coverage
    assert 0.5 < coverage["params"] < 1
    assert 0.1 < coverage["macs"] < coverage["params"]


def test_config_of_the_project_is_the_default() -> None:
    stage = OmegaConf.to_container(compose(["recipe=prune"]).stages.prune)
    assert (stage.pop("kind"), stage.pop("method")) == ("prune", "width")
    assert build(Config, stage, "stages.prune") == Config()
    assert build(Config, {"ratio": [0.1, 0]}, "").ratio == [0.1, 0]


@pytest.mark.parametrize("ratio", [0, 1, 1.2, -0.1, "abc", True, float("nan"), [], [0, 0], [0.5, 1], ["a"]])
def test_bad_ratios(ratio: object) -> None:
    with pytest.raises(UserError, match=r"^ratio=.*: expected .*\(0, 1\)|^ratio=\[.*: expected .*\[0, 1\)"):
        Config(ratio=ratio)


def test_bad_names() -> None:
    with pytest.raises(
        UserError, match=r"importance=l3: no such importance; known: activation, diff_pruning, hessian, l1, "
    ):
        prune_channels(two_levels(), importance="l3")
    with pytest.raises(UserError, match=r"importance\.combine=max: expected product, sum or outgoing"):
        prune_channels(two_levels(), combine="max")
    with pytest.raises(UserError, match=r"importance\.name is missing: expected one of activation, "):
        Config(importance={"combine": "sum"})
    with pytest.raises(UserError, match=r"importance\.seed: no such key; known: name, combine"):
        Config(importance={"name": "l1", "seed": 1})
    with pytest.raises(UserError, match="importance=3: expected one of activation, "):
        Config(importance=3)


@pytest.mark.parametrize(
    ("config", "ratio", "message"),
    [
        ({}, [0.5, 0.5], "3: one for each level"),
        ({"norm_num_groups": 16, "block_out_channels": (16, 16, 16)}, 0.5, "level 0: 16; level 1: 16"),
        ({}, 0.01, "level 2: 8, 16, 24, 32, 40, 48, 56, 64"),
        ({"resnet_time_scale_shift": "scale_shift"}, 0.5, "resnet_time_scale_shift is scale_shift; known: default"),
        ({"class_embed_type": "timestep"}, 0.5, "class_embedding.linear_1.weight"),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}, 0.5, "is AttnDownBlock2D; known"),
    ],
)
@pytest.mark.usefixtures("few_iterations")
def test_what_cannot_be_pruned(config: Change, ratio: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_channels(unet_of(**config), ratio)


def test_weights_that_are_not_those_of_a_float_unet() -> None:
    unet = two_levels()
    unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"conv_in\.weight holds NaN"):
        prune_channels(unet)
    unet = two_levels()
    unet.conv_in.lora = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"conv_in\.lora\.bias"):
        prune_channels(unet)


def test_a_pipeline_with_another_denoiser() -> None:
    other = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="UNet2DConditionModel or UNet2DModel; SimpleNamespace has Linear"):
        width.run(SimpleNamespace(unet=other), Config(), SimpleNamespace())
    with pytest.raises(UserError, match="has no unet"):
        width.run(SimpleNamespace(transformer=other), Config(), SimpleNamespace())
