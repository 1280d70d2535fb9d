"""Random numbers that do not depend on earlier draws."""

import hashlib

import torch


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator determined by the three arguments only."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
