"""Whether a device gains time by bfloat16."""

import time
from functools import lru_cache

import torch

SIDE = 512
"""Of the square matrices that are multiplied."""
GAIN = 1.2
"""How many times as fast bfloat16 has to be, so that noise in the times does not decide."""


@lru_cache
def bf16_pays(device_type: str) -> bool:
    """Whether matrix products are faster in bfloat16 than in float32, without being emulated.

    GPUs say so. Processors say only that they have instructions for it, and those of AVX-512 are slower than float32 on
    some: so both are timed, once in a process, which takes some 40 ms.

    Args:
        device_type: Such as ``cpu`` or ``cuda``; others than these two compute in float32.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    plain = torch.ones(SIDE, SIDE)
    half = plain.to(torch.bfloat16)
    pairs = [(_seconds(plain), _seconds(half)) for _ in range(6)][1:]
    return min(one for one, _ in pairs) > GAIN * min(other for _, other in pairs)


def _seconds(matrix: torch.Tensor) -> float:
    began = time.perf_counter()
    matrix @ matrix
    return time.perf_counter() - began
