"""Engines that execute a pipeline: eager PyTorch, torch.compile and OpenVINO. Its weights are the same under all.

An accelerated pipeline is used as before, with any scheduler, batch and guidance; what it computes is compiled when a
shape is first seen.
"""

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, bad_value

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

logger = logging.getLogger(__name__)

ENGINES = ("eager", "inductor", "openvino")
PRECISIONS = ("auto", "fp32", "bf16")
LINEAR = ("int8", "fp8")


@dataclass(frozen=True)
class Engines:
    """What executes each part of a pipeline.

    Attributes:
        denoiser: ``auto`` or one of :data:`ENGINES`.
        vae: As ``denoiser``.
        text_encoder: As ``denoiser``, of every text encoder; they run once an image, so compiling them saves little.
        precision: ``auto``, ``fp32`` or ``bf16``: what compiled parts compute in, outside of int8 layers; ``auto`` is
            bf16 where that is faster.
        linear: ``int8`` or ``fp8``: products of the denoiser's Linear layers, with inputs rounded at each call, in
            ``inductor`` on CUDA alone; None: as the weights are.
        int8_inputs: Whether layers whose inputs have ranges round them and compute in int8; False: in float.
    """

    denoiser: str = "auto"
    vae: str = "auto"
    text_encoder: str = "eager"
    precision: str = "auto"
    linear: str | None = None
    int8_inputs: bool = True

    def __post_init__(self) -> None:
        """Checks the names.

        Raises:
            UserError: If one is unknown.
        """
        for key in ("denoiser", "vae", "text_encoder"):
            check_engine_name(getattr(self, key), key)
        if self.precision not in PRECISIONS:
            raise bad_value("precision", self.precision, "one of " + ", ".join(PRECISIONS))
        if self.linear not in (None, *LINEAR):
            raise bad_value("linear", self.linear, f"null or one of {', '.join(LINEAR)}")


def check_engine_name(engine: str, key: str = "engine") -> None:
    """Refuses an unknown engine.

    Raises:
        UserError: Naming the key, its value and what would be right.
    """
    if engine not in ("auto", *ENGINES):
        raise bad_value(key, engine, "one of " + ", ".join(("auto", *ENGINES)))


def resolve(engine: str, device: "torch.device") -> str:
    """The engine itself; ``auto`` is OpenVINO on a CPU, torch.compile elsewhere and eager where neither can run.

    Raises:
        UserError: The engine cannot run here.
    """
    if engine == "auto":
        order = ("openvino", "inductor") if device.type == "cpu" else ("inductor",)
        return next((name for name in order if _missing(name, device) is None), "eager")
    if why := _missing(engine, device):
        raise UserError(f"engine={engine}: {why}")
    return engine


def _missing(engine: str, device: "torch.device") -> str | None:
    """Why an engine cannot run here; None if it can."""
    if engine == "openvino":
        from compress.runtime import openvino

        return openvino.missing() if device.type == "cpu" else f"runs on CPUs, and the pipeline is on {device}"
    if engine == "inductor":
        from compress.runtime import inductor

        return inductor.missing(device)
    return None


def executed(module: "nn.Module", engine: str) -> Callable[..., Any]:
    """A module as an engine runs it, at the engine's default precision; compiled graphs are not kept.

    Args:
        module: Stays as it was.
        engine: ``auto`` or one of :data:`ENGINES`.

    Raises:
        UserError: The engine cannot run here.
    """
    device = next(module.parameters()).device
    engine = resolve(engine, device)
    return module if engine == "eager" else _compiled(engine, module, "denoiser", "auto", device)


def accelerate(pipeline: "DiffusionPipeline", engines: Engines, cache: Path | None = None) -> "DiffusionPipeline":
    """A pipeline with the same models, each executed by its engine.

    Args:
        pipeline: On one device; stays as it was.
        engines: One for each part.
        cache: Folder for compiled graphs; None: every process makes its own.

    Raises:
        UserError: An engine cannot run here. What an engine cannot compile is said when it is first called.
    """
    from compress.models import denoiser, denoiser_name
    from compress.models.quantized import DYNAMIC, ranges_of
    from compress.runtime.fake import float_model

    twin = copy.copy(pipeline)
    model: Any = denoiser(pipeline)
    device = model.device
    chosen = {name: resolve(getattr(engines, name), device) for name in ("denoiser", "vae", "text_encoder")}
    if engines.linear and (why := _missing_linear(engines.linear, chosen["denoiser"], device)):
        raise UserError(f"linear={engines.linear}: {why}")
    made: dict[str, Any] = {}

    def run(name: str, module: "nn.Module", part: str, **keys: Any) -> "nn.Module":
        made[name] = _compiled(chosen[part], module, name, engines.precision, device, cache=cache, **keys)
        return _with_forward(module, made[name])

    name, ranges = denoiser_name(pipeline), ranges_of(model) if engines.int8_inputs else {}
    dynamic = sum(ends == DYNAMIC for ends in ranges.values())
    if chosen["denoiser"] != "eager":
        setattr(twin, name, run(name, model, "denoiser", ranges=ranges, linear=engines.linear))
    elif dynamic:
        setattr(twin, name, _with_forward(model, float_model(model, ranges)))
    if dynamic and chosen["denoiser"] != "inductor":
        what = "layers round their inputs at each call and compute in float"
        logger.warning("engine=%s: %d %s", chosen["denoiser"], dynamic, what)
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    if chosen["vae"] != "eager" and decoder is not None:
        vae = _with_forward(pipeline.vae, None)
        vae._modules = {**vae._modules, "decoder": run("vae.decoder", decoder, "vae")}
        twin.vae = vae
    if chosen["text_encoder"] != "eager":
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            encoder = getattr(pipeline, name, None)
            if encoder is not None:
                setattr(twin, name, run(name, encoder, "text_encoder"))
    vars(twin)["_compiled_parts"] = made
    return twin


def cache_folder() -> Path:
    """Folder for compiled graphs outside of a run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "compress" / "graphs"


def kernels(pipeline: "DiffusionPipeline") -> dict[str, dict[str, int]]:
    """How many layers of which kind compute in what, of each part that OpenVINO runs and that has been called."""
    made = vars(pipeline).get("_compiled_parts", {})
    return {name: dict(part.kernels) for name, part in made.items() if getattr(part, "kernels", None)}


def _compiled(
    engine: str,
    module: "nn.Module",
    name: str,
    precision: str,
    device: "torch.device",
    ranges: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    linear: str | None = None,
    cache: Path | None = None,
) -> Any:
    if engine == "openvino":
        from compress.runtime import openvino

        return openvino.OpenVINOModule(module, name, openvino.precision(precision), ranges, cache)
    from compress.runtime import inductor

    return inductor.InductorModule(module, name, inductor.precision(precision, device), ranges, linear)


def _missing_linear(linear: str, engine: str, device: "torch.device") -> str | None:
    """Why Linear layers cannot compute in 8 bits; None if they can."""
    if engine != "inductor" or device.type != "cuda":
        return f"needs engine=inductor on CUDA, and the denoiser runs in {engine} on {device}"
    from torch.cuda import get_device_capability

    if linear == "fp8" and get_device_capability(device) < (8, 9):
        return "needs a GPU of compute capability 8.9"
    return None


def _with_forward(module: "nn.Module", forward: Any) -> Any:
    """A shallow copy of a module that shares its weights, with another forward."""
    twin = copy.copy(module)
    vars(twin)["_modules"] = dict(vars(module)["_modules"])
    if forward is not None:
        vars(twin)["forward"] = forward
    return twin
