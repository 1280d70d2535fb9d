"""How a checkpoint that was trained for it is sampled: its scheduler, its number of steps, and the guidance in it.

A pipeline of diffusers has no place for default arguments of its call. ``compress.json`` has one, as ``"sampling"``,
and a pipeline that is loaded here is called with them where the user gives no others.
"""

import functools
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INFO = "compress.json"


@dataclass(frozen=True)
class Sampling:
    """What a denoiser was trained for.

    Attributes:
        scheduler: Class of the checkpoint's scheduler, if no other may be used; None: any that fits.
        steps: Denoising steps; None: any number.
        guidance: Lowest and highest guidance scale that one pass of the denoiser gives; None: it knows of none.
        unguided: Whether the pipeline must be called without guidance, because its denoiser takes no scale.
    """

    scheduler: str | None = None
    steps: int | None = None
    guidance: tuple[float, float] | None = None
    unguided: bool = False

    def scale(self, asked: float) -> float:
        """The guidance scale that images have if ``asked`` is asked for: the nearest that the denoiser knows."""
        low, high = self.guidance or (asked, asked)
        return min(max(asked, low), high)

    def argument(self, asked: float) -> float:
        """What the pipeline has to be called with for :meth:`scale`."""
        return 1.0 if self.unguided else self.scale(asked)


def sampling_of(pipeline: Any) -> Sampling:
    """What was kept by :func:`set_sampling`; by default anything goes."""
    return vars(pipeline).get("_sampling") or Sampling()


def set_sampling(pipeline: Any, sampling: Sampling) -> None:
    """Keeps it with the pipeline and makes it the default of the pipeline's call."""
    vars(pipeline)["_sampling"] = sampling
    if callable(pipeline):
        stock = getattr(type(pipeline), "_stock", type(pipeline))
        pipeline.__class__ = _with_defaults(stock, sampling)


def draw_with(pipeline: Any, scheduler: Any, sampling: Sampling) -> None:
    """Has a pipeline draw in few steps, in memory and once it is saved.

    Stable Diffusion becomes a ``LatentConsistencyModelPipeline``, which is called with 4 steps by default.

    Args:
        pipeline: Changed.
        scheduler: Replaces its own.
        sampling: What it was trained for.
    """
    from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

    if getattr(type(pipeline), "_stock", type(pipeline)) is StableDiffusionPipeline:
        pipeline.__class__ = LatentConsistencyModelPipeline
    pipeline.register_modules(scheduler=scheduler)
    set_sampling(pipeline, sampling)


def keep_sampling(pipeline: Any, folder: Path | None) -> Any:
    """Keeps with a loaded pipeline what ``compress.json`` in its folder says, and returns it."""
    file = None if folder is None else folder / INFO
    if file is not None and file.is_file():
        found = sampling_from(json.loads(file.read_text(encoding="utf-8")))
        if found != Sampling():
            set_sampling(pipeline, found)
    return pipeline


def sampling_from(info: Mapping[str, Any]) -> Sampling:
    """What the content of a ``compress.json`` says."""
    found = info.get("sampling") or {}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return Sampling(**values)


def saved_sampling(pipeline: Any) -> dict[str, Any]:
    """``{"sampling": ...}`` for ``compress.json``; empty if there is nothing to say."""
    found = sampling_of(pipeline)
    return {"sampling": asdict(found)} if found != Sampling() else {}


def _with_defaults(stock: type, sampling: Sampling) -> type:
    """A pipeline's class, under its own name, whose call has other defaults."""
    signature = inspect.signature(stock.__call__)
    defaults: dict[str, Any] = {}
    if sampling.steps is not None:
        defaults["num_inference_steps"] = sampling.steps
    if sampling.guidance is not None and "guidance_scale" in signature.parameters:
        defaults["guidance_scale"] = sampling.argument(signature.parameters["guidance_scale"].default)
    changed = [
        parameter.replace(default=defaults[name]) if name in defaults else parameter
        for name, parameter in signature.parameters.items()
    ]

    @functools.wraps(stock.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        return stock.__call__(self, *args, **kwargs, **{k: v for k, v in defaults.items() if k not in given})

    __call__.__signature__ = signature.replace(parameters=changed)  # type: ignore[attr-defined]
    parts = {"__call__": __call__, "__module__": stock.__module__, "__doc__": stock.__doc__, "_stock": stock}
    return type(stock.__name__, (stock,), parts)
