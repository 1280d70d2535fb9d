"""The schedulers for sampling images, by their names in recipes."""

import inspect
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers.

    Attributes:
        label: Name in tables.
        kind: Its class in diffusers; None keeps the pipeline's.
        changes: Settings that differ from those of the pipeline's scheduler.
    """

    label: str
    kind: str | None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The Python line that sets this scheduler; empty for the pipeline's own."""
        changes = "".join(f", {name}={value}" for name, value in self.changes.items())
        return f"pipeline.scheduler = {self.kind}.from_config(pipeline.scheduler.config{changes})" if self.kind else ""


SCHEDULERS = {
    "checkpoint": Scheduler("own scheduler", None),
    # Stable Diffusion's PNDM has no Runge-Kutta steps; a DDPM config does not say so.
    "pndm": Scheduler("PNDM", "PNDMScheduler", {"skip_prk_steps": True}),
    # Latents exceed [-1, 1]; configs of other schedulers do not allow that, and DDIM clips by default.
    "ddim": Scheduler("DDIM", "DDIMScheduler", {"clip_sample": False}),
    "euler": Scheduler("Euler", "EulerDiscreteScheduler"),
    "euler_a": Scheduler("Euler a", "EulerAncestralDiscreteScheduler"),
    "dpmsolver++": Scheduler("DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpmsolver++_karras": Scheduler("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": Scheduler("UniPC", "UniPCMultistepScheduler"),
    "lcm": Scheduler("LCM", "LCMScheduler"),
}


def exchanged(own: Any, name: str) -> Any | None:
    """The scheduler ``name`` with the settings of a pipeline's own; None if it does not fit the model.

    It fits if diffusers lists the two as compatible and, for a flow-matching model, if it supports that prediction.

    Args:
        own: The pipeline's scheduler; unchanged.
        name: One of :data:`SCHEDULERS` other than ``checkpoint``.
    """
    import diffusers

    scheduler = SCHEDULERS[name]
    kind = getattr(diffusers, str(scheduler.kind))
    if not isinstance(own, kind) and kind not in getattr(own, "compatibles", ()):
        return None
    flow = own.config.get("use_flow_sigmas") or own.config.get("prediction_type") == "flow_prediction"
    knows_flow = "use_flow_sigmas" in inspect.signature(kind).parameters and not scheduler.changes
    if flow and not knows_flow:
        return None
    return kind.from_config(own.config, **scheduler.changes)


def used(own: Any, name: str) -> str:
    """The scheduler used for the requested ``name``: ``checkpoint`` if that does not fit."""
    return name if name == "checkpoint" or exchanged(own, name) is not None else "checkpoint"
