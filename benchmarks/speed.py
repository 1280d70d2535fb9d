"""How fast one denoiser runs in every engine, and how far its outputs move: ``python benchmarks/speed.py [MODEL ...]``.

A model is a folder of a pipeline or ``embedded:...``, or a UNet of random weights: ``72m`` (widths 128, 256 and 512,
32 x 32 latents), ``72m-half`` (narrower and of fewer blocks), ``97m`` (widths 160, 320 and 576) or ``sd15`` (Stable
Diffusion 1.5's config). All rows of a model and a batch size are timed in turns in one process; seconds are medians.
The error is the root mean square of the difference from eager fp32, as a share of its outputs, on the inputs that the
pipeline passes while it samples images (normal noise for random weights). For pipelines whole images are timed too,
with their PSNR to those of the first model in eager fp32: a student after its teacher shows what the whole way bought.
int8 rows quantize the model here unless it is quantized; ``nncf int8`` needs the package nncf; ``pt2e int8`` is
torchao's for inductor. A row that cannot run is left out with its reason.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import compress
from compress.data.calls import CallsConfig, record_calls
from compress.models import denoiser
from compress.models.inputs import Inputs, example_inputs, map_tensors, sample_name
from compress.models.quantized import quantized_layers, ranges_of
from compress.quantize.int8 import quantize_weights
from compress.quantize.ranges.inputs import find_ranges, int8_inputs, observed
from compress.runtime import Engines, accelerate
from compress.runtime.inductor import InductorModule
from compress.runtime.openvino import OpenVINOModule
from compress.runtime.turns import turns

PROMPTS = ("red heart, noto emoji", "cat face, fluent emoji", "hot dog, noto emoji", "rocket, twemoji emoji")
DATA = "embedded:emoji/emoji.parquet"
RANDOM: dict[str, dict[str, Any]] = {
    "72m": {
        "sample_size": 32, "block_out_channels": [128, 256, 512], "cross_attention_dim": 256,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "72m-half": {
        "sample_size": 32, "block_out_channels": [64, 192, 320], "cross_attention_dim": 256, "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "97m": {
        "sample_size": 32, "block_out_channels": [160, 320, 576], "cross_attention_dim": 256,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
}  # fmt: skip
TIMESTEPS = (1, 250, 500, 750, 990)

Run = Callable[[Inputs], torch.Tensor]


def eager(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Run:
    """The model itself, in autocast for another dtype than float32."""

    def run(inputs: Inputs) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(**inputs)[0].float()

    return run


def plain(compiled: Any) -> Run:
    """What an engine runs."""
    return lambda inputs: compiled(**inputs)[0]


def int8(model: torch.nn.Module, examples: list[Inputs]) -> torch.nn.Module:
    """The model in int8 with ranges of inputs from the examples; itself, if it is quantized."""
    from compress.models.quantized import set_ranges

    if quantized_layers(model):
        return model
    model = copy.deepcopy(model)
    with observed(int8_inputs(model)) as seen, torch.no_grad():
        for inputs in examples:
            model(**inputs)
    quantize_weights(model)
    set_ranges(model, find_ranges(seen, "mse"))
    return model


def nncf_int8(model: torch.nn.Module, examples: list[Inputs], precision: str) -> Run:
    """NNCF's post-training int8 of the same graph, which chooses its own scales."""
    import nncf
    import openvino

    from compress.runtime.arguments import Arguments

    module = OpenVINOModule(model, "denoiser", "f32")
    calls = [Arguments.of((), inputs) for inputs in examples]
    graph = module._graph(calls[0], free=False)
    data = nncf.Dataset([[tensor.numpy() for tensor in call.tensors] for call in calls])
    graph.model = nncf.quantize(graph.model, data, subset_size=len(calls), model_type=nncf.ModelType.TRANSFORMER)
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(
        graph.model, "CPU", settings | {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )
    return lambda inputs: torch.from_numpy(compiled([t.numpy() for t in Arguments.of((), inputs).tensors])[0].copy())


def pt2e_int8(model: torch.nn.Module, examples: list[Inputs]) -> Run:
    """Export quantization for inductor."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs=examples[0]).module()
        prepared = prepare_pt2e(exported, quantizer)
        for inputs in examples:
            prepared(**inputs)
        compiled = torch.compile(convert_pt2e(prepared), options={"freezing": True})

    def run(inputs: Inputs) -> torch.Tensor:
        with torch.no_grad():
            return compiled(**inputs)[0]

    return run


def rows(model: torch.nn.Module, examples: list[Inputs]) -> dict[str, Callable[[], Run]]:
    """Name to what makes a row."""
    small = int8(model, examples)
    if quantized_layers(model):  # its float rows are of the weights as rounded
        from compress.runtime.fake import float_model

        model = float_model(model, {})

    def ours(precision: str) -> Callable[[], Run]:
        return lambda: plain(OpenVINOModule(small, "denoiser", precision, ranges_of(small)))

    return {
        "eager fp32": lambda: eager(model),
        "eager bf16": lambda: eager(model, torch.bfloat16),
        "inductor fp32": lambda: plain(InductorModule(model, "denoiser", torch.float32)),
        "inductor bf16": lambda: plain(InductorModule(model, "denoiser", torch.bfloat16)),
        "pt2e int8": lambda: pt2e_int8(model, examples),
        "openvino fp32": lambda: plain(OpenVINOModule(model, "denoiser", "f32")),
        "openvino bf16": lambda: plain(OpenVINOModule(model, "denoiser", "bf16")),
        "nncf int8, fp32": lambda: nncf_int8(model, examples, "f32"),
        "nncf int8, bf16": lambda: nncf_int8(model, examples, "bf16"),
        "int8, fp32": ours("f32"),
        "int8, bf16": ours("bf16"),
    }


def medians(runs: dict[str, Run], inputs: Inputs, repeats: int) -> dict[str, float]:
    """Median seconds of each, timed one after the other in every turn."""
    calls = {name: partial(run, inputs) for name, run in runs.items()}
    return {name: statistics.median(found) for name, found in turns(calls, repeats, torch.device("cpu")).items()}


def denoisers(name: str) -> tuple[Any, torch.nn.Module, list[Inputs]]:
    """A pipeline or None, its denoiser, and example inputs of one image without guidance."""
    if name in RANDOM:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        model = UNet2DConditionModel(**RANDOM[name]).eval().requires_grad_(False)
        given = [example_inputs(model, seed=i) | {"timestep": torch.tensor(t)} for i, t in enumerate(TIMESTEPS)]
        return None, model, [inputs | {"return_dict": False} for inputs in given]
    pipeline = compress.load(name)
    calls = record_calls(pipeline, PROMPTS, CallsConfig(examples=4, steps=10, side=None), 0)
    examples = [call.inputs | {"return_dict": False} for call in calls]
    return pipeline, denoiser(pipeline), examples


def batch_of(inputs: Inputs, rows_wanted: int, model: torch.nn.Module) -> Inputs:
    """The same inputs with another batch size."""
    have = inputs[sample_name(model)].shape[0]
    index = torch.arange(rows_wanted) % have
    return map_tensors(inputs, lambda t: t[index] if t.ndim and t.shape[0] == have else t)


def measure(name: str, batches: list[int], repeats: int, only: list[str]) -> None:
    """Prints the table of passes."""
    _, model, examples = denoisers(name)
    runs: dict[str, Run] = {}
    for row, make in rows(model, examples).items():
        if only and row not in (*only, "eager fp32"):
            continue
        try:
            runs[row] = make()
            runs[row](batch_of(examples[0], batches[0], model))
        except Exception as error:  # noqa: BLE001 - a missing package, or a model that a library cannot convert
            runs.pop(row, None)
            print(f"{row}: left out: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
    base = runs["eager fp32"]
    params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"\n{name}, {params:.1f} M parameters, {torch.get_num_threads()} threads\n")
    print("| one pass | " + " | ".join(f"batch {size} (ms)" for size in batches) + " | error |")
    print("|---|" + "---:|" * (len(batches) + 1))
    timed = [medians(runs, batch_of(examples[0], size, model), repeats) for size in batches]
    for row, run in runs.items():
        cells = [f"{1e3 * found[row]:.1f} ({found['eager fp32'] / found[row]:.2f}x)" for found in timed]
        wrong = [float((run(given) - base(given)).square().mean().sqrt() / base(given).square().mean().sqrt())
                 for given in (batch_of(inputs, batches[0], model) for inputs in examples)]  # fmt: skip
        print(f"| {row} | " + " | ".join(cells) + f" | {100 * statistics.mean(wrong):.2f} % |", flush=True)


def images(names: list[str], repeats: int, steps: int) -> None:
    """Prints the table of whole images, prompt to pixels."""
    import numpy as np

    def draw(pipeline: Any, seed: int) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(PROMPTS[seed % len(PROMPTS)], num_inference_steps=steps, guidance_scale=4.0, output_type="np",
                        generator=torch.Generator().manual_seed(seed)).images[0]  # fmt: skip

    from compress.evaluate import EvaluateConfig
    from compress.evaluate.sample import sampler

    forms: dict[str, Any] = {}
    for name in names:
        stock = sampler(compress.load(name), EvaluateConfig())
        forms[f"{name}, eager fp32"] = stock
        forms[f"{name}, openvino"] = accelerate(stock, Engines("openvino", "openvino"))
        if not quantized_layers(denoiser(stock)):
            small, _ = compress.quantize(stock, "w8a8", data=DATA)
            forms[f"{name}, openvino int8"] = accelerate(small, Engines("openvino", "openvino"))
    first = next(iter(forms.values()))
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for turn in range(repeats + 2):
        for form, pipeline in forms.items():
            draw(pipeline, turn)  # as in runtime.turns: the timed image follows one of the same pipeline
            start = time.perf_counter()
            draw(pipeline, turn)
            if turn > 1:
                seconds[form].append(time.perf_counter() - start)
    base = statistics.median(next(iter(seconds.values())))
    print(f"\nOne image, prompt to pixels, DPM++ {steps} steps, guidance 4\n")
    print("| pipeline | ms | | PSNR to the first (dB, median of 16) |\n|---|---:|---:|---:|")
    expected = [draw(first, seed) for seed in range(16)]
    for form, pipeline in forms.items():
        errors = [float(((draw(pipeline, seed) - expected[seed]) ** 2).mean()) for seed in range(16)]
        psnr = "–" if pipeline is first else f"{-10 * np.log10(statistics.median(errors)):.1f}"
        median = statistics.median(seconds[form])
        print(f"| {form} | {1e3 * median:.0f} | {base / median:.2f}x | {psnr} |", flush=True)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["embedded:emoji/pipeline"], metavar="MODEL")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="of a whole image")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="names of rows, such as 'openvino bf16'")
    asked = parser.parse_args()
    for name in asked.models:
        measure(name, asked.batches, asked.repeats, asked.only)
    if pipelines := [name for name in asked.models if name not in RANDOM]:
        images(pipelines, asked.repeats, asked.steps)


if __name__ == "__main__":
    main()
