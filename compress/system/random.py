"""Random numbers that do not depend on what was drawn before."""

import hashlib

import torch


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator on the CPU that the three arguments alone decide."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
