"""Time, memory and what is left when UNets of Stable Diffusion's sizes are pruned: ``python benchmarks/sizes.py``.

Builds the UNets of Stable Diffusion 1.5, 2.1 and XL from their published configs with random weights and prunes each in
a process of its own. Prints a Markdown table: widths, parameters and multiply-accumulates (with attention products, at
the model's own size) that are left, seconds of the pruning, those of all its threads' work (what else the machine does
hits the former), and the largest resident memory of the process, with the model itself and the libraries. A target's
sensitivity and depth's effects are measured on random inputs.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compress.models.quiet import hide_notices

hide_notices()  # before the libraries say them

import torch  # noqa: E402
from diffusers import DDPMScheduler, UNet2DConditionModel  # noqa: E402

from compress.evaluate.cost.memory import process_peak  # noqa: E402
from compress.models.inputs import example_inputs  # noqa: E402
from compress.models.macs import count  # noqa: E402

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}  # what else it has are the class's defaults
CONFIGS: dict[str, dict[str, Any]] = {
    "sd 1.5": SD15,
    "sd 2.1": {
        "sample_size": 96,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
MILLIONS = {"sd 1.5": 859.52, "sd 2.1": 865.91, "sdxl": 2567.46}
"""Published numbers of parameters."""

METHODS = (
    "width ratio 0.25", "width ratio 0.5", "width params 0.75", "width params 0.5", "width macs 0.75", "width macs 0.5",
    "bk_sdm base", "bk_sdm small", "bk_sdm tiny", "depth params 0.75", "depth params 0.5", "depth macs 0.75",
    "depth macs 0.5",
)  # fmt: skip


def random_unet(name: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet with weights of the usual initialization."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    unet = UNet2DConditionModel(**CONFIGS[name]).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    assert round(unet.num_parameters() / 1e6, 2) == MILLIONS[name], unet.num_parameters()
    return unet


def prune_width(unet: UNet2DConditionModel, unit: str, share: float) -> Any:
    """By l2, to a ratio of the channels or a target."""
    from compress.data.calibration import calibrate
    from compress.prune import width
    from compress.prune.channels.target import Target

    if unit == "ratio":
        return width.prune_width(unet, width.Config(share)).unet
    config = width.Config(target=Target(**{unit: share}))
    pipeline: Any = SimpleNamespace(unet=unet, scheduler=DDPMScheduler())
    return width.prune_width(unet, config, calibration=calibrate(pipeline, None, config.calibration, 0)).unet


@torch.no_grad()
def prune_depth(unet: UNet2DConditionModel, unit: str, share: float) -> Any:
    """Greedily, by the effect on as many random inputs as calls that the stage looks at by default."""
    from compress.models.random_inputs import random_inputs

    from compress.data.calls import Call
    from compress.prune import depth

    config = depth.Config(target=depth.DepthTarget(**{unit: share}))
    sampled = config.calibration
    sample, conditions = random_inputs(unet, sampled.examples, 0)
    side = (sampled.side or 8 * unet.config.sample_size) // 8
    sample = sample[:, :, :side, :side].to(unet.dtype)
    calls = []
    for timestep in torch.linspace(999, 0, sampled.steps).long():
        inputs = {**conditions, "return_dict": False}
        calls.append(Call(((sample, timestep), inputs), unet(sample, timestep, **inputs)[0]))
    return depth.prune_depth(unet, calls, config, inputs=example_inputs(unet)).denoiser


def prune(unet: UNet2DConditionModel, method: str) -> Any:
    """The smaller UNet."""
    kind, *how = method.split()
    if kind == "bk_sdm":
        from compress.prune.bk_sdm import prune_bk_sdm

        return prune_bk_sdm(unet, how[0], inputs=example_inputs(unet)).denoiser  # type: ignore[arg-type]
    return {"width": prune_width, "depth": prune_depth}[kind](unet, how[0], float(how[1]))


def measure(name: str, method: str, dtype: torch.dtype) -> dict[str, Any]:
    """One row; to be called once in a process."""
    unet = random_unet(name, dtype)
    before = count(unet, example_inputs(unet))
    gc.collect()
    begun, worked = time.perf_counter(), time.process_time()
    pruned = prune(unet, method)
    seconds, worked = time.perf_counter() - begun, time.process_time() - worked
    peak = process_peak()
    after = count(pruned, example_inputs(pruned))
    config = {key: value for key, value in pruned.config.items() if value != unet.config[key]}
    return {
        "model": name, "method": method, "changed": config, "params": after.params, "macs": after.macs,
        "params_share": after.params / before.params, "macs_share": after.macs / before.macs,
        "seconds": seconds, "cpu_seconds": worked, "peak_bytes": peak, "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    parser.add_argument("--one", action="store_true", help="one row in this process, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.models[0], options.methods[0], getattr(torch, options.dtype))))
        return 0
    rows = []
    print(f"| model | method | what changes | parameters | MACs | seconds | CPU seconds | peak memory |\n|{'---|' * 8}")
    for name in options.models:
        for method in options.methods:
            command = [sys.executable, __file__, "--one", "--dtype", options.dtype, "--models", name]
            done = subprocess.run([*command, "--methods", method], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"| {name} | {method} | failed | | | | | |", flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            changed = "; ".join(f"{key} {value}" for key, value in row["changed"].items() if not key.startswith("_"))
            print(
                f"| {name} | {method} | {changed} | {row['params'] / 1e6:.1f} M ({row['params_share']:.3f}x) | "
                f"{row['macs'] / 1e9:.1f} G ({row['macs_share']:.3f}x) | {row['seconds']:.1f} | "
                f"{row['cpu_seconds']:.1f} | {row['peak_bytes'] / 2**30:.2f} GiB |",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
