"""Bits chosen layer by layer: each gets as many as its effect on the prediction is worth.

Every layer is rounded alone to every number of bits, and the error of the denoiser's prediction is measured on calls
that were recorded while images were sampled. The assignment with the least sum of errors for a size (or the least size
for a PSNR) is found exactly (compare Apple's mixed-bit palettization of SDXL, https://huggingface.co/blog/stable-diffusion-xl-coreml).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from compress.data.calls import CallsConfig, record_calls
from compress.errors import UserError, bad_value
from compress.models import denoiser, set_denoiser
from compress.models.inputs import captured_inputs
from compress.quantize.mixed.measure import Predictions, bytes_of
from compress.quantize.mixed.solve import assign
from compress.quantize.packed import STAGE as PACKED
from compress.quantize.packed import pack_weights, packing
from compress.quantize.weights.apply import (
    Layer,
    check_patterns,
    check_skip,
    choose_layers,
    refuse_quantized,
    stage_report,
)
from compress.quantize.weights.rounding import SEARCHES, Rounded, round_weight
from compress.quantize.weights.scheme import FORMATS, Scheme
from compress.stage import StageContext, StageReport
from compress.system.progress import bar

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


STAGE = replace(PACKED, version=1)

CURVE = 6
"""Assignments between the smallest and the largest size that the curve of size and PSNR shows."""


@dataclass(frozen=True)
class BitsTarget:
    """What the assignment has to meet; one of the two.

    Attributes:
        bits: Most bits a weight on average, scales included.
        psnr: Least PSNR of the prediction in dB, see :class:`compress.quantize.mixed.measure.Predictions`.
    """

    bits: float | None = None
    psnr: float | None = None


@dataclass(frozen=True)
class Config:
    """Keys of the stage.

    Attributes:
        target: What the assignment has to meet.
        choices: Numbers of bits that a layer can get, in [2, 8] for ``int`` and [1, 8] for ``palette``.
        format: ``int`` or ``palette``.
        granularity: See :class:`compress.quantize.weights.scheme.Scheme`.
        group_size: See there.
        symmetric: See there.
        search: How scales are found, see :func:`compress.quantize.weights.rounding.round_weight`.
        skip: Shell patterns (``fnmatch``) of names of modules that stay in float.
        calibration: The images that are sampled to measure the error on.
    """

    target: BitsTarget = field(default_factory=lambda: BitsTarget(bits=4.5))
    choices: list[int] = field(default_factory=lambda: [2, 3, 4, 6, 8])
    format: str = "int"
    granularity: str = "group"
    group_size: int = 64
    symmetric: bool = False
    search: str = "mse"
    skip: list[str] = field(default_factory=list)
    calibration: CallsConfig = field(default_factory=lambda: CallsConfig(examples=2, steps=5, side=None))

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: If one is out of range.
        """
        check_patterns("skip", self.skip)
        if self.format not in ("int", "palette"):
            raise bad_value("format", self.format, "int or palette")
        wrong = [bits for bits in self.choices if isinstance(bits, bool) or bits not in FORMATS[self.format]]
        if wrong or len(set(self.choices)) < 2:
            raise bad_value("choices", list(self.choices), f"two or more of {list(FORMATS[self.format])}")
        if self.search not in SEARCHES:
            raise bad_value("search", self.search, "one of " + ", ".join(SEARCHES))
        if (self.target.bits is None) == (self.target.psnr is None):
            raise bad_value("target", self.target, "either bits or psnr")
        if self.target.bits is not None and self.target.bits < min(self.choices):
            raise bad_value("target.bits", self.target.bits, f"more than the least of choices, {min(self.choices)}")
        self.schemes()

    def schemes(self) -> dict[int, Scheme]:
        """Bits to scheme."""
        keys = {key: getattr(self, key) for key in ("format", "granularity", "group_size", "symmetric")}
        return {bits: Scheme(bits=bits, **keys) for bits in sorted(set(self.choices))}


def run(pipeline: "DiffusionPipeline", config: Config, context: StageContext) -> StageReport:
    """Measures, chooses and packs; the report's details hold the sensitivity, the assignment and the curve."""
    model = denoiser(pipeline)
    refuse_quantized(model)
    predictions = Predictions(model, record_calls(pipeline, context.data.text, config.calibration, context.seed))
    layers, skipped = choose_layers(model, config.skip)
    candidates = _candidates({name: layer for name, layer in layers.items() if name not in skipped}, config)
    sizes = {n: {bits: bytes_of(r, bits) for bits, (r, _) in row.items()} for n, row in candidates.items()}
    errors = _errors(candidates, predictions)
    weights = sum(layers[name].weight.numel() for name in candidates)
    chosen = _chosen(sizes, errors, config, weights, predictions)

    def point(assignment: Mapping[str, int]) -> dict[str, float]:
        error = predictions.error({name: candidates[name][bits] for name, bits in assignment.items()})
        size = sum(sizes[name][bits] for name, bits in assignment.items())
        predicted = sum(errors[name][bits] for name, bits in assignment.items())
        return {
            "bits": 8 * size / weights,
            "bytes": size,
            "psnr": predictions.psnr(error),
            "predicted_psnr": predictions.psnr(predicted),
        }

    found = point(chosen)
    uniform = {bits: point(dict.fromkeys(candidates, bits)) for bits in config.schemes()}
    low, high = (f(end["bytes"] for end in uniform.values()) for f in (min, max))
    limits = [low + (high - low) * i / CURVE for i in range(1, CURVE)]
    curve = [point(assign(sizes, errors, size=limit)) for limit in limits]
    schemes = {name: config.schemes()[bits] for name, bits in chosen.items()}
    rounded = {name: candidates[name][bits][0] for name, bits in chosen.items()}
    report = pack_weights(model, schemes, config.search, config.skip, captured_inputs(pipeline), rounded)
    set_denoiser(pipeline, model)
    return stage_report(
        report,
        config.schemes()[max(config.schemes())],
        **{name: found[name] for name in ("bits", "psnr", "predicted_psnr")},
        uniform=[{"choice": bits, **uniform[bits]} for bits in uniform],
        curve=curve,
        layers={name: packing(scheme) for name, scheme in schemes.items()},
        sensitivity={n: {bits: predictions.psnr(error) for bits, error in row.items()} for n, row in errors.items()},
    )


check = check_skip


Candidates = dict[str, dict[int, tuple[Rounded, Scheme]]]


def _candidates(layers: Mapping[str, Layer], config: Config) -> Candidates:
    """Every layer's weight at every number of bits."""
    schemes = config.schemes()
    return {
        name: {bits: (round_weight(layer.weight, s, config.search), s) for bits, s in schemes.items()}
        for name, layer in layers.items()
    }


def _errors(candidates: Candidates, predictions: Predictions) -> dict[str, dict[int, float]]:
    """Error of the prediction with each layer alone rounded to each number of bits."""
    found: dict[str, dict[int, float]] = {}
    with bar() as shown:
        task = shown.add_task("bits of each layer", total=len(candidates))
        for name, row in candidates.items():
            found[name] = {bits: predictions.error({name: candidate}) for bits, candidate in row.items()}
            shown.advance(task)
    return found


def _chosen(
    sizes: Mapping[str, Mapping[int, int]],
    errors: Mapping[str, Mapping[int, float]],
    config: Config,
    weights: int,
    predictions: Predictions,
) -> dict[str, int]:
    """The best assignment for the target.

    Raises:
        UserError: None meets it.
    """
    if config.target.bits is not None:
        least = 8 * sum(min(row.values()) for row in sizes.values()) / weights
        if least > config.target.bits:
            raise bad_value("target.bits", config.target.bits, f"at least {least:.2f}, with scales, for these choices")
        return assign(sizes, errors, size=config.target.bits * weights / 8)
    assert config.target.psnr is not None
    try:
        return assign(sizes, errors, error=predictions.range**2 / 10 ** (config.target.psnr / 10))
    except ValueError:
        most = predictions.psnr(sum(min(row.values()) for row in errors.values()))
        raise UserError(
            f"target.psnr={config.target.psnr}: expected at most {most:.1f} dB, which all layers at "
            f"{max(config.choices)} bits reach"
        ) from None
