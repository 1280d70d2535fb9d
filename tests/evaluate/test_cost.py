"""Parameters, MACs, bytes and memory against what can be worked out by hand."""

import json
from subprocess import CompletedProcess

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel

from compress.errors import UserError
from compress.evaluate import EvaluateConfig
from compress.evaluate.cost import (
    compiled_latencies,
    count,
    denoiser_inputs,
    image_latencies,
    latencies,
    measure_cost,
    memory_bytes,
    peak_memory,
    weight_bytes,
)
from compress.evaluate.cost.latency import timed
from tests.prune.architectures import random_unet
from tests.tiny import TOKENS, tiny_pipeline

CPU = torch.device("cpu")


def test_inputs_are_those_of_a_real_pass():
    pipeline = tiny_pipeline()
    inputs = denoiser_inputs(pipeline, EvaluateConfig(steps=3))
    assert inputs["sample"].shape == (1, 4, 8, 8)
    assert inputs["encoder_hidden_states"].shape == (1, TOKENS, 16)
    assert not pipeline.unet._forward_pre_hooks


def test_attention_and_convolutions_are_counted():
    model = tiny_pipeline().unet
    text = torch.zeros(1, TOKENS, 16)
    inputs = {"sample": torch.zeros(1, 4, 8, 8), "timestep": torch.tensor(1), "encoder_hidden_states": text}
    counted = count(model, inputs)
    assert counted.params == sum(p.numel() for p in model.parameters())
    assert sum(counted.params_by_type.values()) == counted.params
    assert counted.params_by_type["Conv2d"] == sum(
        p.numel() for m in model.modules() if isinstance(m, torch.nn.Conv2d) for p in m.parameters()
    )
    # What modules see, by hooks; attention's two products by hand.
    seen, products = [], []

    def conv(module, args, output):
        seen.append(output[0].numel() * module.weight[0].numel())

    def linear(module, args, output):
        seen.append(args[0].numel() // args[0].shape[-1] * module.weight.numel())

    def attention(module, args, kwargs, output):
        queries = args[0].shape[1]
        states = kwargs.get("encoder_hidden_states")
        keys = queries if states is None else states.shape[1]
        products.append(2 * queries * keys * module.to_q.out_features)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(conv)
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
        elif type(module).__name__ == "Attention":
            module.register_forward_hook(attention, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    assert counted.macs_without_attention == sum(seen)
    assert counted.macs == sum(seen) + sum(products)
    assert counted.macs_by_type["attention products"] == sum(products)
    assert set(counted.macs_by_type) == {"Conv2d", "Linear", "attention products"}
    assert sum(counted.macs_by_type.values()) == counted.macs


def test_what_is_slow_is_repeated_less(monkeypatch):
    calls = []

    def clock():
        return sum(calls)

    monkeypatch.setattr("compress.evaluate.cost.latency.time.perf_counter", clock)
    assert timed(lambda: calls.append(4.0), 20, CPU) == [4.0] * 5
    assert len(calls) == 6
    calls.clear()
    assert timed(lambda: calls.append(100.0), 20, CPU) == [100.0] * 3
    assert len(calls) == 4
    calls.clear()
    assert timed(lambda: calls.append(100.0), 2, CPU) == [100.0] * 2
    calls.clear()
    assert timed(lambda: calls.append(0.5), 20, CPU) == [0.5] * 20
    assert len(calls) == 23
    calls.clear()
    compiling = iter([100.0, 0.5, 0.5, 0.5, 0.5])
    assert timed(lambda: calls.append(next(compiling)), 4, CPU, warm_up=1) == [0.5] * 4
    config = EvaluateConfig(steps=20, guidance=4.0)
    assert image_latencies(None, config, 5, CPU, step=3.1) == []


def test_counts_of_stable_diffusion_are_the_published_ones():
    """859.5 M parameters, 338.6 GMACs at 64 x 64 latents and 77 tokens, 401.6 with attention's products."""
    with torch.device("meta"):
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    text = torch.zeros(1, 77, 768)
    inputs = {"sample": torch.zeros(1, 4, 64, 64), "timestep": torch.tensor(1), "encoder_hidden_states": text}
    counted = count(model, inputs)
    assert counted.params == pytest.approx(859.5e6, rel=1e-3)
    assert counted.macs_without_attention == pytest.approx(338.6e9, rel=1e-3)
    assert counted.macs == pytest.approx(401.6e9, rel=1e-3)


def test_a_shape_that_the_config_does_not_describe_is_an_error():
    pipeline = tiny_pipeline()
    inputs = denoiser_inputs(pipeline, EvaluateConfig(steps=3))
    pipeline.unet.register_to_config(block_out_channels=(16, 64))
    with pytest.raises(RuntimeError, match="its config describes"):
        count(pipeline.unet, inputs)


def test_bytes_are_those_of_the_files(tmp_path):
    model = tiny_pipeline().unet.half()
    model.save_pretrained(tmp_path / "one")
    size, by_dtype = weight_bytes(tmp_path / "one")
    assert size == (tmp_path / "one" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert by_dtype == {"F16": 2 * sum(p.numel() for p in model.parameters())}
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weight_bytes(tmp_path / "shards")[1] == by_dtype
    model.float().save_pretrained(tmp_path / "one", variant="full")
    assert weight_bytes(tmp_path / "one") == (size, by_dtype)
    assert list(weight_bytes(tmp_path / "one", "full")[1]) == ["F32"]
    with pytest.raises(UserError, match="no safetensors files"):
        weight_bytes(tmp_path)


def test_latency_gives_one_value_a_pass():
    pipeline = tiny_pipeline()
    seconds = latencies(pipeline.unet, denoiser_inputs(pipeline, EvaluateConfig(steps=3)), 4, CPU)
    assert len(seconds) == 4
    assert min(seconds) > 0


def test_a_image_takes_longer_than_its_passes():
    pipeline = tiny_pipeline()
    config = EvaluateConfig(steps=8)
    before = pipeline.scheduler
    whole = image_latencies(pipeline, config, 2, CPU)
    assert len(whole) == 2
    assert pipeline.scheduler is before
    assert min(whole) > 8 * min(latencies(pipeline.unet, denoiser_inputs(pipeline, config), 4, CPU))


def test_bytes_in_memory_are_those_of_the_tensors():
    model = tiny_pipeline().unet
    params = sum(p.numel() for p in model.parameters())
    assert memory_bytes(model) == 4 * params
    assert memory_bytes(model.half()) == 2 * params
    model.register_buffer("scale", torch.zeros(10))
    assert memory_bytes(model) == 2 * params + 40


def compiler(change):
    """A stand-in for torch.compile whose models give ``change`` of the output."""
    return lambda model: lambda *args, **kwargs: (change(model(*args, **kwargs)[0]),)


@pytest.mark.parametrize(
    ("change", "note", "repeats"),
    [
        (lambda output: output * (1 + 1e-5), "its output differs by 1e-05", 2),
        (lambda output: output * 1.1, "refused: the compiled output differs by 0.1", 0),
        (lambda output: output * float("nan"), "refused: the compiled output differs by nan", 0),
        (lambda output: output.no_such_thing, "torch.compile failed: 'Tensor' object has no", 0),
    ],
)
def test_a_compiled_denoiser_counts_only_with_the_output_of_the_eager_one(monkeypatch, change, note, repeats):
    pipeline = tiny_pipeline()
    monkeypatch.setattr(torch, "compile", compiler(change))
    seconds, found = compiled_latencies(pipeline.unet, denoiser_inputs(pipeline, EvaluateConfig(steps=3)), 2, CPU)
    assert note in found
    assert len(seconds) == repeats


@pytest.mark.slow
def test_the_compiler_gives_the_output_of_the_eager_denoiser():
    pipeline = tiny_pipeline()
    seconds, note = compiled_latencies(pipeline.unet, denoiser_inputs(pipeline, EvaluateConfig(steps=3)), 2, CPU)
    assert len(seconds) == 2, note
    assert note.startswith("torch.compile; its output differs by")


@pytest.mark.peak_memory
def test_cost_of_a_checkpoint(tmp_path):
    # 12 M parameters, so that weights and not the libraries' buffers decide the memory.
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(128, 256),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    pipeline = tiny_pipeline(unet=unet.eval().requires_grad_(False))
    pipeline.save_pretrained(tmp_path)
    config = EvaluateConfig(images=0, steps=3, latency_repeats=2)
    cost = measure_cost(pipeline, tmp_path, config, CPU, torch.float32)
    params = sum(p.numel() for p in unet.parameters())
    assert cost["params"] == params
    assert cost["pipeline_params"] > params
    assert cost["bytes_by_dtype"] == {"F32": 4 * params}
    assert 0 < cost["latency_low_s"] <= cost["latency_s"] <= cost["latency_high_s"]
    assert 0.9 * 4 * params < cost["peak_memory_bytes"] < 2.5 * 4 * params
    assert cost["memory_bytes"] == 4 * params
    assert 0 < cost["image_latency_low_s"] <= cost["image_latency_s"] <= cost["image_latency_high_s"]
    assert cost["compiled_latency_s"] is cost["compiled_note"] is None
    assert set(cost["conventions"]) <= set(cost)
    assert json.loads(json.dumps(cost)) == cost
    assert cost["settings"]["sample"] == [4, 8, 8]
    assert cost["settings"]["dtype"] == "float32"


def test_failure_in_the_process_is_told(tmp_path, monkeypatch):
    failed = CompletedProcess([], returncode=1, stdout="", stderr="OSError: No such file")
    monkeypatch.setattr("compress.evaluate.cost.memory.subprocess.run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="No such file"):
        peak_memory(tmp_path, "unet", {}, CPU, torch.float32)


def test_quantized_weights_count_as_what_they_stand_for(tmp_path):
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    pipeline = tiny_pipeline()
    inputs = denoiser_inputs(pipeline, EvaluateConfig(steps=3))
    expected = count(pipeline.unet, inputs)
    pipeline.unet.save_pretrained(tmp_path)
    settings = TorchAoConfig(Int8WeightOnlyConfig())
    quantized = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=settings, torch_dtype=torch.float32)
    assert count(quantized, inputs) == expected
    whole = memory_bytes(pipeline.unet)
    linear = sum(m.weight.nbytes for m in pipeline.unet.modules() if isinstance(m, torch.nn.Linear))
    assert whole - 0.75 * linear <= memory_bytes(quantized) < whole - 0.6 * linear  # a byte a weight, and its scales


def test_a_pipeline_that_takes_no_prompt_has_costs_too():
    pipeline = DDPMPipeline(random_unet("ddpm"), DDPMScheduler())
    config = EvaluateConfig(steps=2)
    inputs = denoiser_inputs(pipeline, config)
    assert inputs["sample"].shape == (1, 3, 8, 8)
    assert count(pipeline.unet, inputs).macs > 0
    assert len(image_latencies(pipeline, config, 2, CPU)) == 2
