"""Scores images. Each image is read once and passes each network once; all metrics use these features."""

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
    """All metrics of images that a config asks for, in the order of the table."""
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

    With several processes, each calls it with its share of images, teacher's images and captions. Every process gets
    the metrics of all shares. If the shares are in the order of the processes, the intervals equal those of one
    process.

    Args:
        images: n images.
        config: Which metrics, and their settings.
        networks: The run's networks.
        reference: Real images' features, the same in every process; None for no metric of sets.
        teacher: The teacher's images of the same prompts and seeds; None for no paired metric.
        teacher_features: The teacher's features, as ``keep`` returned them; computed if None.
        captions: n captions; None for no text alignment and no preference model.
        keep: Filled with the images' features by the network's key.

    Returns:
        For every name of :func:`names` the metric's dictionary with its network, or None if its reference, teacher or
        captions are missing.

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
    """Features and metrics, filled batch by batch."""

    def __init__(self, networks: Networks, keys: Sequence[str]) -> None:
        self.networks = networks
        self.features: dict[str, list[Tensor]] = {key: [] for key in keys}
        self.of_teacher: dict[str, list[Tensor]] = {}
        self.pairs: dict[str, Metric] = {}
        self.liked: dict[str, _Liked] = {}

    def take(self, batch: Batch, others: Batch | None, captions: Sequence[str], first: int) -> None:
        """Adds a batch; ``others`` are the teacher's images, ``first`` is the index of the first image."""
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
    """All rows; ``(0, 0)`` in a process without images."""
    return torch.cat(batches) if batches else torch.empty(0, 0)


def _read(images: Images, others: Images | None, size: int) -> Iterator[tuple[slice, Batch, Batch | None]]:
    """Batches of images and of their counterparts; the next batch is read while one is scored."""

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
            raise UserError(f"image {first + index} has {a} pixels, its counterpart {b}: make their sizes equal")


def _against_reference(
    features: dict[str, Tensor], reference: Reference, config: EvaluateConfig, networks: Networks
) -> Scores:
    """All metrics that compare two sets of features; one metric in memory at a time."""
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
    """The metrics of sets for a network's features, made one at a time."""
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
    """Results by name. A metric with an empty name has several results."""
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
    """An integer for a caption, the same in every process and exact in float64."""
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
    """This process's share of rows that every process has."""
    return rows.tensor_split(processes.count())[processes.index()]


def _of(networks: Networks, key: str) -> dict[str, Any]:
    network = networks[key]
    return {"network": network.name, "network_sha256": network.sha256, "preprocessing": network.preprocessing}


def _through(metric: "Metric") -> dict[str, Any]:
    """The network of a paired metric: LPIPS has one, the others have none."""
    network = getattr(metric, "network", None)
    if not isinstance(network, torch.nn.Module):
        return {"network": None, "network_sha256": None}
    return {"network": "LPIPS AlexNet", "network_sha256": weights_hash(network)}


def _settings(resamples: int | None = None) -> dict[str, Any]:
    """Arguments of every metric. NCCL cannot gather states on the CPU, so they are sent as objects."""
    settings: dict[str, Any] = {} if resamples is None else {"resamples": resamples}
    if processes.count() > 1 and torch.distributed.get_backend() == "nccl":
        settings["dist_sync_fn"] = lambda rows, group=None: processes.gather(rows)
    return settings
