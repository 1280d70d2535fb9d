"""The networks of the metrics, each loaded once, when it is first used."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from compress.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    import torch

    from compress.evaluate.networks.clip import Clip
    from compress.evaluate.networks.preference import Preference

ENCODER = "encoder."  # prefix of the names of ``evaluate.encoders`` in the keys of networks
OF_INCEPTION = ("fid", "kid", "precision", "recall", "fid_teacher")
OF_CLIP_IMAGES = ("cmmd",)
OF_CLIP_TEXT = ("clip_score", "r_at_1", "r_at_5")


class Network(Protocol):
    """Maps images to features."""

    @property
    def name(self) -> str:
        """Name in reports."""

    @property
    def sha256(self) -> str:
        """Hash of its weights."""

    @property
    def preprocessing(self) -> str:
        """How it resizes images to its input, in a few words."""

    def __call__(self, images: "torch.Tensor | Sequence[torch.Tensor]", /) -> "torch.Tensor":
        """Features of uint8 RGB images: ``(b, 3, height, width)``, or a list of ``(3, height, width)``.

        Returns:
            float32, ``(b, d)``, on the CPU.
        """


class Networks:
    """All networks of an evaluation.

    Args:
        config: Which networks, and their paths.
        device: Where they compute.
    """

    def __init__(self, config: EvaluateConfig, device: "torch.device | str" = "cpu") -> None:
        self.config, self.device = config, device
        self._encoders: dict[str, Network] = {}

    @cached_property
    def inception(self) -> Network:
        """The network of FID."""
        from compress.evaluate.networks import inception

        return inception.Inception(self.config.inception, self.device, self.config.fid_resize)

    @cached_property
    def clip(self) -> "Clip":
        """The network of CLIP score, retrieval and CMMD; ``config.clip`` is not None."""
        from compress.evaluate.networks.clip import load_clip

        assert self.config.clip is not None
        return load_clip(self.config.clip, self.device, self.config.clip_name)

    @cached_property
    def preference(self) -> "dict[str, Preference]":
        """The preference models asked for, by name."""
        from compress.evaluate.networks.preference import load_preference

        return {name: load_preference(name, self.device) for name in self.config.preference}

    @cached_property
    def lpips(self) -> "torch.nn.Module":
        """The network of LPIPS."""
        from compress.evaluate.metrics.paired import alexnet

        return alexnet()

    def load(self, sets: bool, captions: bool, pairs: bool) -> None:
        """Loads all needed networks, so that a missing one is found before any image is read.

        Args:
            sets: See :meth:`keys`.
            captions: See :meth:`keys`.
            pairs: Whether images are compared in pairs.

        Raises:
            UserError: A network cannot be loaded.
        """
        for key in self.keys(sets, captions):
            self[key]
        if captions:
            self.preference  # noqa: B018 - loads them
        if pairs and self.config.lpips:
            self.lpips  # noqa: B018

    def keys(self, sets: bool, captions: bool) -> list[str]:
        """Keys of the networks that the images pass.

        Args:
            sets: Whether sets of images are compared.
            captions: Whether the images have captions.
        """
        config = self.config
        keys = ["inception"] if sets and any(map(config.wants, OF_INCEPTION)) else []
        of_clip = (OF_CLIP_IMAGES if sets else ()) + (OF_CLIP_TEXT if captions else ())
        if config.clip is not None and any(map(config.wants, of_clip)):
            keys.append("clip")
        return keys + [ENCODER + name for name in config.encoders if sets]

    def __getitem__(self, key: str) -> Network:
        """``"inception"``, ``"clip"`` or ``"encoder.NAME"``.

        Raises:
            UserError: The network cannot be loaded.
        """
        if not key.startswith(ENCODER):
            return self.inception if key == "inception" else self.clip
        if key not in self._encoders:
            from compress.evaluate.networks.encoder import Encoder

            name = key.removeprefix(ENCODER)
            self._encoders[key] = Encoder(self.config.encoders[name], self.device, f"evaluate.encoders.{name}")
        return self._encoders[key]
