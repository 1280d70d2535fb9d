"""``recipe=score``: compares existing images with other images, with their captions, or both."""

import importlib.metadata
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.values import build
from compress.errors import UserError, bad_value
from compress.evaluate.captions import some
from compress.evaluate.config import EMBEDDED_CLIP, OTHER_CLIP, EvaluateConfig
from compress.evaluate.images import ImageFiles, ImageSlice
from compress.jobs.score.inputs import LEAST, inputs
from compress.run.config import check_device_name
from compress.system import processes

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from compress.evaluate.quality import Scores

VERSION = 2  # raised when the numbers change their meaning
LIBRARIES = ("torch", "torchmetrics", "transformers", "pillow")

# Keys of the evaluate group about sampling and choosing images; here the images exist and all are used.
OF_SAMPLING = (
    "images", "batch_size", "steps", "few_steps", "guidance", "scheduler", "height", "width", "grid", "keep_images",
    "prompts", "reference", "reference_images", "noise_floor", "latency_repeats", "compiled",
)  # fmt: skip


@dataclass(frozen=True)
class ScoreConfig:
    """What to score.

    Attributes:
        images: Folder of the images.
        evaluate: Metrics and networks.
        reference: Folder of images to compare with; None for none.
        captions: File of the images' captions; None for none.
        paired: Whether images of the same name in both folders form pairs.
        out: Folder for ``score.json``; None for a new one under ``runs/``.
        store: Folder whose ``features/`` holds the reference's features.
        device: As in :class:`compress.run.config.RunConfig`.
    """

    images: str
    evaluate: EvaluateConfig
    reference: str | None = None
    captions: str | None = None
    paired: bool = False
    out: str | None = None
    store: str = "runs/store"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Checks that there is something to compute.

        Raises:
            UserError: There is nothing to compare with or to compute, or a metric needs another input.
        """
        check_device_name(self.device)
        if self.paired and self.reference is None:
            raise bad_value("paired", "true", "reference=DIR to pair the images with")
        if self.reference is None and self.captions is None:
            raise UserError("reference and captions are both null: give reference=DIR, captions=FILE or both")
        if self.evaluate.lpips and not self.paired:
            raise bad_value("evaluate.lpips", "true", "paired=true, because LPIPS compares pairs of images")
        if self.evaluate.preference and self.captions is None:
            raise bad_value(
                "evaluate.preference", some(self.evaluate.preference), "captions=FILE, which these models read"
            )
        if self.captions is not None and self.evaluate.clip is None and not self.evaluate.preference:
            raise bad_value("evaluate.clip", "null", "a CLIPModel that reads the captions")
        for key, name in (("encoders", "evaluate.encoders"), ("fid_resize", "evaluate.fid_resize")):
            if self.reference is None and getattr(self.evaluate, key) != getattr(EvaluateConfig(), key):
                raise bad_value(name, getattr(self.evaluate, key), "reference=DIR, the images to compare with")
        if not self.metrics:
            raise bad_value("evaluate.leave_out", some(self.evaluate.leave_out), "at least one metric to compute")

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics to compute."""
        from compress.evaluate.networks import OF_CLIP_TEXT

        evaluate = self.evaluate
        of_sets = ["fid", "kid", "precision", "recall", *(["cmmd"] if evaluate.clip is not None else [])]
        wanted = of_sets if self.reference is not None else []
        wanted += ["psnr", "ssim", "ms_ssim"] if self.paired else []
        wanted += OF_CLIP_TEXT if self.captions is not None and evaluate.clip is not None else []
        further = [*evaluate.encoders, *evaluate.preference, *(["lpips"] if evaluate.lpips else [])]
        return [*filter(evaluate.wants, wanted), *further]


def run_job(cfg: "DictConfig") -> None:
    """Scores images as a composed config says, prints a table and writes ``score.json``.

    Raises:
        UserError: The user made a mistake; raised before a weight is loaded where possible.
    """
    config = to_score_config(cfg)
    score(config)


def to_score_config(cfg: "DictConfig") -> ScoreConfig:
    """Checks a composed config.

    Raises:
        UserError: A value has the wrong type, is out of range, or has no effect here.
    """
    from omegaconf import OmegaConf

    from compress.evaluate.manifest import changed

    tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    if tree.get("images") in (None, "???"):
        raise UserError("images is missing: give images=DIR, the folder of the images to score")
    names = [field.name for field in fields(ScoreConfig)]
    config = build(ScoreConfig, {name: tree[name] for name in names if name in tree}, "")
    given = [key for key in ("prompts", "reference") if getattr(config.evaluate, key) is not None]
    for key in [*given, *changed(config.evaluate)]:
        if key in OF_SAMPLING:
            value = getattr(config.evaluate, key)
            raise bad_value(f"evaluate.{key}", value, "no change, because images are neither sampled nor chosen here")
    if tree["stages"]:
        raise UserError(f"stages: expected none, because nothing is compressed here, not {some(list(tree['stages']))}")
    for key, only, why in (
        ("precision", "fp32", "the metrics' networks compute in fp32"),
        ("seed", 0, "nothing is sampled here"),
    ):
        if tree[key] != only:
            raise bad_value(key, tree[key], f"{only}, because {why}")
    return config


def score(config: ScoreConfig) -> dict[str, Any]:
    """Scores images, prints a table and writes ``score.json``.

    With ``accelerate launch`` every process calls it and scores its share.

    Returns:
        ``{"metrics", "manifest"}`` as in the file.

    Raises:
        UserError: Images, captions, networks or folders are missing or wrong.
    """
    from compress.config.folders import default_out
    from compress.evaluate import check
    from compress.evaluate.networks import OF_INCEPTION
    from compress.run import preflight

    preflight.check_device(config.device)
    needed = config.evaluate
    if config.reference is None:
        needed = replace(needed, leave_out=(*needed.leave_out, *OF_INCEPTION))
    check(replace(needed, images=LEAST, protocol="score"))
    out = Path(config.out or default_out("score"))
    for key, folder in (("out", out), ("store", Path(config.store))):
        preflight.check_writable(key, folder)
    images, reference, captions = inputs(config)

    from compress.evaluate.networks import Networks
    from compress.evaluate.quality import score_images
    from compress.evaluate.reference import files_reference

    device = processes.join(config.device)
    evaluate = replace(config.evaluate, leave_out=(*config.evaluate.leave_out, "fid_teacher"))
    networks = Networks(evaluate, device)
    mine = processes.share(len(images), evaluate.score_batch_size)
    with processes.together():
        networks.load(sets=reference is not None, captions=captions is not None, pairs=config.paired)
        images.verify(mine)
        if reference is not None and config.paired:
            reference.verify(mine)
    found = None
    if reference is not None:
        name = Path(str(config.reference)).expanduser().resolve().name
        found = files_reference(reference, name, networks, Path(config.store) / "features")
    scores = score_images(
        ImageSlice(images, mine),
        evaluate,
        networks,
        reference=found,
        teacher=ImageSlice(reference, mine) if config.paired and reference is not None else None,
        captions=captions[mine.start : mine.stop] if captions is not None else None,
    )
    result = {
        "metrics": {name: metric for name, metric in scores.items() if metric is not None},
        "manifest": _manifest(config, images, reference, scores),
    }
    if processes.is_main():
        _write(out, result)
        _show(result, out)
    return result


def _manifest(
    config: ScoreConfig, images: ImageFiles, reference: ImageFiles | None, scores: "Scores"
) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    networks = {
        metric["network"]: metric["network_sha256"]
        for metric in scores.values()
        if metric is not None and metric.get("network")
    }
    unused = (*OF_SAMPLING, "protocol", "version")  # of a protocol, which also samples
    settings = {key: value for key, value in asdict(config.evaluate).items() if key not in unused}
    return {
        "version": VERSION,
        "images": {"folder": config.images, **_about(images)},
        "reference": None if reference is None else {"folder": config.reference, **_about(reference)},
        "captions": None if config.captions is None else {"file": config.captions, "sha256": _hash(config.captions)},
        "paired": config.paired,
        "interval": 0.95,
        "evaluate": settings,
        "networks": networks,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _hash(file: str) -> str:
    from compress.system.files import file_hash

    return file_hash(Path(file).expanduser())


def _about(images: ImageFiles) -> dict[str, Any]:
    sizes = sorted(set(images.sizes), key=lambda size: size[0] * size[1])
    (low, narrow), (high, wide) = sizes[0], sizes[-1]
    return {
        "n": len(images),
        "sha256": images.sha256,
        "smallest": f"{narrow}x{low}",
        "largest": f"{wide}x{high}",
        "sizes": len(sizes),
        "on_white": images.transparent,
    }


def _write(out: Path, result: dict[str, Any]) -> None:
    from compress.system.files import write_text

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "score.json", json.dumps(result, indent=2, allow_nan=False) + "\n")


def _show(result: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from compress.jobs.score.report import print_scores

    console = Console()
    print_scores(result, console)
    if result["manifest"]["evaluate"]["clip"] == EMBEDDED_CLIP and any(
        metric["network"] == result["manifest"]["evaluate"]["clip_name"] for metric in result["metrics"].values()
    ):
        console.print(f"{OTHER_CLIP}.", style="dim")
    console.print(f"\nscores     {out / 'score.json'}", markup=False, highlight=False, soft_wrap=True)
