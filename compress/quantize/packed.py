"""Weights in 1 to 8 bits: integers, fp8, fp4, nf4 or a palette, for every Conv2d and Linear.

Stock diffusers has no layers for most of these, so the checkpoint carries a model file, which needs torch and diffusers
only (:mod:`compress.models.compressed_model`). The layers unpack their weights at every call.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import compress.models.compressed_model as compressed_model
from compress.data.calls import draw
from compress.errors import UserError, bad_value
from compress.models import denoiser, set_denoiser
from compress.models.inputs import Inputs, captured_inputs
from compress.models.quantized import DYNAMIC, Ranges, set_ranges
from compress.quantize.ranges.inputs import EDGES, InputRanges, find_ranges, int8_inputs, observed
from compress.quantize.ranges.smooth import check_norms, smooth_inputs
from compress.quantize.weights.apply import (
    Layer,
    QuantizeReport,
    check_matches,
    check_patterns,
    choose_layers,
    quantize_layers,
    refuse_quantized,
    stage_report,
)
from compress.quantize.weights.gptq import input_products, round_with_feedback
from compress.quantize.weights.rounding import SEARCHES, Rounded, round_weight
from compress.quantize.weights.scheme import Scheme
from compress.stage import Stage, StageContext, StageReport

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from compress.models.outline import Outline

STAGE = Stage(
    version=1,
    leaves="quantized",
    by_names=True,
    exact=True,
    tag="quantized",
    limits=("It saves memory and disk, and no time: layers unpack their weights at every call.",),
)

ROUNDINGS = ("nearest", "gptq")
INT8 = Scheme()
"""Scheme of the layers that bear fewer bits badly."""


@dataclass(frozen=True)
class Config(Scheme, InputRanges):
    """Keys of the stage, besides those of the scheme and of the inputs' ranges.

    The calibration is of use with static activations, ``smooth`` and ``rounding=gptq``, and ``ranges`` with the first.

    Attributes:
        search: How scales are found: ``absmax``, ``percentile``, ``mse`` or ``hqq``; see
            :func:`compress.quantize.weights.rounding.round_weight`.
        rounding: ``nearest``, or ``gptq``: later weights make up for the errors of earlier ones, see
            :mod:`compress.quantize.weights.gptq`.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        layers: Pattern to the keys of the scheme that differ there, or the JSON file that holds them; the last pattern
            that matches counts. None: below 8 bits the first and last layers and what embeds the timestep have 8, one
            scale per channel.
        components: Further components of the pipeline, such as ``vae`` and ``text_encoder``, to the keys of the scheme
            that differ there.
    """

    search: str = "mse"
    rounding: str = "nearest"
    skip: list[str] = field(default_factory=list)
    layers: Any = None
    components: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        Scheme.__post_init__(self)
        InputRanges.__post_init__(self)
        check_patterns("skip", self.skip)
        if self.search not in SEARCHES:
            raise bad_value("search", self.search, "one of " + ", ".join(SEARCHES))
        if self.rounding not in ROUNDINGS:
            raise bad_value("rounding", self.rounding, "one of " + ", ".join(ROUNDINGS))
        if self.search == "hqq" and self.symmetric:
            raise bad_value("search", self.search, "symmetric=false with it, since it moves the zeros")
        if self.smooth is not None and self.activations == "none":
            raise bad_value("smooth", self.smooth, "null with activations=none: it makes the inputs' ranges smaller")
        if self.format == "palette" and self.granularity == "group":
            raise bad_value("granularity", self.granularity, "tensor or channel with format=palette")
        if isinstance(self.layers, str):  # its content is what counts, also for the key in the store
            object.__setattr__(self, "layers", _read_layers(Path(self.layers)))
        if self.layers is not None and not isinstance(self.layers, Mapping):
            raise bad_value("layers", self.layers, "patterns with keys of a scheme, or a JSON file with them")
        self.others()
        self.parts()

    def scheme(self) -> Scheme:
        """Of the layers without an exception."""
        return Scheme(**{key: getattr(self, key) for key in Scheme.__annotations__})

    def others(self) -> dict[str, Scheme]:
        """Pattern to scheme of the exceptions.

        Raises:
            UserError: A key of one is unknown or out of range.
        """
        if self.layers is None:
            return {pattern: replace(INT8, activations=self.activations) for pattern in EDGES} if self.bits < 8 else {}
        return {name: _differing(self.scheme(), name, keys, "layers") for name, keys in self.layers.items()}

    def parts(self) -> dict[str, Scheme]:
        """Component to its scheme.

        Raises:
            UserError: A key of one is unknown or out of range.
        """
        plain = replace(self.scheme(), activations="none")
        return {name: _differing(plain, name, keys, "components") for name, keys in self.components.items()}


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Quantizes the pipeline's denoiser in place; see :func:`pack_weights`."""
    model = denoiser(pipeline)
    refuse_quantized(model)
    parts_of(pipeline, config)
    schemes = choose_schemes(model, config)
    layers = {} if config.activations == "none" else int8_inputs(model, config.skip, config.float_inputs)
    smoothed = smooth_inputs(pipeline, layers, config, context)
    static = layers if config.activations == "static" else {}
    learned = {name: model.get_submodule(name) for name in schemes} if config.rounding == "gptq" else {}
    with observed(static) as seen, input_products(learned) as products:
        if static or learned:
            draw(pipeline, context.data.text, config.calibration, context.seed)
    rounded = {
        name: round_with_feedback(learned[name].weight, products.pop(name), schemes[name], config.search)
        for name in list(products)
    }
    nearest = sorted(learned.keys() - rounded.keys())
    details = {"rounding": config.rounding, "gptq": len(rounded), "nearest": nearest, **smoothed}
    ranges = find_ranges(seen, config.ranges) if static else dict.fromkeys(layers, DYNAMIC)
    return store(pipeline, schemes, config, ranges, rounded, **details)


def store(
    pipeline: "DiffusionPipeline",
    schemes: Mapping[str, Scheme],
    config: Config,
    ranges: Ranges,
    rounded: Mapping[str, Rounded],
    **details: Any,
) -> StageReport:
    """Packs a pipeline's denoiser and further components, in place.

    Args:
        pipeline: The student's.
        schemes: Name of a layer of the denoiser to its scheme.
        config: Of the stage.
        ranges: Of inputs.
        rounded: Weights of layers that are rounded already, by name.
        details: For the report.
    """
    model = denoiser(pipeline)
    report = pack_weights(model, schemes, config.search, config.skip, captured_inputs(pipeline), rounded)
    set_denoiser(pipeline, model)  # of another class now
    set_ranges(model, ranges)
    parts = parts_of(pipeline, config)
    return stage_report(
        report,
        config.scheme(),
        search=config.search,
        others={name: str(scheme) for name, scheme in schemes.items() if scheme != config.scheme()},
        int8_inputs=len(ranges),
        components={name: _pack_component(pipeline, name, scheme, config.search) for name, scheme in parts.items()},
        **details,
    )


def check(config: Config, denoiser: nn.Module, outline: "Outline") -> nn.Module:
    """Refuses patterns that match no layer, and smoothing without norms for it; every layer keeps its shape.

    Raises:
        UserError: See :func:`choose_schemes`; or nothing can be smoothed.
    """
    schemes = choose_schemes(denoiser, config)
    check_norms(denoiser, config)
    if config.activations != "none":
        int8_inputs(denoiser, config.skip, config.float_inputs)
    _check_components(config, outline)
    layers = dict(denoiser.named_modules())
    rows = [layers[name].weight[0].numel() for name, scheme in schemes.items() if scheme.granularity == "group"]
    if rows and config.group_size > max(rows):
        raise bad_value("group_size", config.group_size, f"at most {max(rows)}, the most weights of an output channel")
    return denoiser


def _check_components(config: Config, outline: "Outline") -> None:
    if config.components:
        known = [name for name in outline.configs if name not in ("unet", "transformer", "scheduler")]
        if wrong := [name for name in config.components if name not in known]:
            raise bad_value("components", wrong[0], f"one of {', '.join(known)}")


def parts_of(pipeline: "DiffusionPipeline", config: Config) -> dict[str, Scheme]:
    """The further components to pack, each with its scheme.

    Raises:
        UserError: The pipeline has none of such a name, or it is packed already.
    """
    parts, pieces = config.parts(), vars(pipeline)
    known = [name for name, part in pieces.items() if isinstance(part, nn.Module) and part is not denoiser(pipeline)]
    for name in parts:
        if name not in known:
            raise bad_value("components", name, f"one of {', '.join(known)}")
        refuse_quantized(pieces[name])
    return parts


def choose_schemes(model: nn.Module, config: Config) -> dict[str, Scheme]:
    """Name of every layer to be quantized to its scheme.

    Raises:
        UserError: A pattern matches no Conv2d or Linear, or none is left to quantize.
    """
    layers, skipped = choose_layers(model, config.skip)
    if config.layers is not None:
        check_matches("layers", list(config.layers), layers)
    others = config.others()
    schemes = {}
    for name in layers:
        if name not in skipped:
            found = [scheme for pattern, scheme in others.items() if fnmatchcase(name, pattern)]
            schemes[name] = found[-1] if found else config.scheme()
    return schemes


def pack_weights(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    search: str = "mse",
    skip: Sequence[str] = (),
    inputs: Inputs | None = None,
    rounded: Mapping[str, Rounded] | None = None,
) -> QuantizeReport:
    """Packs the weights of a model's layers, in place; ``save_pretrained`` then writes what diffusers loads.

    Args:
        model: A model of diffusers or transformers with float weights.
        schemes: Name of a layer to its scheme.
        search: See :func:`compress.quantize.weights.rounding.round_weight`.
        skip: Patterns of the layers that stay in float, for the report.
        inputs: Keyword arguments of the pass whose MACs are counted, see :func:`quantize_layers`.
        rounded: Weights of layers that are rounded already, by name.

    Returns:
        What was quantized, what was not and why, and the rounding errors.

    Raises:
        UserError: The class of the model is not one of theirs, or see :func:`quantize_layers`.
    """
    refuse_quantized(model)
    packed_class = getattr(compressed_model, f"Packed{type(model).__name__}", None)
    if packed_class is None or type(model) not in packed_class.__mro__:
        raise UserError(
            f"{type(model).__name__} is no model of diffusers or transformers: its weights cannot be packed"
        )

    def pack(name: str, layer: Layer) -> None:
        weight = (rounded or {}).get(name) or round_weight(layer.weight, schemes[name], search)
        compressed_model.pack_layer(layer, packings[name], weight.tensors(schemes[name].bits))

    packings = {name: packing(scheme) for name, scheme in schemes.items()}
    report = quantize_layers(model, pack, skip, inputs)
    model.__class__ = packed_class
    model.__module__ = compressed_model.MODULE
    if hasattr(model, "register_to_config"):
        model.register_to_config(packed_layers=packings)  # type: ignore[operator]
    else:  # of transformers
        model.config.packed_layers = packings  # type: ignore[union-attr]
    return report


def _pack_component(pipeline: "DiffusionPipeline", name: str, scheme: Scheme, search: str) -> dict[str, Any]:
    """Packs all layers of another component than the denoiser; returns what the report says of it."""
    part = copy.deepcopy(getattr(pipeline, name))  # the pipeline may share it with its teacher
    found = pack_weights(part, dict.fromkeys(choose_layers(part, ())[0], scheme), search)
    pipeline.register_modules(**{name: part})
    return {"scheme": str(scheme), "modules": len(found.modules), "params": found.params}


def packing(scheme: Scheme) -> dict[str, Any]:
    """What ``config.json`` says of a layer, see :mod:`compress.models.compressed_model`."""
    found = asdict(scheme)
    del found["activations"]
    return found


def _read_layers(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad_value("layers", str(file), f"a JSON file of patterns and keys ({error})") from error


def _differing(scheme: Scheme, pattern: str, keys: Any, where: str) -> Scheme:
    """The scheme with other values of some keys."""
    if not isinstance(keys, Mapping) or not keys.keys() <= Scheme.__annotations__.keys() - {"activations"}:
        allowed = ", ".join(sorted(Scheme.__annotations__.keys() - {"activations"}))
        raise bad_value(f"{where}.{pattern}", keys, f"some of the keys {allowed}")
    try:
        return replace(scheme, **keys)
    except UserError as error:
        raise UserError(f"{where}.{pattern}: {error}") from None
