"""Hashes of what decides a network's features: its weights, and how it brings images to its own size."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def weights_hash(model: "torch.nn.Module") -> str:
    """SHA-256 of the names and float32 values of all weights, the same whichever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def own_preprocessing(processor: Any) -> str:
    """What to call an image processor of transformers, with the beginning of its settings' SHA-256."""
    settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    return f"its own ({hashlib.sha256(settings.encode()).hexdigest()[:8]})"
