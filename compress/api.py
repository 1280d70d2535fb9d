"""The public API: what a recipe does, from Python.

Every step takes a pipeline and gives a pipeline and a report; the one that was given stays as it was. A denoiser alone
may stand for its pipeline where a method needs no data, no scheduler and no text::

    import compress

    teacher = compress.load("embedded:emoji/pipeline")
    student, report = compress.prune(teacher, "magnitude", ratio=0.25)
    student, report = compress.distill(student, "features", teacher=teacher, data="embedded:emoji/emoji.parquet")
    student, report = compress.quantize(student, "int8")
    student, report = compress.evaluate(student, "quick", teacher=teacher, data="embedded:emoji/emoji.parquet")
    compress.save(student, "my-student")
"""

import copy
import hashlib
import json
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    import datasets
    import torch

    from compress.data import Data
    from compress.evaluate import Evaluation
    from compress.stage import StageReport

    Images: TypeAlias = str | Path | datasets.Dataset | Data

Model = TypeVar("Model")
"""A ``DiffusionPipeline``, or a denoiser of diffusers."""

Log = Callable[[dict[str, float], int], None]

_done: "weakref.WeakKeyDictionary[Any, list[dict[str, Any]]]" = weakref.WeakKeyDictionary()
"""Pipeline to the entries of the stages that made it, as ``compress.json`` holds them."""


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> Any:
    """Loads a pipeline, frozen and in evaluation mode.

    Args:
        path: A folder in diffusers' layout, such as a checkpoint; a hub id; or ``embedded:emoji/pipeline``.
        revision: Branch, tag or commit on the hub.
        variant: Of the weight files, such as ``"fp16"``.
        device: Where its weights go.
        dtype: Of its weights; None: float32.

    Raises:
        UserError: There is no pipeline, or it cannot be loaded.
    """
    from compress.models import ModelConfig, hub_info, load_teacher
    from compress.store.checkpoint import INFO, load_checkpoint, read_info

    config = ModelConfig(str(path), revision, variant)
    folder = config.folder
    if folder is None and (found := hub_info(config)) is not None:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(config.path, revision=found.name))  # named by the commit
    if folder is not None and (folder / INFO).is_file():
        pipeline = load_checkpoint(folder, device, dtype)
        _done[pipeline] = list(read_info(folder).get("stages", []))
        return pipeline
    return load_teacher(config, device, dtype)


def prune(
    pipeline: Model, method: str = "magnitude", *, data: "Images | None" = None, seed: int = 0, **keys: Any
) -> "tuple[Model, StageReport]":
    """Removes channels, blocks, ranks or weights.

    Args:
        pipeline: A pipeline or a denoiser; stays as it was.
        method: An option of ``conf/prune``, or a module of your own.
        data: Images and captions, for methods that look at examples: a path, a hub id, or a dataset with the columns
            ``image`` and ``text``.
        seed: Of everything random.
        keys: Keys of the method's YAML file.

    Returns:
        The pruned pipeline or denoiser, and what was done.

    Raises:
        UserError: An unknown method or key, a value out of range, or a model that cannot be pruned so.
    """
    return _stage("prune", pipeline, method, keys, data=data, seed=seed)


def distill(
    pipeline: Model,
    method: str = "features",
    *,
    teacher: Any,
    data: "Images",
    seed: int = 0,
    folder: str | Path | None = None,
    log: Log | None = None,
    **keys: Any,
) -> "tuple[Model, StageReport]":
    """Trains a pipeline's denoiser to do what its teacher's does.

    Args:
        pipeline: The student; stays as it was.
        method: An option of ``conf/distill``, or a module of your own.
        teacher: The uncompressed pipeline.
        data: Images and captions, see :func:`prune`.
        seed: Of everything random.
        folder: Where training states go, from which the same call continues, also with more ``steps``; None: a folder
            for temporary files, removed in the end.
        log: Takes metrics and the number of steps done.
        keys: Keys of the method's YAML file.

    Returns:
        The trained pipeline, and what was done.

    Raises:
        UserError: See :func:`prune`; or student, teacher and data do not fit each other, or the training diverged.
    """
    return _stage("distill", pipeline, method, keys, data=data, seed=seed, teacher=teacher, folder=folder, log=log)


def quantize(
    pipeline: Model,
    method: str = "int8",
    *,
    teacher: Any = None,
    data: "Images | None" = None,
    seed: int = 0,
    folder: str | Path | None = None,
    log: Log | None = None,
    **keys: Any,
) -> "tuple[Model, StageReport]":
    """Stores the weights of the denoiser in fewer bits, some methods after a training with rounded weights.

    See :func:`prune` and, for the methods that train and their ``teacher``, ``folder`` and ``log``, :func:`distill` for
    arguments, returns and errors.
    """
    return _stage("quantize", pipeline, method, keys, data=data, seed=seed, teacher=teacher, folder=folder, log=log)


def evaluate(
    pipeline: Model,
    protocol: str = "quick",
    *,
    data: "Images | None" = None,
    teacher: Any = None,
    seed: int = 0,
    folder: str | Path | None = None,
    **keys: Any,
) -> "tuple[Model, Evaluation]":
    """Measures what a pipeline costs and what its images are worth.

    Args:
        pipeline: Stays as it was.
        protocol: An option of ``conf/evaluate``.
        data: Captions to sample from and real images to compare with, see :func:`prune`; not needed for cost alone.
        teacher: The pipeline whose images it is compared with, of the same prompts and noise; measured first.
        seed: Image i has the seed ``seed + i``.
        folder: Where the images go, of the teacher in a folder ``teacher`` inside; finished batches that are there are
            not sampled again. None: a folder for temporary files, removed in the end.
        keys: Keys of the protocol's YAML file.

    Returns:
        The pipeline, and its costs and metrics.

    Raises:
        UserError: An unknown protocol or key, a value out of range, or a missing file.
    """
    from compress.config.compose import option
    from compress.config.values import build
    from compress.evaluate import EvaluateConfig, check
    from compress.evaluate import evaluate as measure
    from compress.evaluate.networks import Networks
    from compress.models import denoiser

    config = build(EvaluateConfig, {**option("evaluate", protocol), **keys}, "")
    check(config)
    loaded: Any = _load_data(_needed("data", data)) if config.images else None
    model: Any = denoiser(pipeline)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch if folder is None else folder)
        place: dict[str, Any] = {"device": model.device, "dtype": model.dtype, "seed": seed}
        place["networks"] = Networks(config, model.device)
        beside = None
        if teacher is not None and config.images:
            beside = root / "teacher"
            measure(teacher, loaded, config, beside, **place)
        model.save_pretrained(Path(scratch) / "cost" / _name(pipeline))
        _write_index(pipeline, Path(scratch) / "cost")
        report = measure(
            pipeline,
            loaded,
            config,
            root,
            cost_of=Path(scratch) / "cost",
            teacher=beside,
            **place,  # type: ignore
        )
    return pipeline, report


def accelerate(
    pipeline: Any,
    engine: str = "auto",
    *,
    denoiser: str | None = None,
    vae: str | None = None,
    text_encoder: str = "eager",
    precision: str = "auto",
    linear: str | None = None,
    cache: str | Path | None = None,
) -> Any:
    """A pipeline that computes the same faster, and is used as before.

    Each shape is compiled when it is first seen; what OpenVINO computes then is compared with the pipeline itself. A
    checkpoint with ranges of activations, such as ``quantize("w8a8")`` leaves, runs in int8 arithmetic in OpenVINO.

    Args:
        pipeline: A pipeline, or a path as for :func:`load`; stays as it was.
        engine: ``openvino`` (CPUs), ``inductor`` (torch.compile), ``eager``, or ``auto``: the fastest that runs here.
        denoiser: Its own engine; None: ``engine``.
        vae: As ``denoiser``, for the decoder.
        text_encoder: The engine of all text encoders; they run once an image, so compiling them saves little.
        precision: Outside of int8 layers: ``fp32``, ``bf16``, or ``auto``: bf16 where that is faster.
        linear: ``int8`` or ``fp8``: the denoiser's Linear layers in 8 bits, with inputs rounded at each call, in
            ``inductor`` on CUDA alone; it changes what is computed. None: as the weights are.
        cache: Folder for compiled graphs; None: ``compress/graphs`` in the user's cache folder.

    Raises:
        UserError: An engine cannot run here, with the reason.
    """
    from compress.runtime import Engines, cache_folder, check_engine_name
    from compress.runtime import accelerate as accelerated

    check_engine_name(engine)
    engines = Engines(denoiser or engine, vae or engine, text_encoder, precision, linear)
    loaded = load(pipeline) if isinstance(pipeline, str | Path) else pipeline
    return accelerated(loaded, engines, cache_folder() if cache is None else Path(cache))


def save(pipeline: Any, folder: str | Path) -> Path:
    """Writes a pipeline as a checkpoint that stock diffusers loads, after it has been read back.

    Args:
        pipeline: As a step of this API gave it.
        folder: Replaced where it is an earlier checkpoint of this package.

    Returns:
        The folder.

    Raises:
        UserError: The folder holds something else than a checkpoint, a weight or an output is not finite, or the disk
            is full or cannot be written.
        RuntimeError: What was read back is not what was saved.
    """
    from compress.models.sampling import INFO, saved_sampling
    from compress.report import model_card
    from compress.stage import declares
    from compress.store.checkpoint import model_file, save_checkpoint

    place = Path(folder)
    if place.is_file() or (place.is_dir() and any(place.iterdir()) and not (place / INFO).is_file()):
        raise bad_value("folder", folder, f"a new folder, or a checkpoint with {INFO}, which is replaced")
    stages = _done.get(pipeline, [])
    info = {"stages": stages, "model_file": model_file(pipeline), **saved_sampling(pipeline)}
    exact, libraries = any(declares(stages, "exact")), declares(stages, "libraries")
    save_checkpoint(pipeline, Path(folder), info, model_card(info), exact=exact, libraries=libraries)
    return Path(folder)


def _stage(
    kind: str,
    pipeline: Any,
    method: str,
    keys: dict[str, Any],
    *,
    data: "Images | None",
    seed: int,
    teacher: Any = None,
    folder: str | Path | None = None,
    log: Log | None = None,
) -> "tuple[Any, StageReport]":
    """Runs a method on a copy of what was given."""
    from accelerate.utils import set_seed

    from compress.config.compose import option
    from compress.models import denoiser
    from compress.models.quantized import is_quantized
    from compress.run.config import stage_config
    from compress.stage import StageContext

    stage = stage_config(kind, {**option(kind, method), **keys}, kind)
    stage.declared.check_installed(stage.method)
    if stage.declared.needs == "float" and is_quantized(_model(pipeline)):
        name = type(_model(pipeline)).__name__
        raise UserError(f"{kind}={method} needs float weights, and the {name} is quantized already: {kind} it before")
    student, done = _copy(pipeline), _done.get(pipeline, [])
    with tempfile.TemporaryDirectory() as scratch:
        later: Any = _LazyData(lambda: _load_data(_needed("data", data)))
        context = StageContext(
            load_teacher=lambda: _needed("teacher", teacher), data=later,
            folder=Path(scratch if folder is None else folder), history=done, seed=seed,
            device=denoiser(student).device, dtype=denoiser(student).dtype, log=log or (lambda metrics, step: None),
        )  # fmt: skip
        if folder is not None:
            given = later.fingerprint if isinstance(data, str | Path) else ""
            _check_call(Path(folder), [stage.method, _of_training(stage.config), seed, given], [student, teacher])
        set_seed(seed)
        try:
            report = stage.module.run(student, stage.config, context)
        except UserError as error:
            if folder is None and scratch in str(error):
                raise UserError(f"{error}, which was temporary and is gone: give folder= to keep it") from error
            raise
    result = denoiser(student) if isinstance(student, _Bare) else student
    entry = {
        "name": kind, "kind": kind, "method": stage.method, "config": asdict(stage.config),
        "declared": stage.declared.declared(), "coverage": report.coverage, "details": report.details,
        "curves": report.curves,
    }  # fmt: skip
    _done[result] = [*done, entry]
    return result, report


def _of_training(config: Any) -> dict[str, Any]:
    """The keys of a training that decide its first steps."""
    later = ("steps", "budget", "plateau", "save_every", "keep_states", "log_every", "validation")
    return {key: value for key, value in asdict(config).items() if key not in later}


def _check_call(folder: Path, keys: list[Any], pipelines: list[Any]) -> None:
    """Refuses a folder with the training states of another call, whose result this one would give.

    Raises:
        UserError: The folder holds those, or cannot be written.
    """
    import torch

    digest = hashlib.sha256(json.dumps(keys, default=str).encode())
    for model in (_model(pipeline) for pipeline in pipelines if pipeline is not None):
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    file = folder / "call.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.read_text(encoding="utf-8") != digest.hexdigest():
            raise UserError(
                f"folder={folder}: holds the training of another student, teacher, data or other keys: give another "
                "folder, or remove this one"
            )
        file.write_text(digest.hexdigest(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"folder={folder}: cannot be written ({error.strerror or error})") from error


def _model(pipeline: Any) -> Any:
    """The denoiser of a pipeline; a denoiser itself."""
    import torch

    from compress.models import denoiser

    return pipeline if isinstance(pipeline, torch.nn.Module) else denoiser(pipeline)


class _Bare:
    """Stands for the pipeline of a denoiser alone."""

    def __init__(self, model: Any) -> None:
        name = "unet" if "UNet" in type(model).__name__ else "transformer"
        self.register_modules(**{name: model})

    def register_modules(self, **modules: Any) -> None:
        vars(self).update(modules)

    def __getattr__(self, name: str) -> Any:
        if name in ("scheduler", "vae", "text_encoder", "tokenizer"):
            raise UserError(f"this needs the {name} of a pipeline: give the pipeline and not its denoiser alone")
        raise AttributeError(name)


class _LazyData:
    """An object that is loaded when something of it is asked for."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._loaded = load, None

    def __getattr__(self, name: str) -> Any:
        if self._loaded is None:
            self._loaded = self._load()
        return getattr(self._loaded, name)


def _copy(pipeline: Any) -> Any:
    """A pipeline of the same components and a denoiser of its own."""
    from diffusers import DiffusionPipeline

    from compress.models import denoiser, set_denoiser

    if not isinstance(pipeline, DiffusionPipeline):
        return _Bare(copy.deepcopy(pipeline))
    twin = copy.copy(pipeline)  # shallow: a component that is set on it stays out of the original
    set_denoiser(twin, copy.deepcopy(denoiser(pipeline)))
    return twin


def _needed(name: str, value: Any) -> Any:
    if value is None:
        raise UserError(f"{name} is missing: this method needs {name}=...")
    return value


def _load_data(value: "Images") -> "Data":
    import datasets

    from compress.data import Data, DataConfig, load_data
    from compress.data.columns import is_image

    if isinstance(value, Data):
        return value
    if isinstance(value, datasets.Dataset):
        pictures = any(is_image(feature) for feature in value.features.values())
        if "text" not in value.column_names or (pictures and "image" not in value.column_names):
            raise UserError(f"data has the columns {', '.join(value.column_names)}: expected image and text, or text")
        rows = value.with_format(None)
        if "image" in rows.column_names:
            rows = rows.cast_column("image", datasets.Image())
        return Data(train=rows, text=list(rows["text"]), fingerprint=str(value._fingerprint), reference=None)
    if not isinstance(value, str | Path):
        expected = "a path, a hub id, or a datasets.Dataset with the columns image and text, or text"
        raise UserError(f"data is a {type(value).__name__}: expected {expected}")
    return load_data(DataConfig(str(value)))


def _name(pipeline: Any) -> str:
    from compress.models import denoiser_name

    return denoiser_name(pipeline)


def _write_index(pipeline: Any, folder: Path) -> None:
    """Names the class of the denoiser, as the measurement of memory looks it up."""
    name = _name(pipeline)
    model = type(getattr(pipeline, name))
    library = model.__module__.partition(".")[0]  # "diffusers", or the module of our own class
    entry = {name: [library, model.__name__]}
    (folder / "model_index.json").write_text(json.dumps(entry), encoding="utf-8")
