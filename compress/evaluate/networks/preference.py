"""Models that predict which image people prefer for a caption."""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import UserError
from compress.evaluate.networks.clip import load_clip
from compress.evaluate.networks.weights import weights_hash

PICKSCORE = "yuvalkirstain/PickScore_v1"


class Preference(Protocol):
    """Maps images and their captions to one score per image."""

    @property
    def name(self) -> str:
        """Name in reports."""

    @property
    def sha256(self) -> str | None:
        """Hash of its weights."""

    def __call__(self, images: Tensor | Sequence[Tensor], captions: Sequence[str], /) -> Tensor:
        """Scores, float32 ``(b,)``, of uint8 images ``(b, 3, height, width)`` or b of ``(3, height, width)``."""


class PickScore:
    """A CLIP model trained on human choices; the score is the scaled cosine of image and caption.

    Kirstain et al. 2023, https://arxiv.org/abs/2305.01569.

    Args:
        path: Folder or hub id.
        device: Where to compute.
    """

    def __init__(self, path: str = PICKSCORE, device: torch.device | str = "cpu") -> None:
        self.clip = load_clip(path, device, path, "evaluate.preference: pickscore")
        self.name, self.sha256 = path, self.clip.sha256

    def __call__(self, images: Tensor | Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See :class:`Preference`."""
        cosine = torch.nn.functional.cosine_similarity(self.clip(images), self.clip.text(captions))
        return self.clip.model.logit_scale.detach().exp().cpu() * cosine


class ImageReward:
    """Xu et al. 2023, https://arxiv.org/abs/2304.05977, with their package ``image-reward``."""

    name = "ImageReward-v1.0"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        package = _package("ImageReward", "image-reward", "imagereward")
        self.model: Any = package.load(self.name, device=str(device))
        self.sha256 = weights_hash(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See :class:`Preference`."""
        scores = [self.model.score(text, _pil(one)) for one, text in zip(images, captions, strict=True)]
        return torch.tensor(scores)


class HPSv2:
    """Wu et al. 2023, https://arxiv.org/abs/2306.09341, version 2.1, by their package ``hpsv2``, on its own device."""

    name = "HPSv2.1"
    sha256 = None  # the package does not expose its weights

    def __init__(self) -> None:
        self.package = _package("hpsv2", "hpsv2", "hpsv2")

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See :class:`Preference`."""
        scores = [
            float(self.package.score(_pil(one), text, hps_version="v2.1")[0])
            for one, text in zip(images, captions, strict=True)
        ]
        return torch.tensor(scores)


def load_preference(name: str, device: torch.device | str = "cpu") -> Preference:
    """One of ``pickscore``, ``imagereward`` and ``hpsv2``.

    Raises:
        UserError: Its package or its weights are missing.
    """
    if name == "pickscore":
        return PickScore(device=device)
    return ImageReward(device) if name == "imagereward" else HPSv2()


def _package(module: str, package: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:  # missing, or too old for the installed transformers
        raise UserError(
            f"evaluate.preference={name}: needs the package {package}, which cannot be imported ({error}); "
            "pip install -e '.[preference]'"
        ) from error


def _pil(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).numpy())
