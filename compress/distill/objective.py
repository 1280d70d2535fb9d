"""The objective of a distillation: losses compare student and frozen teacher on the same batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.distill.alignment import Alignment, tapped
from compress.distill.batches import Batch
from compress.distill.guidance import scale_embedding, takes_scale
from compress.distill.losses import Loss, Seen
from compress.errors import UserError, bad_value
from compress.models.conditions import Conditions, joined
from compress.models.inputs import sample_name
from compress.models.schedule import Schedule
from compress.runtime import openvino
from compress.system.progress import say


class Teacher:
    """A frozen denoiser that gives predictions and features.

    Args:
        model: In evaluation mode, in any dtype.
        taps: Filled with its features when it runs, by its names of blocks.
        pairs: The student's blocks to the teacher's.
        autocast: Context of a pass of a teacher in float32.
        empty: What guidance points away from, one row; needed for batches with guidance.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, Tensor],
        pairs: Mapping[str, str],
        autocast: Callable[[], Any],
        empty: Conditions | None = None,
    ) -> None:
        self.model, self._taps, self._pairs, self._empty = model, taps, pairs, empty
        self._dtype = next(model.parameters()).dtype
        self._autocast = autocast if self._dtype == torch.float32 else nullcontext
        self._graph: openvino.OpenVINOModule | None = None
        self._optional = False

    def run_in(self, engine: str, graphs: Path | None = None) -> None:
        """Has an engine run the denoiser from now on.

        Args:
            engine: ``eager``; ``openvino`` on a CPU, in bfloat16 where ``autocast`` is, else in float32; or ``auto``:
                OpenVINO where it can.
            graphs: Folder for OpenVINO's graphs; None: every process makes its own.

        Raises:
            UserError: The engine cannot run here.
        """
        if engine == "eager":
            return
        device = next(self.model.parameters()).device
        if why := openvino.missing() if device.type == "cpu" else f"runs on CPUs, and the teacher is on {device}":
            if engine == "auto":
                return
            raise bad_value("teacher_engine", engine, f"eager: OpenVINO {why}")
        precision = "f32" if self._autocast is nullcontext else "bf16"
        model = _WithFeatures(self.model, self._pairs.values())
        self._graph = openvino.OpenVINOModule(model, "teacher", precision, cache=graphs)
        self._optional = engine == "auto"

    def __call__(self, noisy: Tensor, times: Tensor, batch: Batch) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """Predicts with the batch's guidance, in one pass over twice as many rows.

        Returns:
            The prediction, ``(b, ...)``; what guidance adds to the one for the prompt, same shape, or 0 without
            guidance; and the features for the prompt under the student's names of blocks.
        """
        count = len(noisy)
        if batch.scales is not None:
            assert self._empty is not None
            empty = self._empty.rows_of(torch.zeros(count, dtype=torch.long))
            batch = replace(batch, conditions=joined([empty, batch.conditions]))
            noisy, times = torch.cat([noisy, noisy]), times.repeat(2)
        output, taps = self._pass(noisy, times, batch)
        features = {mine: taps[other][-count:] for mine, other in self._pairs.items()}
        if batch.scales is None:
            return output, 0.0, features
        without, prompted = output.float().chunk(2)
        scales = batch.scales.to(output.device).view(-1, *[1] * (output.ndim - 1))
        added = (scales - 1) * (prompted - without)
        return prompted + added, added, features

    def _pass(self, noisy: Tensor, times: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Prediction, and features by the teacher's names; with ``auto`` in eager mode if the engine cannot."""
        if self._graph is not None:
            try:
                return self._graph(**inputs(self.model, noisy.float(), times, batch, torch.float32))
            except UserError as error:
                if not self._optional:
                    raise
                say(f"the teacher runs in eager mode: {error}")
                self._graph = None
        with torch.no_grad(), self._autocast():
            return predict(self.model, noisy.to(self._dtype), times, batch, self._dtype), self._taps


class _WithFeatures(nn.Module):
    """A denoiser that returns its prediction and its features, as a graph needs it.

    Args:
        model: The denoiser.
        blocks: Whose outputs are features.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[str]) -> None:
        super().__init__()
        self.model, self.blocks = model, sorted(blocks)
        # What tells its graph from others with the same weights.
        self.config = f"{type(model).__qualname__} {getattr(model, 'config', '')} {self.blocks}"

    def forward(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction and the features by name of block."""
        with tapped(self.model, self.blocks) as taps:
            output = self.model(**inputs)[0]
        return output, dict(taps)


class Objective(nn.Module):
    """Student and losses in one module, so that distributed training sees one forward pass.

    Args:
        student: The denoiser to train.
        teacher: None if no loss uses it.
        schedule: Of the noise.
        losses: At least one.
        alignment: Of the features; None if no loss uses them.
        taps: Filled with the student's features when it runs.
        weights: Of the noise and output errors, one a timestep, ``(timesteps,)``.
        autocast: Context of the student's pass.
        device: Where to compute.
        attention: Of the outputs of self-attentions; None if no loss uses them.
        decode: See :class:`compress.distill.losses.Seen`; None if no loss uses it.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        schedule: Schedule,
        losses: Sequence[Loss],
        alignment: Alignment | None,
        taps: dict[str, Tensor],
        weights: Tensor,
        autocast: Callable[[], Any],
        device: torch.device,
        attention: Alignment | None = None,
        decode: Callable[[Tensor], list[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.student, self.features, self.attention = student, alignment, attention
        self._decode = decode
        self._teacher, self._schedule, self._losses, self._taps = teacher, schedule, losses, taps
        self._weights, self._autocast, self._device = weights.to(device), autocast, device

    def forward(self, batch: Batch) -> Tensor:
        """The weighted sum of the losses and each loss, means over the batch, ``(1 + number of losses,)``."""
        device, schedule = self._device, self._schedule
        latents, noise = batch.latents.to(device, torch.float32), batch.noise.to(device)
        timesteps = batch.timesteps.to(device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        if noisy.ndim == 4:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        times = schedule.times(timesteps)
        wanted, added, theirs = self._teacher(noisy, times, batch) if self._teacher is not None else (None, 0.0, {})
        target = schedule.target(latents, noise, timesteps)
        if isinstance(added, Tensor):  # the noise that a perfect denoiser with the teacher's guidance predicts
            target = target + _like(added, target)
        weight = self._weights[timesteps]
        signal, sigma = schedule.rates(timesteps)
        self._taps.clear()  # what was drawn meanwhile; a compiled student would be compiled again for it
        with self._autocast():
            output = _like(predict(self.student, noisy, times, batch, torch.float32), target)
            features = self.features(self._taps, theirs) if self.features is not None else {}
            attention = self.attention(self._taps, theirs) if self.attention is not None else {}
            teacher = None if wanted is None else _like(wanted, target)
            seen = Seen(
                output, target, teacher, weight, features, attention, sigma / signal,
                lambda prediction: schedule.clean(noisy, prediction, timesteps), self._decode,
            )  # fmt: skip
            found = [loss.function(seen).mean() for loss in self._losses]
            total = sum(loss.weight * value for loss, value in zip(self._losses, found, strict=True))
        self._taps.clear()
        return torch.stack([torch.as_tensor(total), *found])


def predict(model: nn.Module, noisy: Tensor, times: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    """A denoiser's prediction for noisy latents, ``(b, ...)``; with guidance if it takes the scale as an input."""
    return model(**inputs(model, noisy, times, batch, dtype))[0]


def inputs(model: nn.Module, noisy: Tensor, times: Tensor, batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of that pass."""
    conditions = batch.conditions.inputs(slice(None), noisy.device, dtype)
    if batch.scales is not None and takes_scale(model):
        embedding = scale_embedding(batch.scales, model.config["time_cond_proj_dim"])  # type: ignore[index]
        conditions["timestep_cond"] = embedding.to(noisy.device, dtype)
    return {**conditions, sample_name(model): noisy, "timestep": times, "return_dict": False}


def _like(output: Tensor, target: Tensor) -> Tensor:
    """The output in float32, without the variance that some models predict too."""
    return output[:, : target.shape[1]].float()
