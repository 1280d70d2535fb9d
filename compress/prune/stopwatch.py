"""Measured latency of a denoiser's smaller variants, as shares of its own, in the engine that will run them."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from compress.errors import UserError
from compress.models import denoiser
from compress.models.inputs import Inputs, captured_inputs, example_inputs, sample_name
from compress.runtime import executed, resolve
from compress.runtime.arguments import Arguments
from compress.runtime.turns import turns

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

REPEATS = 200
MOST_SECONDS = 30.0  # for all turns of one measurement
TOLERANCE = 0.05
"""Maximum deviation of the measured share from the target, relative to the target."""
AIM = 0.025  # of the predicted share: a measured one must not fall out of the tolerance
ATTEMPTS = 6  # candidates measured for one target


@dataclass(frozen=True)
class MeasuredLatency:
    """What was measured for a target of latency.

    Attributes:
        engine: That ran everything.
        batch: Rows of a pass.
        predicted: Share of the latency that the table predicted for what was chosen, when it was chosen.
        measured: Share that a second measurement found on a denoiser of random weights, the whole of it. The first
            one decides what is chosen, so its error is on the target's side.
        table: What the prediction rests on: entries with a ``share`` of the unchanged denoiser's latency.
        tried: Shares of everything that was considered, in order, as first measured.
    """

    engine: str
    batch: int
    predicted: float
    measured: float
    table: list[dict[str, Any]] = field(default_factory=list)
    tried: list[float] = field(default_factory=list)


class Stopwatch:
    """Measures variants of a denoiser in turns with it, in one process and one engine.

    Latency depends on shapes, not on weights, so variants have random ones. Shares are kept in the process.

    Args:
        denoiser: The unchanged one.
        inputs: Keyword arguments of the pass that is timed.
        engine: ``auto`` or one of :data:`compress.runtime.ENGINES`, at its default precision.

    Raises:
        UserError: The engine cannot run here.
    """

    _shares: ClassVar[dict[str, float]] = {}

    def __init__(self, denoiser: Any, inputs: Inputs, engine: str = "auto") -> None:
        self.denoiser, self.inputs = denoiser, {**inputs, "return_dict": False}
        self.engine = _resolved(engine, denoiser.device)
        self.batch = len(inputs[sample_name(denoiser)])
        self._unchanged: Callable[..., Any] | None = None

    def share(self, config: Mapping[str, Any]) -> float:
        """Latency of a denoiser of the same class and another config, over that of the unchanged one."""
        shapes = [list(leaf.shape) for leaf in tree_flatten(self.inputs)[0] if isinstance(leaf, torch.Tensor)]
        about = [type(self.denoiser).__name__, dict(self.denoiser.config), dict(config), shapes, self.engine]
        key = json.dumps([*about, str(self.denoiser.dtype), torch.get_num_threads()], sort_keys=True, default=str)
        if key not in self._shares:
            self._shares[key] = self._measure([self._random(config)], [Arguments.of((), self.inputs)])[0]
        return self._shares[key]

    def confirm(self, config: Mapping[str, Any]) -> float:
        """What :meth:`share` gives, measured once more with both denoisers started anew: some starts are faster."""
        self._unchanged = None
        return self._measure([self._random(config)], [Arguments.of((), self.inputs)])[0]

    def parts(self, modules: list[nn.Module], given: list[Arguments]) -> list[float]:
        """Latency of modules of the denoiser that run alone, over that of the whole.

        What an engine needs to start at all is measured with a trivial module and taken off.

        Args:
            modules: Each on the denoiser's device.
            given: What each is called with.
        """
        nothing = nn.Linear(1, 1, device=self.denoiser.device, dtype=self.denoiser.dtype)
        *found, start = self._measure([*modules, nothing], [*given, Arguments.of((nothing.weight.detach(),), {})])
        return [max(share - start, 0.0) for share in found]

    @torch.no_grad()
    def _measure(self, modules: list[nn.Module], given: list[Arguments]) -> list[float]:
        """Each module's seconds over those of the unchanged denoiser."""
        if self._unchanged is None:
            self._unchanged = executed(self.denoiser, self.engine)
        runs = [self._unchanged, *(executed(module, self.engine) for module in modules)]
        passes = [Arguments.of((), self.inputs), *given]
        calls = {i: _call(run, arguments) for i, (run, arguments) in enumerate(zip(runs, passes, strict=True))}
        whole, *others = turns(calls, REPEATS, self.denoiser.device, MOST_SECONDS).values()
        _warn_of_noise([whole, *others])
        return [quick(other) / quick(whole) for other in others]

    def _random(self, config: Mapping[str, Any]) -> Any:
        public = {key: value for key, value in config.items() if not key.startswith("_")}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = type(self.denoiser).from_config(public)
        nn.Module.to(model, self.denoiser.device, self.denoiser.dtype)  # diffusers' own warns of dtypes
        return model.eval().requires_grad_(False)


def quick(seconds: list[float]) -> float:
    """The lower quartile: a machine that is busy for half of the turns does not move it, a single short one neither."""
    return sorted(seconds)[len(seconds) // 4]


def _warn_of_noise(times: list[list[float]]) -> None:
    """Says where the halves of the turns disagree by more than the tolerance, as on a busy machine."""
    halves = [[quick(found[: len(found) // 2]), quick(found[len(found) // 2 :])] for found in times]
    worst = max((max(pair) / min(pair) - 1 for pair in halves), default=0.0)
    if worst > TOLERANCE:
        logger.warning("target.latency: the turns disagree by %.0f %%: is something else running here?", 100 * worst)


def _call(run: Callable[..., Any], given: Arguments) -> Callable[[], Any]:
    args, kwargs = given.arguments(given.tensors)
    return lambda: run(*args, **kwargs)


def check_engine(engine: str) -> None:
    """Refuse an engine whose package is missing, before weights are loaded and their device is known.

    Raises:
        UserError: Naming ``target.engine``.
    """
    if engine == "openvino":  # others depend on the device
        _resolved(engine, torch.device("cpu"))


def _resolved(engine: str, device: torch.device) -> str:
    try:
        return resolve(engine, device)
    except UserError as error:
        raise UserError(f"target.{error}") from error


def own_inputs(pipeline: "DiffusionPipeline") -> Inputs:
    """The inputs of the denoiser's pass for one image, with the pipeline's default guidance.

    That is a batch of 2 where guidance takes a second row, as in Stable Diffusion, and of 1 elsewhere.

    Raises:
        UserError: The pipeline needs more than a prompt.
    """
    if not callable(pipeline):  # the stand-in for a denoiser without a pipeline
        return example_inputs(denoiser(pipeline), seed=0)
    return captured_inputs(pipeline, guidance=None)
