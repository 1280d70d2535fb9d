"""The networks that metrics look through, each loaded when first asked for and once a run."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from compress.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    import torch

    from compress.evaluate.networks.clip import Clip
    from compress.evaluate.networks.preference import Preference

ENCODER = "encoder."  # before the names of ``evaluate.encoders``, wherever networks go by a key
OF_INCEPTION = ("fid", "kid", "precision", "recall", "fid_teacher")
OF_CLIP_IMAGES = ("cmmd",)
OF_CLIP_TEXT = ("clip_score", "r_at_1", "r_at_5")


class Network(Protocol):
    """Images in, features out."""

    @property
    def name(self) -> str:
        """What it is called in reports."""

    @property
    def sha256(self) -> str:
        """Hash of its weights."""

    @property
    def preprocessing(self) -> str:
        """How it brings images to its own size, in a few words."""

    def __call__(self, images: "torch.Tensor | Sequence[torch.Tensor]", /) -> "torch.Tensor":
        """Features of uint8 RGB images: ``(b, 3, height, width)``, or ``(3, height, width)`` of differing sizes.

        Returns:
            float32, ``(b, d)``, on the CPU.
        """


class Networks:
    """All networks of an evaluation.

    Args:
        config: Which, and where they are.
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
        """Loads all that will be needed, so that what cannot be is found before any image is looked at.

        Args:
            sets: See :meth:`keys`.
            captions: See :meth:`keys`.
            pairs: Whether images are compared one by one.

        Raises:
            UserError: One of them cannot be loaded.
        """
        for key in self.keys(sets, captions):
            self[key]
        if captions:
            self.preference  # noqa: B018 - loads them
        if pairs and self.config.lpips:
            self.lpips  # noqa: B018

    def keys(self, sets: bool, captions: bool) -> list[str]:
        """The networks that images have to pass.

        Args:
            sets: Whether they are compared with other images as a set.
            captions: Whether they have captions.
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
            UserError: It cannot be loaded.
        """
        if not key.startswith(ENCODER):
            return self.inception if key == "inception" else self.clip
        if key not in self._encoders:
            from compress.evaluate.networks.encoder import Encoder

            name = key.removeprefix(ENCODER)
            self._encoders[key] = Encoder(self.config.encoders[name], self.device, f"evaluate.encoders.{name}")
        return self._encoders[key]
