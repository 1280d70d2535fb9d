"""Targets of measured latency: what is chosen with a made-up clock, what is refused, and one real measurement."""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrated import calibration_of
from tiny import tiny_pipeline, tiny_unet

from compress.errors import UserError
from compress.models.inputs import example_inputs
from compress.models.meta import meta_model
from compress.prune import depth, low_rank, per_layer, width
from compress.prune.blocks import read_blocks
from compress.prune.channels.latency import WidthLatencies
from compress.prune.channels.target import Target
from compress.prune.channels.widths import fast_shape
from compress.prune.depth import prune_depth
from compress.prune.sensitivity.error import Error
from compress.prune.sensitivity.levels import NarrowedLevel
from compress.prune.sensitivity.plan import Planner
from compress.prune.stopwatch import ATTEMPTS, Stopwatch, _warn_of_noise, own_inputs
from tests.prune.blocks_models import calls_of, unet_inputs, unet_of

FULL = (64, 128, 192)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "_shares", {})
    monkeypatch.setattr("compress.prune.channels.time_embedding.ITERATIONS", 3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Latency by vector registers of 32 channels: a part that stays, one by level, and one by pairs of levels."""
    seen: list[tuple[int, ...]] = []

    def share(self: Stopwatch, config: Mapping[str, Any]) -> float:
        widths = tuple(config["block_out_channels"])
        seen.append(widths)
        return seconds(widths) / seconds(tuple(self.denoiser.config.block_out_channels))

    def seconds(widths: tuple[int, ...]) -> float:
        registers = [-(-width // 32) for width in widths]
        return 4 + sum(registers) + 0.2 * sum(a * b for a, b in zip(registers, registers[1:], strict=False))

    monkeypatch.setattr(Stopwatch, "share", share)
    monkeypatch.setattr(Stopwatch, "confirm", share)
    return seen


def unet_of_three() -> Any:
    return tiny_unet(FULL, heads=4, groups=16)


def test_widths_meet_the_measured_share_at_the_least_error(clock: list[tuple[int, ...]]) -> None:
    unet = unet_of_three()
    for fragile in (1, 2):
        clock.clear()
        errors = [9.0 if level == fragile else 0.1 for level in range(3)]
        planner = Planner(unet, Target(latency=0.7), *fast_shape(unet.config))
        plan = planner.choose([NarrowedLevel(i, FULL[i] // 2, 0.5, Error(errors[i], 0)) for i in range(3)])
        assert plan.latency is not None
        assert plan.left == plan.latency.measured == pytest.approx(0.7, rel=0.05)
        assert plan.latency.predicted == pytest.approx(plan.left, rel=0.05)
        assert plan.ratios[fragile] < plan.ratios[3 - fragile]
        assert len(clock) - 1 == len(set(clock)) <= 12, "the chosen one is measured twice, the others once; few are"
        assert {tuple(row["widths"]) for row in plan.latency.table} == {FULL, *clock}


def test_predictions_meet_what_was_measured(clock: list[tuple[int, ...]]) -> None:
    unet = unet_of_three()
    found = WidthLatencies(unet, Stopwatch(unet, example_inputs(unet, seed=0), "eager"), "remove", 16)
    found.check(0.9)
    assert found.estimate((16, 32, 48)) == found.exact((16, 32, 48)), "the narrowest"
    for choice in found.choices:
        assert found.estimate(choice) == pytest.approx(found.exact(choice), abs=0.08)


def test_a_pipeline_is_pruned_to_a_share_of_its_latency(clock: list[tuple[int, ...]]) -> None:
    unet = unet_of_three()
    config = width.Config(target=Target(latency=0.7), sensitivity=width.SensitivityConfig((0.5,), 2))
    report = width.prune_width(unet, config, calibration=calibration_of(unet, 4, 4))
    assert report.plan is not None and report.plan.latency is not None
    assert report.widths_after == report.plan.widths and all(new % 16 == 0 for new in report.widths_after)
    assert (report.heads, report.multiple) == ("remove", 16)
    assert report.plan.left == pytest.approx(0.7, rel=0.05)


def test_what_a_second_measurement_does_not_confirm_is_not_chosen(
    clock: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = unet_of_three()
    first = Planner(unet, Target(latency=0.7), *fast_shape(unet.config)).choose([])
    share = Stopwatch.share

    def confirm(self: Stopwatch, config: Mapping[str, Any]) -> float:
        again = share(self, config)
        return 1.2 * again if tuple(config["block_out_channels"]) == tuple(first.widths) else again

    monkeypatch.setattr(Stopwatch, "confirm", confirm)
    second = Planner(unet, Target(latency=0.7), *fast_shape(unet.config)).choose([])
    assert second.widths != first.widths and second.left == pytest.approx(0.7, rel=0.05)
    assert second.latency is not None and len(second.latency.tried) > 1


def test_a_machine_that_is_slow_at_times_measures_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_at_times(calls: Mapping[int, Any], *_: Any) -> dict[int, list[float]]:
        """Each call takes twice as long in other turns than the calls beside it."""
        return {i: [(1 + (turn // 3 + i) % 2) * (0.6 if i else 1.0) for turn in range(40)] for i in calls}

    monkeypatch.setattr("compress.prune.stopwatch.turns", slow_at_times)
    unet = tiny_unet()
    assert Stopwatch(unet, example_inputs(unet, seed=0), "eager").share(unet.config) == pytest.approx(0.6)


def test_what_kernels_like() -> None:
    config = dict(unet_of_three().config)
    assert fast_shape(config) == ("remove", 16)
    assert fast_shape(config, "narrow") == ("narrow", 32), "heads of 8 channels and multiples of them"
    assert fast_shape(config, "narrow", 4) == ("narrow", 4), "what is given stays"
    stable = config | {"block_out_channels": (320, 640, 1280), "norm_num_groups": 32, "attention_head_dim": 8}
    assert fast_shape(stable) == ("narrow", 64)
    assert fast_shape(stable | {"attention_head_dim": [5, 10, 20]}) == ("remove", 64)


def test_shares_that_are_out_of_reach(clock: list[tuple[int, ...]]) -> None:
    unet = unet_of_three()
    with pytest.raises(UserError, match=r"^target\.latency=0\.3: expected at least 0\.\d\d, which the narrowest"):
        Planner(unet, Target(latency=0.3), *fast_shape(unet.config))
    planner = Planner(unet, Target(latency=0.99), "remove", 16)
    planner.latencies.choices = [(32, 64, 96), (64, 128, 96)]
    with pytest.raises(UserError, match=r"^target\.latency=0\.99: no widths .* within 5 % in \w+; nearest: 0\.\d+ \(w"):
        planner.choose([])


def test_bad_targets() -> None:
    with pytest.raises(UserError, match=r"^latency=1\.5: expected the share to be left, a number in \(0, 1\)"):
        Target(latency=1.5)
    with pytest.raises(UserError, match=r"^latency=0\.5: expected null where macs is given"):
        Target(macs=0.5, latency=0.5)
    with pytest.raises(UserError, match=r"^engine=fast: expected one of auto, eager, inductor, openvino"):
        Target(latency=0.5, engine="fast")
    for method in (per_layer, low_rank):
        with pytest.raises(UserError, match=r"^target\.latency=0\.5: expected null: \w+ has no .* width .* and depth"):
            method.Config(target=Target(latency=0.5))


def test_an_engine_that_is_missing_is_refused_before_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.runtime.openvino.missing", lambda: "needs the package openvino")
    config = width.Config(target=Target(latency=0.6, engine="openvino"))
    with pytest.raises(UserError, match=r"^target\.engine=openvino: needs the package openvino"):
        width.check(config, unet_of_three(), SimpleNamespace())
    assert width.check(width.Config(target=Target(latency=0.6)), unet_of_three(), SimpleNamespace()) is None


@pytest.fixture
def by_layers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Latency by layers; blocks that run alone take 1.5 times as long."""
    seen: list[dict[str, Any]] = []

    def layers(module: torch.nn.Module) -> int:
        return sum(isinstance(part, (torch.nn.Conv2d, torch.nn.Linear)) for part in module.modules())

    def share(self: Stopwatch, config: Mapping[str, Any]) -> float:
        seen.append(dict(config))
        return layers(meta_model(type(self.denoiser), config)) / layers(self.denoiser)

    def parts(self: Stopwatch, modules: list[torch.nn.Module], given: list[Any]) -> list[float]:
        return [1.5 * layers(module) / layers(self.denoiser) for module in modules]

    monkeypatch.setattr(Stopwatch, "share", share)
    monkeypatch.setattr(Stopwatch, "confirm", share)
    monkeypatch.setattr(Stopwatch, "parts", parts)
    return seen


def test_blocks_meet_the_measured_share(by_layers: list[dict[str, Any]]) -> None:
    unet = unet_of(layers_per_block=2)
    calls = calls_of(unet, unet_inputs(unet))
    report = prune_depth(unet, calls, depth.Config(target=depth.DepthTarget(latency=0.6)))
    assert report.latency is not None and report.latency.measured == pytest.approx(0.6, rel=0.05)
    layers = [sum(hasattr(m, "weight") and m.weight.ndim in (2, 4) for m in one.modules())
              for one in (unet, report.denoiser)]  # fmt: skip
    assert layers[1] / layers[0] == pytest.approx(report.latency.measured)
    assert len(by_layers) <= 2 + ATTEMPTS and by_layers[-1] == by_layers[-2], "the chosen one is measured again"
    assert {row["block"] for row in report.latency.table} == set(read_blocks(unet).names().values())
    again = prune_depth(unet, calls, depth.Config(target=depth.DepthTarget(latency=0.6)))
    assert again.removed == report.removed


def test_depth_out_of_reach(by_layers: list[dict[str, Any]]) -> None:
    unet = unet_of()
    calls = calls_of(unet, unet_inputs(unet))
    with pytest.raises(UserError, match=r"^target\.latency=0\.01: expected at least 0\.\d\d, which remains in \w+"):
        prune_depth(unet, calls, depth.Config(target=depth.DepthTarget(latency=0.01)))
    config = depth.Config(target=depth.DepthTarget(latency=0.97), remove=("levels",))
    with pytest.raises(UserError, match=r"^target\.latency=0\.97: whole blocks .* nearest: 0\.\d+ \(without level"):
        prune_depth(unet, calls, config)
    with pytest.raises(UserError, match="^no block can be removed"):
        depth.check(replace(config, remove=("transformer_layers",)), unet, SimpleNamespace())
    with pytest.raises(UserError, match=r"^latency=0\.5: expected null where params is given"):
        depth.DepthTarget(params=0.5, latency=0.5)


def test_the_pass_is_that_of_one_image_with_guidance() -> None:
    assert own_inputs(tiny_pipeline())["sample"].shape == (2, 4, 8, 8)


def test_a_real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.stopwatch.REPEATS", 3)
    unet = tiny_unet()
    stopwatch = Stopwatch(unet, own_inputs(tiny_pipeline(unet=unet)), "openvino")
    state = torch.get_rng_state()
    share = stopwatch.share({**unet.config, "block_out_channels": (16, 32)})
    assert 0 < share < 10 and stopwatch.batch == 2
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(Stopwatch, "_measure", lambda *_: pytest.fail("measured again"))
    assert stopwatch.share({**unet.config, "block_out_channels": (16, 32)}) == share


def test_a_busy_machine_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_noise([[1.0] * 5 + [1.01] * 5])
    assert not caplog.records
    _warn_of_noise([[1.0] * 5 + [1.2] * 5])
    assert "the turns disagree by 20 %" in caplog.text
