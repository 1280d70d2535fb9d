"""A .gguf file of the denoiser, Linear weights in 8, 5 or 4 bits, which diffusers and programs outside of Python read.

The formats are those of llama.cpp (https://github.com/ggml-org/ggml): blocks of 32 neighbors within an output channel,
each with a scale in float16 (``_0``), or a scale and a shift (``_1``). Everything else is in float16, what has one
dimension in float32. The pipeline gets the weights that the file decodes to, so that what is measured of the checkpoint
holds for the file; the file itself lies in the checkpoint's folder ``artifact``.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.errors import UserError, bad_value
from compress.models import denoiser, denoiser_name
from compress.models.inputs import Inputs, captured_inputs
from compress.quantize.weights.apply import (
    Layer,
    QuantizeReport,
    check_patterns,
    choose_layers,
    quantize_layers,
    refuse_quantized,
    stage_report,
)
from compress.quantize.weights.scheme import Scheme
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.models.outline import Outline

STAGE = Stage(
    version=1,
    leaves="artifact",
    by_names=True,
    libraries=("gguf",),
    extra="gguf",
    tag="gguf",
    usage="The folder `artifact` holds the denoiser as a .gguf file, with the class and the arguments that load it in "
    "`artifact/README.md`; the weights beside it are what the file decodes to, in float.",
)

BLOCK = 32  # weights that share a scale
TYPES = {
    "q8_0": Scheme(granularity="group", group_size=BLOCK),
    "q5_0": Scheme(bits=5, granularity="group", group_size=BLOCK),
    "q5_1": Scheme(bits=5, granularity="group", group_size=BLOCK, symmetric=False),
    "q4_0": Scheme(bits=4, granularity="group", group_size=BLOCK),
    "q4_1": Scheme(bits=4, granularity="group", group_size=BLOCK, symmetric=False),
}
"""By the key ``type``."""

README = """# {file}

```python
import torch
from diffusers import DiffusionPipeline, GGUFQuantizationConfig, {kind}

{name} = {kind}.from_single_file(
    "path/to/this/checkpoint/artifact/{file}",
    config="path/to/this/checkpoint",
    subfolder="{name}",
    quantization_config=GGUFQuantizationConfig(compute_dtype=torch.{dtype}),
    torch_dtype=torch.{dtype},
)
pipeline = DiffusionPipeline.from_pretrained("path/to/this/checkpoint", {name}={name}, torch_dtype=torch.{dtype})
```

It needs the package `gguf`.
"""


@dataclass(frozen=True)
class Config:
    """Keys of the stage.

    Attributes:
        type: Format of a Linear weight, a key of :data:`TYPES`.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float16.
    """

    type: str = "q8_0"
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If the type is none of those above.
        """
        if self.type not in TYPES:
            raise bad_value("type", self.type, "one of " + ", ".join(TYPES))
        check_patterns("skip", self.skip)


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Writes the file and gives the pipeline's denoiser the weights in it."""
    if context.artifact is None:
        raise UserError("gguf leaves a file: use it in a recipe, or compress.quantize.gguf.write_gguf")
    model, name = denoiser(pipeline), denoiser_name(pipeline)
    file = context.artifact / f"{name}-{config.type}.gguf"
    report = write_gguf(model, file, config.type, config.skip, captured_inputs(pipeline))
    dtype = str(model.dtype).removeprefix("torch.")
    text = README.format(file=file.name, kind=type(model).__name__, name=name, dtype=dtype)
    (context.artifact / "README.md").write_text(text, encoding="utf-8")
    return stage_report(report, TYPES[config.type], file=file.name, file_bytes=file.stat().st_size)


def write_gguf(
    model: Any, file: str | os.PathLike[str], type: str = "q8_0", skip: Sequence[str] = (), inputs: Inputs | None = None
) -> QuantizeReport:
    """Writes a denoiser's weights to a .gguf file, and rounds those of the denoiser to what the file holds.

    Args:
        model: A denoiser of diffusers with float weights; changed.
        file: To write; replaced where it exists.
        type: A key of :data:`TYPES`, of Linear weights whose rows are multiples of 32.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float16.
        inputs: Keyword arguments of the pass whose MACs are counted; None: one at the model's own size, if the
            denoiser's inputs are known.

    Returns:
        What was quantized, what was not and why, and the rounding errors.

    Raises:
        UserError: As :func:`compress.quantize.weights.apply.quantize_layers`; or diffusers reads no such file of this
            class, or a weight is too large for float16. The denoiser is then unchanged.
        RuntimeError: What diffusers reads back from the file is not what was written.
    """
    refuse_quantized(model)
    check_class(model)
    for name, tensor in model.state_dict().items():
        if tensor.abs().max() > torch.finfo(torch.float16).max:
            raise UserError(f"{name} has weights that float16 cannot hold: .gguf files have no place for them")
    stored: dict[str, tuple[Any, str]] = {}

    def to_blocks(name: str, layer: Layer) -> None:
        _keep(stored, f"{name}.weight", layer.weight, type.upper())

    report = quantize_layers(model, to_blocks, skip, inputs, kept(model))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in stored:
            _keep(stored, name, tensor, "F16" if tensor.dim() > 1 else "F32")
    _write(Path(file), stored)
    _compare(model, Path(file))
    return report


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses denoisers that diffusers does not load from a .gguf file, and patterns that match no layer.

    Raises:
        UserError: See :func:`write_gguf`.
    """
    check_class(denoiser)
    choose_layers(denoiser, config.skip, kept(denoiser))
    return denoiser


def check_class(model: nn.Module) -> None:
    """Asks diffusers whether it reads single files of a denoiser's class.

    Raises:
        UserError: It does not.
    """
    from diffusers.loaders import single_file_model

    kind = type(model).__name__
    if kind not in single_file_model.SINGLE_FILE_LOADABLE_CLASSES:
        raise UserError(f"diffusers loads no {kind} from a single file, so a .gguf file of it would have no reader")


def kept(model: nn.Module) -> dict[str, str]:
    """Layers that the formats do not fit, with the reason."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found[name] = "float16: diffusers decodes .gguf weights in Linear layers alone"
        elif isinstance(module, nn.Linear) and module.in_features % BLOCK:
            found[name] = f"float16: its rows of {module.in_features} are no multiple of {BLOCK}"
    return found


def _keep(stored: dict[str, tuple[Any, str]], name: str, tensor: Tensor, type: str) -> None:
    """Encodes a tensor for the file and sets it to what diffusers decodes it to: in float16, unlike other programs."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[type]
    codes = quants.quantize(tensor.detach().float().cpu().numpy(), kind)
    stored[name] = codes, type
    read = torch.from_numpy(codes)
    decoded = read if type in ("F16", "F32") else dequantize_gguf_tensor(GGUFParameter(read, quant_type=kind))
    tensor.data = decoded.to(tensor)


def _write(file: Path, stored: Mapping[str, tuple[Any, str]]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, "diffusers")
    for name, (codes, type) in stored.items():
        writer.add_tensor(name, codes, raw_dtype=GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _compare(model: Any, file: Path) -> None:
    """Reads the file as diffusers does and compares every weight with the model's.

    Raises:
        RuntimeError: One differs.
    """
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    with TemporaryDirectory() as folder:
        model.save_config(folder)
        settings = {"quantization_config": GGUFQuantizationConfig(compute_dtype=model.dtype), "dtype": model.dtype}
        loaded = type(model).from_single_file(str(file), config=folder, local_files_only=True, **settings)
    ours, theirs = model.state_dict(), loaded.state_dict()
    for name, tensor in ours.items():
        if not torch.equal(dequantize_gguf_tensor(theirs[name]).to(tensor), tensor):
            raise RuntimeError(f"{file}: diffusers reads {name} back different from what was written")
