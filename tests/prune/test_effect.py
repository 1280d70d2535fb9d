"""The effect of leaving blocks out: calls joined, what blocks computed used again, and nothing changed by either."""

from typing import Any

import pytest
import torch

from compress.data.calls import Call
from compress.prune.blocks.assemble import assemble
from compress.prune.blocks.effect import Effect, innermost, merged, prediction_error
from compress.prune.blocks.subject import Subject
from tests.prune.blocks_models import calls_of, flux, pixart, sdxl_like, transformer_inputs, unet_inputs, unet_of


def unet_calls(unet: torch.nn.Module) -> list[Call]:
    """Of two timesteps, one for all rows, as pipelines call."""
    inputs = []
    for seed, timestep in ((0, 3), (1, 700)):
        inputs.append({**unet_inputs(unet, seed), "timestep": torch.tensor(timestep)})
    return calls_of(unet, *inputs)


@pytest.mark.parametrize("make", [pytest.param(sdxl_like, marks=pytest.mark.slow), unet_of, pixart])
def test_the_error_is_that_of_the_smaller_model(make: Any) -> None:
    model = make()
    calls = calls_of(model, *[transformer_inputs(model)] * 2) if make is pixart else unet_calls(model)
    subject = Subject(model, calls[0].inputs)
    effect = Effect(subject, calls)
    assert len(effect.inputs) == 1
    left = subject.blocks
    for _ in range(2):
        effect.keep(left)
        options = [o for _, _, o in left.candidates(("layers", "transformer_layers", "mid_block")) if not o.problem()]
        for option in options:
            wanted = prediction_error(assemble(subject.model_class, option, subject.weights), calls)
            assert effect.error(option) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        left = options[-1]


def test_blocks_before_the_one_that_is_left_out_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unet_of()
    subject = Subject(unet, unet_inputs(unet))
    effect = Effect(subject, unet_calls(unet))
    effect.keep(subject.blocks)
    ran: list[int] = []
    resnet = type(unet.mid_block.resnets[0])
    forward = resnet.forward
    monkeypatch.setattr(resnet, "forward", lambda self, *args: (ran.append(1), forward(self, *args))[1])
    by_name = {name: option for _, name, option in subject.blocks.candidates(("layers", "mid_block"))}
    effect.error(by_name["mid_block"])
    assert len(ran) == 9, "the up blocks' resnets alone have other inputs"
    ran.clear()
    effect.error(subject.blocks)
    assert not ran


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.blocks.effect.MOST", 0)
    unet = unet_of()
    effect = Effect(Subject(unet, unet_inputs(unet)), unet_calls(unet))
    effect.keep(effect.subject.blocks)
    assert effect._kept == {}
    assert effect.error(effect.subject.blocks) < 1e-6


def test_calls_that_do_not_fit_together_stay_apart() -> None:
    unet = unet_of()
    small, large = unet_inputs(unet), unet_inputs(unet, 1)
    wider = {**large, "sample": torch.randn(2, 4, 16, 16)}
    assert merged(calls_of(unet, small, wider)) is None
    flagged = {**large, "return_dict": False}
    assert merged([Call(small, torch.zeros(2)), Call(flagged, torch.zeros(2))]) is None
    effect = Effect(Subject(unet, small), calls_of(unet, small, wider))
    assert len(effect.inputs) == 2
    assert effect.error(effect.subject.blocks) == 0


def test_arguments_without_rows_are_shared() -> None:
    model = flux()
    calls = calls_of(model, *[transformer_inputs(model)] * 3)
    joint = merged(calls)
    assert joint is not None
    assert joint["txt_ids"].shape == (5, 3)
    assert joint["hidden_states"].shape[0] == 6


def test_innermost_blocks_hold_no_other() -> None:
    names = {"down.attentions.0": "a", "down.attentions.0.transformer_blocks.1": "b", "down.resnets.0": "c"}
    assert innermost(names) == {"down.attentions.0.transformer_blocks.1": "b", "down.resnets.0": "c"}
