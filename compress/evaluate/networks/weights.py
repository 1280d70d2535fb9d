"""The hash of a network's weights."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def weights_hash(model: "torch.nn.Module") -> str:
    """SHA-256 of the names and float32 values of all weights, the same whichever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()
