"""Targets: costs by polynomial, shares that are met, and what is refused before any work."""

import pytest
from calibrated import calibration_of
from tiny import tiny_unet

from compress.errors import UserError
from compress.models.inputs import example_inputs
from compress.models.macs import count
from compress.prune.channels.target import Target, WidthCosts, best, choices_of
from compress.prune.sensitivity.error import Error
from compress.prune.sensitivity.levels import NarrowedLevel, predicted_error
from compress.prune.sensitivity.plan import Planner
from compress.prune.width import Config, SensitivityConfig, prune_width
from tests.prune.architectures import ARCHITECTURES, random_unet


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.channels.time_embedding.ITERATIONS", 3)


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_costs_are_a_polynomial(unit: str) -> None:
    unet = tiny_unet(widths=(32, 48, 64))
    choices = choices_of(unet.config)
    costs = WidthCosts(unet, example_inputs(unet), unit)
    estimated = costs.estimate(choices)
    for index in (0, 7, len(choices) // 2, len(choices) - 1):
        if len(set(choices[index])) == 3:
            assert float(estimated[index]) == pytest.approx(costs.exact(choices[index]), rel=1e-6)
    assert costs.exact((32, 48, 64)) == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_planned_is_what_pruning_leaves(name: str) -> None:
    unet = random_unet(name, width=2)
    heads = "narrow" if name == "ddpm" else "remove"  # a single head has to stay
    report = prune_width(unet, Config(0.5, heads=heads))
    counts = [count(model, example_inputs(unet)) for model in (unet, report.unet)]
    for unit in ("params", "macs"):
        before, after = (getattr(one, unit) for one in counts)
        planned = WidthCosts(unet, example_inputs(unet), unit, heads).exact(tuple(report.widths_after))
        assert planned < 0.5
        assert planned == pytest.approx(after / before, rel=1e-9)


def test_choices_keep_shortcuts() -> None:
    config = tiny_unet(widths=(16, 16, 24)).config
    assert choices_of(config, multiple=8) == [
        (8, 8, 16), (8, 8, 24), (8, 16, 8), (8, 16, 24), (16, 8, 16), (16, 8, 24), (16, 16, 8), (16, 16, 24),
    ]  # fmt: skip


@pytest.mark.parametrize("unit", ["params", "macs", "bytes"])
def test_a_target_is_met(unit: str) -> None:
    unet = tiny_unet(widths=(32, 48, 64))
    config = Config(target=Target(**{unit: 0.5}), sensitivity=SensitivityConfig((0.5,)))
    report = prune_width(unet, config, calibration=calibration_of(unet, 4, 4))
    assert report.plan is not None
    assert report.plan.left == pytest.approx(0.5, rel=0.02)
    assert report.widths_after == report.plan.widths
    if unit != "macs":
        assert report.params_after / report.params_before == report.plan.left
    assert {found.level for found in report.plan.measured} == {0, 1, 2}


def test_what_is_felt_least_goes_first() -> None:
    full = (64, 128, 192)
    planner = Planner(tiny_unet(widths=full), Target(params=0.75))
    for fragile in (1, 2):
        errors = [9.0 if level == fragile else 0.1 for level in range(3)]
        plan = planner.choose([NarrowedLevel(i, full[i] // 2, 0.5, Error(errors[i], 0)) for i in range(3)])
        assert plan.left == pytest.approx(0.75, rel=0.02)
        assert plan.ratios[fragile] < plan.ratios[3 - fragile]
        # No other widths that leave as much are predicted to be better.
        others = [predicted_error(plan.measured, full, widths) for widths in planner.choices]
        assert plan.predicted <= min(others) + 1e-12


def test_equal_macs_keep_the_parameters_where_errors_hardly_differ() -> None:
    unet = tiny_unet(widths=(64, 128, 192))
    target, params = Target(macs=0.605), WidthCosts(unet, {}, "params")
    costs = WidthCosts(unet, example_inputs(unet), "macs")
    errors = {(64, 96, 48): 0.100, (64, 80, 112): 0.108, (64, 56, 168): 0.2}
    sizes = [params.exact(widths) for widths in errors]
    assert sizes == sorted(sizes)
    assert best(target, costs, list(errors), errors.__getitem__)[0] == (64, 80, 112)
    errors[64, 80, 112] = 0.112
    assert best(target, costs, list(errors), errors.__getitem__)[0] == (64, 96, 48)
    assert best(Target(params=sizes[0]), params, list(errors), errors.__getitem__)[0] == (64, 96, 48)


def test_predicted_errors_add_up_and_never_fall() -> None:
    found = [
        NarrowedLevel(0, 16, 0.5, Error(0.3, 0)),
        NarrowedLevel(0, 8, 0.75, Error(0.2, 0)),
        NarrowedLevel(1, 32, 0.5, Error(0.4, 0)),
    ]
    assert predicted_error(found, (32, 64), (32, 64)) == 0
    assert predicted_error(found, (32, 64), (16, 32)) == pytest.approx(0.5)
    assert predicted_error(found, (32, 64), (24, 64)) == pytest.approx((0.09 / 2) ** 0.5)
    assert predicted_error(found, (32, 64), (8, 64)) == pytest.approx(0.3)
    assert predicted_error(found, (32, 64), (32, 16)) == pytest.approx((0.16 * 1.5) ** 0.5)


def test_a_target_that_no_widths_meet_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.sensitivity.plan.Planner.plan", None)
    unet = tiny_unet()
    with pytest.raises(UserError, match=r"target\.params=0\.01: no widths .* nearest: 0\.\d+ \(widths \d+, \d+\) or 0"):
        prune_width(unet, Config(target=Target(params=0.01)), calibration=calibration_of(unet, 2, 2))


def test_bad_targets() -> None:
    with pytest.raises(UserError, match=r"macs=1\.0: expected the share to be left, a number in \(0, 1\), or null"):
        Target(macs=1.0)
    with pytest.raises(UserError, match=r"macs=0\.5: expected null where params is given"):
        Target(params=0.5, macs=0.5)
    with pytest.raises(UserError, match="ratios="):
        SensitivityConfig((0.5, 1.0))
