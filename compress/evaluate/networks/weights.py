"""Hashes of a network's weights and of its preprocessing, which decide its features."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def weights_hash(model: "torch.nn.Module") -> str:
    """SHA-256 of the names and float32 values of all weights, independent of the file format."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def own_preprocessing(processor: Any) -> str:
    """Description of an image processor of transformers, with the first digits of its settings' SHA-256."""
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    return f"its own ({hashlib.sha256(settings.encode()).hexdigest()[:8]})"
