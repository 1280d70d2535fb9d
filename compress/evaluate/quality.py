"""Scores images: each one is read once, passes each network once, and every metric is computed from that."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from compress.errors import UserError
from compress.evaluate import metrics as measures
from compress.evaluate.config import EvaluateConfig
from compress.evaluate.images import Images
from compress.evaluate.networks import ENCODER, Networks
from compress.evaluate.networks.weights import weights_hash
from compress.evaluate.reference import Reference
from compress.system import processes
from compress.system.progress import track

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Networks", "Reference", "names", "score_images"]

Scores = dict[str, dict[str, Any] | None]
Batch: TypeAlias = Tensor | list[Tensor]

PAIRED = {"psnr": measures.PSNR, "ssim": measures.SSIM, "ms_ssim": measures.MultiScaleSSIM}


def names(config: EvaluateConfig) -> list[str]:
    """All metrics that a config asks for, in the order of a table; but for those of single denoising steps."""
    sets = ["fid", "fid_teacher", "kid", "precision", "recall"]
    sets += ["cmmd"] if config.clip is not None else []
    sets += [f"{kind}_{name}" for name in config.encoders for kind in ("fd", "mmd")]
    text = ["clip_score", "r_at_1", "r_at_5"] if config.clip is not None else []
    return [name for name in [*sets, *text, *config.preference, *PAIRED, "lpips"] if config.wants(name)]


def score_images(
    images: Images,
    config: EvaluateConfig,
    networks: Networks,
    *,
    reference: Reference | None = None,
    teacher: Images | None = None,
    teacher_features: dict[str, Tensor] | None = None,
    captions: Sequence[str] | None = None,
    keep: dict[str, Tensor] | None = None,
) -> Scores:
    """All metrics of some images.

    Under several processes every one calls it with its own share of images, teacher's images and captions; the
    metrics are those of all shares together, the same in every process. Where the shares follow each other in the
    order of the processes, intervals too are those of one process.

    Args:
        images: n of them.
        config: Which metrics, and how.
        networks: Those of the run.
        reference: Real images' features, the same in every process; without it, no metric against a set.
        teacher: The teacher's images of the same prompts and seeds; without them, no paired metric.
        teacher_features: What ``keep`` held when the teacher's images were scored; computed if not given.
        captions: n captions; without them, no text alignment and no preference model.
        keep: Filled with the images' features by key of the network.

    Returns:
        For every name of :func:`names` the metric's dictionary with what it was computed with, or None where images
        to compare with or captions are missing.

    Raises:
        UserError: An image cannot be read, a network cannot be loaded, or two images of a pair differ in size.
        ValueError: The numbers of images, teacher's images and captions differ.
    """
    for other in (teacher, captions):
        if other is not None and len(other) != len(images):
            raise ValueError(f"expected {len(images)} teacher's images and captions, not {len(other)}")
    means = _settings(config.bootstrap)
    sets = reference is not None or teacher is not None or keep is not None
    seen = _Seen(networks, networks.keys(sets, captions is not None))
    if captions is not None:
        seen.liked = {name: _Liked(networks, name, config) for name in config.preference}
    if teacher is not None:
        seen.pairs = {name: metric(**means) for name, metric in PAIRED.items() if config.wants(name)}
        if config.lpips:
            seen.pairs["lpips"] = measures.LPIPS(networks.lpips, **means)
        if config.wants("fid_teacher") and "inception" not in (teacher_features or {}):
            seen.of_teacher = {"inception": []}
    with processes.together():
        for chosen, batch, others in _read(images, teacher, config.score_batch_size):
            seen.take(batch, others, captions[chosen] if captions is not None else [], chosen.start)
    features = {key: _joined(found) for key, found in seen.features.items()}
    if keep is not None:
        keep.update(features)

    scores: Scores = dict.fromkeys(names(config))
    if reference is not None:
        scores |= _against_reference(features, reference, config, networks)
    if teacher is not None and config.wants("fid_teacher"):
        theirs = {key: _joined(found) for key, found in seen.of_teacher.items()} or teacher_features or {}
        scores["fid_teacher"] = _against_teacher(features["inception"], theirs["inception"], config, networks)
    if captions is not None and "clip" in features:
        scores |= _text(features["clip"], captions, config, networks)
    scores |= {name: model.result() for name, model in seen.liked.items()}
    scores |= {name: {**metric.compute(), **_through(metric)} for name, metric in seen.pairs.items()}
    return {name: scores[name] for name in names(config)}


class _Seen:
    """What one look at every image gives."""

    def __init__(self, networks: Networks, keys: Sequence[str]) -> None:
        self.networks = networks
        self.features: dict[str, list[Tensor]] = {key: [] for key in keys}
        self.of_teacher: dict[str, list[Tensor]] = {}
        self.pairs: dict[str, Metric] = {}
        self.liked: dict[str, _Liked] = {}

    def take(self, batch: Batch, others: Batch | None, captions: Sequence[str], first: int) -> None:
        """Looks at a batch; ``others`` are the teacher's images, ``first`` is the place of the first one."""
        for key, found in self.features.items():
            found.append(self.networks[key](batch))
        for model in self.liked.values():
            model.update(batch, captions)
        if others is not None:
            _same_sizes(batch, others, first)
            for key, found in self.of_teacher.items():
                found.append(self.networks[key](others))
            for metric in self.pairs.values():
                metric.update(batch, others)


def _joined(batches: list[Tensor]) -> Tensor:
    """All rows; ``(0, 0)`` in a process that has no images."""
    return torch.cat(batches) if batches else torch.empty(0, 0)


def _read(images: Images, others: Images | None, size: int) -> Iterator[tuple[slice, Batch, Batch | None]]:
    """Batches of images and of their counterparts, the next one read while the last is looked at."""

    def load(start: int) -> tuple[slice, Batch, Batch | None]:
        chosen = slice(start, start + size)
        return chosen, images[chosen], None if others is None else others[chosen]

    starts = range(0, len(images), size)
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(load, 0) if len(starts) else None
        for start in track(starts, f"scoring {len(images)} images"):
            assert coming is not None
            batch = coming.result()
            if start + size < len(images):
                coming = ahead.submit(load, start + size)
            yield batch


def _same_sizes(batch: Batch, others: Batch, first: int) -> None:
    for index, (one, other) in enumerate(zip(batch, others, strict=True)):
        if one.shape != other.shape:
            a, b = (f"{image.shape[2]}x{image.shape[1]}" for image in (one, other))
            raise UserError(f"image {first + index} has {a} pixels, the one it is paired with {b}: make them equal")


def _against_reference(
    features: dict[str, Tensor], reference: Reference, config: EvaluateConfig, networks: Networks
) -> Scores:
    """Everything that compares two sets of features; one metric in memory at a time."""
    found: Scores = {}
    for key, own in features.items():
        if key not in reference.features:
            continue
        real = _share(reference.features[key])
        about = {
            **_of(networks, key), "reference": reference.name, "reference_sha256": reference.sha256[key],
        }  # fmt: skip
        for name, metric in _set_metrics(key, config):
            for part, result in _compare(metric, own, real, name).items():
                found[part] = {**result, **about}
    return found


def _set_metrics(key: str, config: EvaluateConfig) -> "Iterator[tuple[str, Metric]]":
    """The metrics of sets that a network's features serve; made when they are asked for."""
    settings = _settings(config.set_bootstrap)
    if key.startswith(ENCODER):
        name = key.removeprefix(ENCODER)
        yield f"fd_{name}", measures.FrechetDistance(**settings)
        yield f"mmd_{name}", measures.MaximumMeanDiscrepancy(**settings)
    elif key == "clip" and config.wants("cmmd"):
        yield "cmmd", measures.MaximumMeanDiscrepancy(**settings)
    elif key == "inception":
        if config.wants("fid"):
            yield "fid", measures.FrechetDistance(**settings)
        if config.wants("kid"):
            yield "kid", measures.KernelDistance(**settings)
        if config.wants("precision") or config.wants("recall"):
            yield "", measures.PrecisionRecall()


def _compare(metric: "Metric", own: Tensor, theirs: Tensor, name: str) -> dict[str, dict[str, Any]]:
    """Results by name; a metric without a name of its own has several."""
    for rows, real in ((theirs, True), (own, False)):
        if len(rows):
            metric.update(rows, real=real)
    result = metric.compute()
    return {name: result} if name else result


def _against_teacher(own: Tensor, teacher: Tensor, config: EvaluateConfig, networks: Networks) -> dict[str, Any]:
    metric = measures.FrechetDistance(paired=True, **_settings(config.set_bootstrap))
    found = _compare(metric, own, teacher, "fid_teacher")["fid_teacher"]
    return {**found, **_of(networks, "inception"), "reference": "the teacher's images"}


def _text(own: Tensor, captions: Sequence[str], config: EvaluateConfig, networks: Networks) -> Scores:
    texts = networks.clip.text(captions) if captions else own
    about = _of(networks, "clip")
    found: Scores = {}
    if config.wants("clip_score"):
        score = measures.CLIPScore(**_settings(config.bootstrap))
        if captions:
            score.update(own, texts)
        found["clip_score"] = {**score.compute(), **about}
    if config.wants("r_at_1") or config.wants("r_at_5"):
        retrieval = measures.Retrieval()
        if captions:
            retrieval.update(own, texts, torch.tensor([_caption_id(caption) for caption in captions]))
        found |= {name: {**result, **about} for name, result in retrieval.compute().items() if config.wants(name)}
    return found


def _caption_id(caption: str) -> int:
    """A whole number for a caption, the same in every process and exact in float64."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:6])


class _Liked:
    """A preference model's mean score."""

    def __init__(self, networks: Networks, name: str, config: EvaluateConfig) -> None:
        self.model = networks.preference[name]
        self.metric = measures.MeanScore(**_settings(config.bootstrap))

    def update(self, batch: Batch, captions: Sequence[str]) -> None:
        self.metric.update(self.model(batch, captions))

    def result(self) -> dict[str, Any]:
        return {**self.metric.compute(), "network": self.model.name, "network_sha256": self.model.sha256}


def _share(rows: Tensor) -> Tensor:
    """This process's part of rows that every process has."""
    return rows.tensor_split(processes.count())[processes.index()]


def _of(networks: Networks, key: str) -> dict[str, Any]:
    network = networks[key]
    return {"network": network.name, "network_sha256": network.sha256, "preprocessing": network.preprocessing}


def _through(metric: "Metric") -> dict[str, Any]:
    """What a paired metric looked through: nothing, but for LPIPS."""
    network = getattr(metric, "network", None)
    if not isinstance(network, torch.nn.Module):
        return {"network": None, "network_sha256": None}
    return {"network": "LPIPS AlexNet", "network_sha256": weights_hash(network)}


def _settings(resamples: int | None = None) -> dict[str, Any]:
    """How every metric is made. States lie on the CPU, which NCCL cannot gather: they travel as objects."""
    settings: dict[str, Any] = {} if resamples is None else {"resamples": resamples}
    if processes.count() > 1 and torch.distributed.get_backend() == "nccl":
        settings["dist_sync_fn"] = lambda rows, group=None: processes.gather(rows)
    return settings
