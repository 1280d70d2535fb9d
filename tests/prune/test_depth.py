"""Depth pruning by measured effect: what the search does, what its results are good for, and what is refused."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionInpaintPipeline
from omegaconf import OmegaConf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress.config.values import build
from compress.data.calls import Call, CallsConfig, record_calls
from compress.data.examples import Examples
from compress.distill import features
from compress.distill.alignment import kept_channels
from compress.distill.features import distill
from compress.errors import UserError
from compress.models.conditions import Conditions
from compress.models.inputs import Inputs
from compress.prune import depth
from compress.prune.bk_sdm import prune_bk_sdm
from compress.prune.blocks.effect import prediction_error
from compress.prune.blocks.subject import DepthReport
from compress.prune.depth import Config, DepthTarget, prune_depth
from compress.quantize.int8 import quantize_weights
from tests.prune.blocks_models import calls_of, flux, pixart, sd3, sdxl_like, transformer_inputs, unet_inputs, unet_of
from tests.prune.fresh_load import Lazily, load_in_fresh_process
from tests.tiny import tiny_pipeline, tiny_unet

RESULTS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "UNet": (unet_of, 0.4),
    "UNet, as little as can be": (unet_of, 0.8),
    "one layer a level": (lambda: unet_of(layers_per_block=1, block_out_channels=(8, 16, 24)), 0.3),
    "SDXL": (sdxl_like, 0.4),
    "inpainting": (lambda: unet_of(in_channels=9), 0.4),
    "PixArt": (pixart, 0.3),
    "SD3": (sd3, 0.3),
    "Flux": (flux, 0.3),
}


def inputs_of(model: nn.Module) -> dict[str, Any]:
    return transformer_inputs(model) if "Transformer" in type(model).__name__ else unet_inputs(model)


def macs_of(model: nn.Module, inputs: dict[str, Any]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops() // 2


@dataclass
class Pruned:
    """A random denoiser before and after."""

    given: nn.Module
    inputs: Inputs
    calls: list[Call]
    report: DepthReport


@pytest.fixture(scope="module")
def pruned() -> dict[str, Pruned]:
    def made(case: str) -> Pruned:
        make, ratio = RESULTS[case]
        model = make()
        inputs = inputs_of(model)
        calls = calls_of(model, inputs)
        return Pruned(model, inputs, calls, prune_depth(model, calls, Config(ratio=ratio)))

    return Lazily(made)


@pytest.mark.parametrize("case", RESULTS)
def test_the_report_is_what_was_done(case: str, pruned: dict[str, Pruned]) -> None:
    one, ratio = pruned[case], RESULTS[case][1]
    report = one.report
    assert report.params_before == sum(p.numel() for p in one.given.parameters())
    assert report.params_after == sum(p.numel() for p in report.denoiser.parameters())
    assert report.params_after <= (1 - ratio) * report.params_before
    assert report.macs_before == macs_of(one.given, one.inputs)
    assert report.macs_after == macs_of(report.denoiser, one.inputs)
    assert report.modules > 0
    last = report.removed[-1]
    assert (last["params"], last["macs"]) == (report.params_after, report.macs_after)
    assert last["error"] == pytest.approx(prediction_error(report.denoiser, one.calls), rel=1e-4)
    assert report.removed[0]["error"] == min(report.effects.values())
    assert report.config_after.keys() == report.config_before.keys() != set()


def test_results_load_in_a_fresh_process(
    pruned: dict[str, Pruned], tmp_path: Path, stranger: Callable[..., str]
) -> None:
    models = {case: (pruned[case].report.denoiser, pruned[case].inputs) for case in RESULTS}
    load_in_fresh_process(models, tmp_path, stranger)


@pytest.mark.parametrize("case", RESULTS)
def test_results_train(case: str, pruned: dict[str, Pruned]) -> None:
    model, inputs = copy.deepcopy(pruned[case].report.denoiser), pruned[case].inputs
    optimizer = torch.optim.SGD(model.train().requires_grad_(True).parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(**inputs)[0].square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == "SDXL" else pytest.mark.slow) for c in RESULTS])
@torch.no_grad()
def test_results_quantize(case: str, pruned: dict[str, Pruned], tmp_path: Path) -> None:
    model, inputs = copy.deepcopy(pruned[case].report.denoiser), pruned[case].inputs
    assert quantize_weights(model).params > 0
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", RESULTS)
@torch.no_grad()
def test_results_compile(case: str, pruned: dict[str, Pruned]) -> None:
    model, inputs = pruned[case].report.denoiser, pruned[case].inputs
    wanted = model(**inputs)[0]
    torch.compiler.reset()
    found = torch.compile(model)(**inputs)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_everything_that_can_go_goes() -> None:
    unet = unet_of(layers_per_block=1, block_out_channels=(8, 16, 24))
    calls = calls_of(unet, unet_inputs(unet))
    kinds = ("layers", "mid_block", "levels")
    with pytest.raises(
        UserError, match=r"^ratio=0.9: expected at most 0\.\d+: removing all possible layers, mid_block, levels"
    ) as info:
        prune_depth(unet, calls, Config(ratio=0.9, remove=kinds))
    most = float(str(info.value).split("at most ")[1].split(":")[0])
    report = prune_depth(unet, calls, Config(ratio=most, remove=kinds))
    assert report.config_after == {
        "layers_per_block": [0, 1, 1],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "mid_block_type": None,
    }
    assert report.params_after <= (1 - most) * report.params_before
    reasons = report.skipped
    assert reasons["layers of level 1"] == "a layer from 8 to 16 channels must stay"
    assert reasons["level 2"] == "up_blocks.1.resnets.0 reads 24 + 16 channels and would get 16 + 16"
    assert set(reasons) == {"layers of level 1", "layers of level 2", "level 2"}


def test_a_target_of_multiply_accumulates() -> None:
    unet = unet_of()
    inputs = unet_inputs(unet)
    wide = {**inputs, "sample": inputs["sample"].repeat(1, 1, 2, 2)}
    report = prune_depth(unet, calls_of(unet, inputs), Config(target=DepthTarget(macs=0.6)), inputs=wide)
    assert report.macs_before == macs_of(unet, wide)
    assert macs_of(report.denoiser, wide) <= 0.6 * report.macs_before
    assert report.removed[-2]["macs"] > 0.6 * report.macs_before
    both = prune_depth(unet, calls_of(unet, inputs), Config(target=DepthTarget(macs=0.6, params=0.3)), inputs=wide)
    assert both.params_after <= 0.3 * both.params_before
    with pytest.raises(
        UserError, match=r"^target.macs=0.001: expected at least 0\.\d+: removing all possible levels leaves"
    ):
        prune_depth(unet, calls_of(unet, inputs), Config(target=DepthTarget(macs=0.001), remove=("levels",)))


def test_only_the_kinds_asked_for_go() -> None:
    unet = sdxl_like()
    calls = calls_of(unet, unet_inputs(unet))
    report = prune_depth(unet, calls, Config(ratio=0.05, remove=("transformer_layers",)))
    assert all(".transformer_blocks." in step["name"] for step in report.removed)
    # Six attentions of three layers, of which two share an entry of the config.
    assert len(report.effects) == 3 * (1 + 1 + 3)
    with pytest.raises(UserError, match="it has no transformer_layers"):
        prune_depth(unet_of(), calls_of(unet_of(), unet_inputs(unet_of())), Config(remove=("transformer_layers",)))


@torch.no_grad()
def test_prediction_error_is_relative_to_the_prediction() -> None:
    unet = unet_of()
    calls = calls_of(unet, unet_inputs(unet), unet_inputs(unet, seed=1))
    other = copy.deepcopy(unet)
    other.conv_out.weight.mul_(1.25)
    other.conv_out.bias.mul_(1.25)
    assert prediction_error(other, calls) == pytest.approx(0.25, rel=1e-4)
    assert prediction_error(unet, calls) == 0


def test_half_precision_stays() -> None:
    unet = unet_of().to(torch.bfloat16)
    inputs = unet_inputs(unet)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    report = prune_depth(unet, calls_of(unet, half), Config(ratio=0.05, remove=("mid_block",)))
    assert {p.dtype for p in report.denoiser.parameters()} == {torch.bfloat16}


def test_a_stage_of_a_pipeline() -> None:
    unet = tiny_unet((16, 32), layers_per_block=2)
    pipeline = tiny_pipeline(unet=unet)
    config = Config(ratio=0.3, calibration=CallsConfig(examples=1, steps=2, side=8))
    context = SimpleNamespace(data=SimpleNamespace(text=["a cat", "a dog"]), seed=3)
    report = depth.run(pipeline, config, context)
    assert pipeline.unet is not unet
    assert unet.num_parameters() == report.details["params_before"]
    assert pipeline.unet.num_parameters() == report.details["params_after"]
    share = 1 - report.details["params_after"] / report.details["params_before"]
    assert report.coverage["params"] == pytest.approx(share) and share >= 0.3
    assert 0 < report.coverage["macs"] < 1
    assert json.loads(json.dumps(report.details))["config"]["calibration"]["side"] == 8
    assert list(OmegaConf.to_container(OmegaConf.create(report.details))["effects"]) == list(report.details["effects"])
    again = tiny_pipeline(unet=tiny_unet((16, 32), layers_per_block=2))
    assert depth.run(again, config, context).details == report.details, "the same seed gives other effects"


def test_calls_are_those_of_the_pipeline() -> None:
    pipeline = tiny_pipeline()
    scheduler = copy.deepcopy(vars(pipeline.scheduler))
    calls = record_calls(pipeline, ["a cat", "a dog", "a tree"], CallsConfig(examples=3, steps=4), 0)
    assert len(calls) == 4
    assert [int(call.inputs["timestep"]) for call in calls] == [751, 501, 251, 1]
    assert all(call.output.shape == (2 * 3, 4, 8, 8) for call in calls), "with guidance, every example counts twice"
    assert prediction_error(pipeline.unet, calls) == 0
    small = record_calls(pipeline, ["a cat"], CallsConfig(examples=2, steps=1, side=8, guidance=1.0), 0)
    assert [call.output.shape for call in small] == [(2, 4, 4, 4)]
    assert {key: str(value) for key, value in vars(pipeline.scheduler).items()} == {
        key: str(value) for key, value in scheduler.items()
    }


def test_calls_of_an_inpainting_pipeline() -> None:
    parts = tiny_pipeline(unet=unet_of(in_channels=9, cross_attention_dim=16)).components
    pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    calls = record_calls(pipeline, ["a cat"], CallsConfig(examples=1, steps=1), 0)
    assert calls[0].inputs["sample"].shape == (2, 9, 8, 8)


def test_a_pipeline_that_predicts_nan() -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="predicts NaN"):
        record_calls(pipeline, ["a cat"], CallsConfig(examples=1, steps=1), 0)


@pytest.mark.parametrize("size", ["base", "tiny"])
def test_distillation_into_fewer_blocks(size: Literal["base", "tiny"]) -> None:
    teacher = unet_of().requires_grad_(False)
    student = prune_bk_sdm(teacher, size).denoiser
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=source)
    conditions = Conditions({"encoder_hidden_states": torch.randn(2, 5, 12, generator=source)}, {})
    config = features.Config(
        steps=12,
        batch_size=4,
        learning_rate=3e-3,
        losses={"output": 1.0, "features": 0.1},
        min_snr_gamma=None,
        log_every=4,
    )
    report = distill(
        student, teacher, Examples(latents, torch.ones(4, dtype=torch.long), conditions), DDPMScheduler(), config
    )
    assert report.curves["output_loss"][-1][1] < 0.7 * report.curves["output_loss"][0][1]
    blocks = {
        "base": {*(f"{side}_blocks.{i}" for side in ("down", "up") for i in range(3)), "mid_block"},
        "tiny": {"down_blocks.0", "up_blocks.0", "up_blocks.1"},  # down_blocks.1 lost its downsampler
    }
    assert report.details["features"] == dict.fromkeys(blocks[size], "same")


def test_kept_channels_follow_their_blocks() -> None:
    unet = unet_of()
    report = prune_bk_sdm(unet, "tiny")
    width = {"kept": {"down_blocks.0": [0, 2], "down_blocks.1": [1], "up_blocks.1": [3, 4], "up_blocks.2": [5, 7]}}
    history = [{"details": width}, {"details": {"blocks": report.blocks}}]
    assert kept_channels(history) == {"down_blocks.0": [0, 2], "up_blocks.0": [3, 4], "up_blocks.1": [5, 7]}
    history.append({"details": {"kept": {"up_blocks.1": [1]}}})
    assert kept_channels(history)["up_blocks.1"] == [7]


def test_config_of_the_project_is_the_default() -> None:
    folder = Path(depth.__file__).parents[2] / "conf" / "prune"
    keys = OmegaConf.to_container(OmegaConf.load(folder / "depth.yaml"))
    assert (keys.pop("kind"), keys.pop("method")) == ("prune", "depth")
    assert build(Config, keys, "stages.prune") == Config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio": 1}, r"prune.ratio=1.0: expected a number in \(0, 1\)"),
        ({"target": {"macs": 1.5}}, r"prune.target.macs=1.5: expected the share to be left"),
        ({"target": {"bytes": 0.5}}, r"prune.target.bytes: no such key; known: params, macs"),
        ({"remove": ["layer"]}, r"prune.remove=\['layer'\]: expected some of layers, attentions"),
        ({"remove": []}, r"prune.remove=\[\]: expected some of"),
        ({"calibration": {"steps": 0}}, r"prune.calibration.steps=0: expected a whole number of at least 1"),
        ({"calibration": {"side": 0}}, r"prune.calibration.side=0: expected pixels"),
        ({"calibration": {"seed": -1}}, r"prune.calibration.seed=-1: expected a whole number from 0"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Config, values, "prune")
