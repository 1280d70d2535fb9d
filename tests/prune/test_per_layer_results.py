"""What per-layer-width pruning leaves loads, trains, quantizes and compiles, whatever the config and the ratio."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from compress.errors import UserError
from compress.models.inputs import predict, small_inputs
from compress.models.meta import checked_weights
from compress.prune.channels.target import Target
from compress.prune.importance import make_scorer, parse
from compress.prune.layers.remove import PerLayerPruner
from compress.prune.per_layer import KINDS, Config, prune_per_layer
from compress.quantize.int8 import quantize_weights
from tests.prune.architectures import ARCHITECTURES, random_unet
from tests.prune.fresh_load import Lazily, load_in_fresh_process
from tests.prune.test_any_config import COMMON, configs

L2 = make_scorer(parse("l2"), None, 0)


@pytest.fixture(scope="module")
def pruned() -> dict[str, Any]:
    """Every architecture, 40 % of its parameters gone."""
    return Lazily(lambda name: prune_per_layer(random_unet(name, width=2), Config(0.4, importance="random")).unet)


@pytest.mark.slow  # one such checkpoint is loaded so in tests/models/test_shaped_checkpoint.py
def test_a_fresh_process_loads_them_without_compress(
    pruned: dict[str, Any], tmp_path: Path, stranger: Callable[..., str]
) -> None:
    models = {name: (pruned[name], small_inputs(pruned[name])) for name in ARCHITECTURES}
    load_in_fresh_process(models, tmp_path, stranger)


@pytest.mark.parametrize("name", ["sd 1.x", "sdxl", "ddpm"])
def test_a_step_of_training_moves_every_weight(pruned: dict[str, Any], name: str) -> None:
    unet = type(pruned[name]).from_config(pruned[name].config).train()
    unet.load_state_dict(pruned[name].state_dict())
    unet(**small_inputs(unet)).sample.square().mean().backward()
    assert [key for key, weight in unet.named_parameters() if weight.grad is None] == []


def test_quantized_and_loaded(pruned: dict[str, Any], tmp_path: Path) -> None:
    unet = type(pruned["sd 1.x"]).from_config(pruned["sd 1.x"].config).eval()
    unet.load_state_dict(pruned["sd 1.x"].state_dict())
    assert quantize_weights(unet).params > 0.9
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path, dtype=torch.float32)
    inputs = small_inputs(unet)
    assert torch.equal(predict(loaded, inputs), predict(unet, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled(pruned: dict[str, Any], name: str) -> None:
    inputs = small_inputs(pruned[name])
    wanted = predict(pruned[name], inputs)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(pruned[name])(**inputs).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@given(data=st.data())
@settings(COMMON, max_examples=6)
def test_any_config_and_any_ratio(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    cls, config = data.draw(configs(most=3))
    torch.manual_seed(0)
    unet = cls(**config).eval()
    unit = data.draw(st.sampled_from(["params", "macs"]))
    wanted = Config(
        target=Target(**{unit: data.draw(st.floats(0.05, 0.95))}),
        heads=data.draw(st.sampled_from(["narrow", "remove"])),
        scope=tuple(data.draw(st.sets(st.sampled_from(KINDS), min_size=1))),
        min_share=data.draw(st.sampled_from([0.0, 0.1, 0.5])),
        multiple=data.draw(st.sampled_from([None, 1, 2, 8])),
    )
    try:
        subject = PerLayerPruner(unet, wanted)
    except UserError as error:
        event("refused")
        check_nearest(str(error), unet, wanted, unit)
        return
    report = subject.prune(checked_weights(unet), L2)  # what is not refused before any score can be met
    event(f"ranked: {report.ranked}")
    assert report.left[unit] == pytest.approx(wanted.goal[1], rel=0.02)
    folder = tmp_path_factory.mktemp("unet")
    report.unet.save_pretrained(folder)
    inputs = small_inputs(unet)
    output = predict(report.unet, inputs)
    assert output.isfinite().all()
    assert (predict(type(report.unet).from_pretrained(folder).eval(), inputs) - output).abs().max() == 0


def check_nearest(message: str, unet: Any, wanted: Config, unit: str) -> None:
    """What a refusal offers can be had."""
    if "no width of this UNet can be narrowed" in message:
        return
    nearest = re.search(r"nearest found: ([\d.e-]+)", message)
    assert nearest is not None, message
    if 0 < float(nearest[1]) < 1:
        PerLayerPruner(unet, replace(wanted, target=Target(**{unit: float(nearest[1])})))
