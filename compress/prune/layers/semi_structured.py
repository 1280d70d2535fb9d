"""2:4 weights on the sparse tensor cores of NVIDIA GPUs, through torch's semi-structured tensors.

These read half of the values and multiply half as often, in linear layers alone: torch has no such kernel for
convolutions. Whether a pass gets faster depends on the layers' sizes and on the GPU: time it before and after, as
:func:`compress.evaluate.cost.latencies` does.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import UserError
from compress.models.sparsity import holds

if TYPE_CHECKING:
    import torch
    from torch import nn

AMPERE = (8, 0)
"""Compute capability from which NVIDIA GPUs have sparse tensor cores."""
OUTPUTS, INPUTS = 32, 64
"""What a layer's outputs and inputs have to be multiples of for all of torch's kernels, in 16 bits."""


@dataclass(frozen=True)
class Accelerated:
    """What :func:`accelerate` did.

    Attributes:
        layers: Linear layers that run on sparse tensor cores now.
        skipped: Other layers with a 2:4 weight, with the reason.
        difference: Largest change of the denoiser's output over the largest output: rounding in another order. None
            where its inputs are not known.
    """

    layers: list[str]
    skipped: dict[str, str]
    difference: float | None


def accelerate(denoiser: "nn.Module") -> Accelerated:
    """Makes the 2:4 weights of linear layers semi-structured tensors of torch, in place; for inference only.

    Call it last, on a pipeline on the GPU in float16 or bfloat16, and compile afterwards. The result can be neither
    trained nor saved: keep the checkpoint.

    Args:
        denoiser: Pruned with ``pattern=2:4``, perhaps distilled since.

    Raises:
        UserError: The device has no sparse tensor cores, torch no kernel for them or for this precision, or the
            denoiser no linear layer of the pattern. It is unchanged then.
    """
    import torch
    from torch import nn
    from torch.sparse import to_sparse_semi_structured

    from compress.models.probe import probe_inputs, probe_output

    parameter = next(denoiser.parameters())
    check_device(parameter.device, parameter.dtype)
    layers = {name: m for name, m in denoiser.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    reasons = {name: unfit(module) for name, module in layers.items() if holds(module.weight, 2, 4)}
    weights = {name: layers[name].weight for name, reason in reasons.items() if reason is None}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    if not weights:
        found = "; ".join(dict.fromkeys(skipped.values())) or "none has a 2:4 weight"
        raise UserError(f"no layer can run on sparse tensor cores ({found}): prune with pattern=2:4 first")
    inputs = probe_inputs(denoiser)
    before = probe_output(denoiser, inputs) if inputs is not None else None
    try:
        for name, weight in weights.items():
            sparse = to_sparse_semi_structured(weight.detach().contiguous())
            layers[name].weight = torch.nn.Parameter(sparse, requires_grad=False)
        after = probe_output(denoiser, inputs) if inputs is not None else None
    except (RuntimeError, NotImplementedError) as error:
        for name, weight in weights.items():
            layers[name].weight = weight
        raise UserError(f"torch's sparse kernels do not run here: {str(error).splitlines()[0]}") from error
    difference = None
    if before is not None and after is not None:
        difference = float((after - before).abs().max() / before.abs().max())
    return Accelerated(list(weights), skipped, difference)


def check_device(device: "torch.device", dtype: "torch.dtype") -> None:
    """Refuses where there are no sparse tensor cores.

    Raises:
        UserError: Naming the device or the precision, and what would be right.
    """
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        raise UserError(f"device={device}: 2:4 is faster on NVIDIA GPUs alone, from compute capability 8.0 (Ampere) on")
    if (capability := torch.cuda.get_device_capability(device)) < AMPERE:
        found = f"{torch.cuda.get_device_name(device)}, compute capability {'.'.join(map(str, capability))}"
        raise UserError(f"device={device} ({found}): 2:4 is faster from compute capability 8.0 (Ampere) on")
    if dtype not in (torch.float16, torch.bfloat16):
        raise UserError(f"the denoiser is in {dtype}: sparse tensor cores take float16 and bfloat16")


def unfit(module: "nn.Module") -> str | None:
    """Why torch has no sparse kernel for a layer whose weight is 2:4; None where it has one."""
    from torch import nn

    if not isinstance(module, nn.Linear):
        return "torch has sparse kernels for linear layers only"
    if module.out_features % OUTPUTS or module.in_features % INPUTS:
        return f"outputs and inputs are not multiples of {OUTPUTS} and {INPUTS}"
    return None
