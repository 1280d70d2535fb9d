"""Calibration examples for a denoiser, with their noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from compress.models.conditions import Conditions
    from compress.models.schedule import Schedule


LARGE = 200_000_000  # parameters


@dataclass(frozen=True)
class CalibrationConfig:
    """Which examples, at which timesteps, with which noise.

    Attributes:
        examples: How many training images with captions, chosen at random, at least 1.
        batch_size: How many pass the denoiser at once, at least 1; decides memory, and results only up to rounding.
        side: Of the images in pixels, at most; None: the model's own. Time and memory grow with its square.
        timesteps: Those that the examples are taken at, in turn, each at least 0; None: as many as there are examples,
            spread evenly over all.
        seed: Of the choice, the timesteps' order and the noise, in [0, 2^32); None: the run's.
        prompt_dropout: Share of the examples with the empty prompt instead of their caption, in [0, 1].
    """

    examples: int = 64
    batch_size: int = 8
    side: int | None = None
    timesteps: list[int] | None = None
    seed: int | None = None
    prompt_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        for key in ("examples", "batch_size"):
            if getattr(self, key) < 1:
                raise bad_value(key, getattr(self, key), "a whole number of at least 1")
        if self.side is not None and self.side < 1:
            raise bad_value("side", self.side, "pixels, or null for the model's own size")
        if self.timesteps is not None and (not self.timesteps or min(self.timesteps) < 0):
            raise bad_value("timesteps", self.timesteps, "whole numbers of at least 0, or null for an even spread")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise bad_value("seed", self.seed, "a whole number from 0 to 2^32 - 1, or null for the run's")
        if not 0 <= self.prompt_dropout <= 1:
            raise bad_value("prompt_dropout", self.prompt_dropout, "a number in [0, 1]")


@dataclass(frozen=True)
class Calibration:
    """A denoiser with examples for it, all on its device.

    Attributes:
        denoiser: Looked at, never changed.
        schedule: Of the noise, with the prediction type.
        latents: Clean, ``(n, c, h, w)``.
        noise: Standard normal, ``(n, c, h, w)``.
        timesteps: Integers, ``(n,)``.
        conditions: What else the denoiser takes, n rows.
        batch_size: How many examples pass the denoiser at once.
        source: In words, where the examples are from.
    """

    denoiser: "nn.Module"
    schedule: "Schedule"
    latents: "Tensor"
    noise: "Tensor"
    timesteps: "Tensor"
    batch_size: int
    source: str
    conditions: "Conditions"

    def parts(self, size: int | None = None) -> Iterator[slice]:
        """The batches of ``size`` examples, by default ``batch_size``."""
        size = size or self.batch_size
        for start in range(0, len(self.latents), size):
            yield slice(start, min(start + size, len(self.latents)))

    def gradient_parts(self) -> Iterator[slice]:
        """The batches to take gradients of: single examples where the denoiser is large."""
        return self.parts(1 if _is_large(self.denoiser) else None)

    def spread(self, count: int) -> "Calibration":
        """As many of the examples, with timesteps from one end to the other; all where there are no more."""
        import torch

        if count >= len(self.latents):
            return self
        places = torch.linspace(0, len(self.latents) - 1, count).round().long()
        chosen = self.timesteps.argsort()[places.to(self.timesteps.device)]
        return replace(
            self,
            latents=self.latents[chosen],
            noise=self.noise[chosen],
            timesteps=self.timesteps[chosen],
            conditions=self.conditions.rows_of(chosen),
        )

    def predict(self, denoiser: "nn.Module", part: slice, timesteps: "Tensor | None" = None) -> "Tensor":
        """What a denoiser of the same inputs predicts for a batch, ``(b, c, h, w)``.

        Args:
            denoiser: ``self.denoiser`` or one that was made from it, in any dtype.
            part: The batch.
            timesteps: ``(b,)``, in place of the examples' own.
        """
        from compress.models.inputs import sample_name

        times = self.timesteps[part] if timesteps is None else timesteps
        dtype = next(denoiser.parameters()).dtype
        conditions = self.conditions.inputs(part, self.latents.device, dtype)
        noisy = self.schedule.add_noise(self.latents[part], self.noise[part], times)
        given = {**conditions, sample_name(denoiser): noisy.to(dtype), "timestep": self.schedule.times(times)}
        return denoiser(**given, return_dict=False)[0]

    def losses(self, denoiser: "nn.Module", part: slice, timesteps: "Tensor | None" = None) -> "Tensor":
        """The diffusion loss of each example of a batch, ``(b,)``: the mean squared error to the true target.

        A variance that the denoiser predicts beside the mean is left out.

        Args:
            denoiser: See :meth:`predict`.
            part: See :meth:`predict`.
            timesteps: See :meth:`predict`.
        """
        times = self.timesteps[part] if timesteps is None else timesteps
        target = self.schedule.target(self.latents[part], self.noise[part], times)
        found = self.predict(denoiser, part, times).float()
        channels = min(found.shape[1], target.shape[1])  # random inputs of an inpainting model have a mask besides
        error = found[:, :channels] - target[:, :channels]
        return error.square().mean(tuple(range(1, error.ndim)))


def calibrate(
    pipeline: "DiffusionPipeline", dataset: "Dataset | None", config: CalibrationConfig, seed: int
) -> Calibration:
    """Encodes examples for the pipeline's denoiser and draws their timesteps and noise.

    Where there is no data, or the denoiser takes more than latents and a prompt (as inpainting does), the examples are
    random inputs: normal latents and conditions.

    Args:
        pipeline: The one to prune, its parts on one device.
        dataset: With columns ``image`` and ``text``; None: random inputs.
        config: See :class:`CalibrationConfig`.
        seed: The run's.

    Raises:
        UserError: The scheduler has no schedule of noise, a timestep is beyond it, or the denoiser's inputs are not
            known.
    """
    import torch

    from compress.models import denoiser

    model: Any = denoiser(pipeline)
    schedule = _schedule(pipeline.scheduler, model)
    seed = seed if config.seed is None else config.seed
    reason = "no data was given" if dataset is None else _not_encodable(pipeline)
    if dataset is not None and reason is None:
        latents, conditions = _encoded(pipeline, dataset, config, seed)
        what = "training images with captions" if "image" in dataset.column_names else "latents sampled from prompts"
        source = f"{len(latents)} {what}"
    else:
        latents, conditions = _random(model, config.examples, seed)
        source = f"{len(latents)} random inputs of normal noise ({reason})"
    count, last = len(latents), schedule.steps - 1
    generator = torch.Generator("cpu").manual_seed(seed)
    if config.timesteps is None:
        times = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        timesteps = (times * (last + 1)).long().clamp(max=last)
    elif max(config.timesteps) > last:
        raise bad_value("calibration.timesteps", config.timesteps, f"timesteps of the model, 0 to {last}")
    else:
        timesteps = torch.tensor(config.timesteps).repeat(-(-count // len(config.timesteps)))[:count]
    noise = torch.randn(latents.shape, generator=generator)
    device = model.device
    return Calibration(
        model,
        schedule,
        latents.to(device),
        noise.to(device),
        timesteps.to(device),
        config.batch_size,
        source,
        conditions,
    )


def _schedule(scheduler: Any, model: Any) -> "Schedule":
    from compress.models.schedule import schedule_of

    try:
        return schedule_of(scheduler, model)
    except UserError as error:
        text = f"calibration needs the schedule of noise: {error}; or choose an importance that looks at weights alone"
        raise UserError(f"{text} (l2, l1)") from error


def _not_encodable(pipeline: "DiffusionPipeline") -> str | None:
    """Why training data cannot be encoded for a pipeline; None where it can."""
    from compress.models.latents import check_latents

    try:
        check_latents(pipeline)
    except UserError as error:
        return str(error)
    return None


def _encoded(
    pipeline: "DiffusionPipeline", dataset: "Dataset", config: CalibrationConfig, seed: int
) -> "tuple[Tensor, Conditions]":
    import torch

    from compress.data.examples import encode_examples
    from compress.data.samples import SamplesConfig

    samples = None if "image" in dataset.column_names else SamplesConfig(count=config.examples)
    found = encode_examples(
        pipeline, dataset, max_examples=config.examples, seed=seed, side=config.side, samples=samples
    )
    dropped = torch.rand(len(found.captions), generator=torch.Generator().manual_seed(seed)) < config.prompt_dropout
    return found.latents.float(), found.conditions.rows_of(found.captions.masked_fill(dropped, 0))


def _random(model: Any, count: int, seed: int) -> "tuple[Tensor, Conditions]":
    """Normal latents of small sides and conditions, ``count`` rows."""
    import torch

    from compress.models.conditions import joined, split
    from compress.models.inputs import SMALL_SIDE, SMALL_TOKENS, example_inputs, sample_name

    batches = [
        example_inputs(model, 2, side=SMALL_SIDE, tokens=SMALL_TOKENS, seed=seed + index)
        for index in range(-(-count // 2))
    ]
    latents = torch.cat([batch[sample_name(model)] for batch in batches])[:count].float()
    conditions = joined([split(model, batch, 2) for batch in batches])
    return latents, conditions.rows_of(slice(count))


def _is_large(denoiser: "nn.Module") -> bool:
    return sum(parameter.numel() for parameter in denoiser.parameters()) > LARGE


@contextmanager
def differentiable(denoiser: "nn.Module") -> "Iterator[nn.Module]":
    """The denoiser so that its weights take gradients: in float32, evaluation mode, and with plain attention.

    One in float32 is used as it is and left as it was; one in half precision is copied. The fused kernels of attention
    have no second backward pass on some devices, and a slow one on CPUs. A large one computes its layers' outputs twice
    rather than keep them.
    """
    import copy

    import torch
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model: Any = denoiser
    if any(parameter.dtype != torch.float32 for parameter in denoiser.parameters()):
        model = copy.deepcopy(denoiser).float()
    processors = dict(getattr(model, "attn_processors", {}))
    plain = bool(processors) and all(isinstance(processor, AttnProcessor2_0) for processor in processors.values())
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = model.training
    again = _is_large(model) and not getattr(model, "is_gradient_checkpointing", True)
    if again:
        model.enable_gradient_checkpointing()
    if plain:
        model.set_attn_processor(AttnProcessor())
    model.eval().requires_grad_(True)
    try:
        with torch.enable_grad():
            yield model
    finally:
        if again:
            model.disable_gradient_checkpointing()
        if plain:
            model.set_attn_processor(processors)
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(before[name])
