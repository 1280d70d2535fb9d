"""What free-form pruning leaves loads, trains, quantizes and compiles, whatever the config and the ratio."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compress.errors import UserError
from compress.models.probe import probe_inputs, probe_output
from compress.prune.free import KINDS, Config, prune_free
from compress.prune.free_form.remove import Subject
from compress.prune.importance import make_scorer, parse
from compress.prune.target import Target
from compress.prune.weights import checked_weights
from compress.quantize.torchao import quantize_weights
from tests.prune.architectures import ARCHITECTURES, random_unet
from tests.prune.test_any_config import COMMON, configs

L2 = make_scorer(parse("l2"), None, 0)


LOAD = """
import json, sys
sys.modules["compress"] = None
import diffusers, torch
from pathlib import Path
from safetensors.torch import load_file

for folder in Path(sys.argv[1]).iterdir():
    tensors = load_file(folder / "probe" / "tensors.safetensors")
    expected = tensors.pop("expected")
    added = {name.removeprefix("added."): tensors.pop(name) for name in list(tensors) if name.startswith("added.")}
    if added:
        tensors["added_cond_kwargs"] = added
    unet = diffusers.AutoModel.from_pretrained(str(folder), trust_remote_code=True).eval()
    with torch.no_grad():
        difference = ((unet(**tensors).sample - expected).abs().max() / expected.abs().max()).item()
    print(json.dumps([folder.name, difference]))
"""


@pytest.fixture(scope="module")
def pruned() -> dict[str, Any]:
    """Every architecture, 40 % of its parameters gone."""
    return {
        name: prune_free(random_unet(name, width=2), Config(0.4, importance="random")).unet for name in ARCHITECTURES
    }


def test_a_fresh_process_loads_them_without_compress(pruned: dict[str, Any], tmp_path: Path) -> None:
    for name, unet in pruned.items():
        unet.save_pretrained(tmp_path / name)
        inputs = probe_inputs(unet)
        tensors = {f"added.{key}": tensor for key, tensor in inputs.pop("added_cond_kwargs", {}).items()}
        expected = probe_output(unet, probe_inputs(unet))
        (tmp_path / name / "probe").mkdir()
        save_file({**inputs, **tensors, "expected": expected}, tmp_path / name / "probe" / "tensors.safetensors")
    cache = os.environ | {"HF_HOME": str(tmp_path.parent / "cache")}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=cache)
    assert run.returncode == 0, run.stderr
    differences = dict(json.loads(line) for line in run.stdout.splitlines())
    assert differences.keys() == ARCHITECTURES.keys()
    assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize("name", ["sd 1.x", "sdxl", "ddpm"])
def test_a_step_of_training_moves_every_weight(pruned: dict[str, Any], name: str) -> None:
    unet = type(pruned[name]).from_config(pruned[name].config).train()
    unet.load_state_dict(pruned[name].state_dict())
    unet(**probe_inputs(unet)).sample.square().mean().backward()
    assert [key for key, weight in unet.named_parameters() if weight.grad is None] == []


def test_quantized_and_loaded(pruned: dict[str, Any], tmp_path: Path) -> None:
    unet = type(pruned["sd 1.x"]).from_config(pruned["sd 1.x"].config).eval()
    unet.load_state_dict(pruned["sd 1.x"].state_dict())
    assert quantize_weights(unet).params > 0.9
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path, dtype=torch.float32)
    inputs = probe_inputs(unet)
    assert torch.equal(probe_output(loaded, inputs), probe_output(unet, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled(pruned: dict[str, Any], name: str) -> None:
    inputs = probe_inputs(pruned[name])
    wanted = probe_output(pruned[name], inputs)
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
        subject = Subject(unet, wanted)
    except UserError as error:
        event("refused")
        check_nearest(str(error), unet, wanted, unit)
        return
    report = subject.prune(checked_weights(unet), L2)  # what is not refused before any score can be met
    event(f"ranked: {report.ranked}")
    assert report.left[unit] == pytest.approx(wanted.goal[1], rel=0.02)
    folder = tmp_path_factory.mktemp("unet")
    report.unet.save_pretrained(folder)
    inputs = probe_inputs(unet)
    output = probe_output(report.unet, inputs)
    assert output.isfinite().all()
    assert (probe_output(type(report.unet).from_pretrained(folder).eval(), inputs) - output).abs().max() == 0


def check_nearest(message: str, unet: Any, wanted: Config, unit: str) -> None:
    """What a refusal offers can be had."""
    if "no width of this UNet can be narrowed so" in message:
        return
    nearest = re.search(r"nearest found: ([\d.e-]+)", message)
    assert nearest is not None, message
    if 0 < float(nearest[1]) < 1:
        Subject(unet, replace(wanted, target=Target(**{unit: float(nearest[1])})))
