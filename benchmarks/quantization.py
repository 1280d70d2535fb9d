"""What scales, rounding and smoothing buy: ``python benchmarks/quantization.py``.

Quantizes a denoiser in each way, without training, and prints a Markdown table: the bytes of its weights as a share,
and the relative root mean square error of its predictions on recorded calls of four images, with captions that no
calibration has seen. Methods with int8 inputs compute them as engines do. Half an hour on one core with the embedded
model, most of it for gptq; ``--only`` takes some of the rows.
"""

import argparse
import sys
from typing import Any

import compress
from compress.data import DataConfig, load_data
from compress.data.calls import Call, CallsConfig, record_calls
from compress.evaluate.cost.size import memory_bytes
from compress.models import denoiser
from compress.models.inputs import predict
from compress.models.quantized import ranges_of
from compress.runtime.fake import float_model

GROUPS: dict[str, Any] = {"granularity": "group", "group_size": 64, "symmetric": False}
SEARCHES = ("absmax", "percentile", "mse", "hqq")


def ways() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a row to an option of ``conf/quantize`` and its keys."""
    found: dict[str, tuple[str, dict[str, Any]]] = {"int8": ("int8", {}), "fp8": ("fp8", {})}
    found |= {f"w8a8, smooth {smooth or 'null'}": ("w8a8", {"smooth": smooth}) for smooth in (None, 0.25, 0.5, 0.75)}
    found["w8a8, dynamic"] = ("w8a8_dynamic", {})
    found |= {f"w4a8, smooth {smooth or 'null'}": ("w4a8", {"smooth": smooth}) for smooth in (None, 0.5)}
    found["w4a8, dynamic"] = ("w4a8", {"activations": "dynamic"})
    found["w4a8, gptq"] = ("w4a8", {"rounding": "gptq"})
    for bits in (4, 3, 2):
        keys = {**GROUPS, "bits": bits}
        found |= {f"int{bits}, {search}": ("int4", {**keys, "search": search}) for search in SEARCHES}
        for search in ("mse", "hqq"):
            found[f"int{bits}, {search}, gptq"] = ("int4", {**keys, "search": search, "rounding": "gptq"})
    for name, choice, bits in (("nf4", "nf4", 4), *((f"palette of {2**bits}", "palette4", bits) for bits in (6, 4, 2))):
        found[name] = (choice, {"bits": bits})
        found[f"{name}, gptq"] = (choice, {"bits": bits, "rounding": "gptq"})
    return found


def error(model: Any, calls: list[Call]) -> float:
    """Root mean square of the change of the predictions, as a share of theirs."""
    changes = sum(float((predict(model, call.inputs) - call.output.cpu()).square().sum()) for call in calls)
    return float((changes / sum(float(call.output.square().sum()) for call in calls)) ** 0.5)


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="embedded:emoji/pipeline")
    parser.add_argument("--data", default="embedded:emoji/emoji.parquet")
    parser.add_argument("--only", default="", help="rows whose names start so")
    options = parser.parse_args()
    teacher, data = compress.load(options.model), load_data(DataConfig(options.data))
    calls = record_calls(teacher, data.text, CallsConfig(examples=4, steps=10, side=None), seed=1)
    size = memory_bytes(denoiser(teacher))
    print(f"{len(calls)} calls\n\n| quantize | size | error |\n|---|---:|---:|", flush=True)
    for name, (choice, keys) in ways().items():
        if name.startswith(options.only):
            student, _ = compress.quantize(teacher, choice, data=data, **keys)
            model = denoiser(student)
            share = memory_bytes(model) / size
            computed = float_model(model, ranges_of(model)) if ranges_of(model) else model
            print(f"| {name} | {share:.3f}x | {error(computed, calls):.4f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
