"""What a training does not use leaves the device meanwhile: text encoders and autoencoders."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.models import denoiser


def idle_parts(*pipelines: Any, used: Sequence[Any] = ()) -> list[nn.Module]:
    """The models of some pipelines besides their denoisers, each once.

    Args:
        pipelines: Of diffusers, or stand-ins for one denoiser.
        used: Models to leave out.
    """
    found: dict[int, nn.Module] = {}
    for pipeline in pipelines:
        busy = [denoiser(pipeline), *used]
        for part in getattr(pipeline, "components", {}).values():
            # Quantized models refuse to be moved, and hooks of accelerate move theirs themselves.
            fixed = getattr(part, "hf_quantizer", None) is not None or hasattr(part, "_hf_hook")
            if isinstance(part, nn.Module) and not fixed and not any(part is one for one in busy):
                found[id(part)] = part
    return list(found.values())


@contextmanager
def placed(parts: Sequence[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Has models on a device, and back where they were afterwards."""
    before = [next((weight.device for weight in part.parameters()), None) for part in parts]
    try:
        for part in parts:
            part.to(device)
        yield
    finally:
        for part, place in zip(parts, before, strict=True):
            if place is not None:
                part.to(place)
