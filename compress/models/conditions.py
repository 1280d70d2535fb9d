"""A denoiser's conditions: all its inputs for a prompt besides noisy latents and timestep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models import denoiser
from compress.models.inputs import Inputs, captured_inputs, sample_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NOT_CONDITIONS = ("timestep", "return_dict")


@dataclass(frozen=True)
class Conditions:
    """Conditions of several prompts. Names join the keys of nested dictionaries with dots.

    Attributes:
        rows: Name to a tensor ``(m, ...)`` with one row a prompt.
        shared: Name to a value for all prompts: a tensor without rows, a number, a flag or None.
    """

    rows: dict[str, Tensor]
    shared: dict[str, Any]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(next(iter(self.rows.values()))) if self.rows else 0

    def rows_of(self, chosen: Tensor | slice) -> "Conditions":
        """The conditions of some prompts; for a model without prompts, all."""
        return Conditions({name: rows[chosen] for name, rows in self.rows.items()}, self.shared)

    def inputs(
        self, chosen: Tensor | slice, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Inputs:
        """Keyword arguments of the denoiser for some prompts.

        Args:
            chosen: Rows.
            device: Of the tensors.
            dtype: Of floating-point tensors; None leaves it.
        """

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        found: Inputs = {}
        for name, value in {**self.shared, **self.rows_of(chosen).rows}.items():
            *above, last = name.split(".")
            place = found
            for key in above:
                place = place.setdefault(key, {})
            place[last] = placed(value)
        return found


def conditions_of(
    pipeline: "DiffusionPipeline", prompts: Sequence[str], height: int | None = None, width: int | None = None
) -> Conditions:
    """Captures the conditions of some prompts without guidance; the denoiser computes nothing.

    A second call with another number of prompts shows which tensors have one row a prompt.

    Args:
        pipeline: Any that draws from a prompt; unchanged.
        prompts: At least one.
        height: Of the images in pixels; None: the model's own. Some conditions depend on it.
        width: As ``height``.

    Raises:
        UserError: The pipeline needs more than a prompt.
    """
    size = {"height": height, "width": width}
    found = _captured(pipeline, prompts, size)
    other = _captured(pipeline, ["", ""] if len(prompts) == 1 else prompts[:1], size)
    rows, shared = {}, {}
    for name, value in found.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == len(prompts) != len(other[name]):
            rows[name] = value
        else:
            shared[name] = value
    return Conditions(rows, shared)


def unconditional(pipeline: "DiffusionPipeline", height: int | None = None, width: int | None = None) -> Conditions:
    """What guidance points away from, one row: what the pipeline itself passes without a prompt, such as zeros in SDXL.

    For a pipeline that never passes two rows an image it is the empty prompt.

    Args:
        pipeline: See :func:`conditions_of`.
        height: As there.
        width: As there.
    """
    found = conditions_of(pipeline, [""], height, width)
    if not found.rows:
        return found
    model: Any = denoiser(pipeline)
    inputs = captured_inputs(pipeline, guidance=2.0, height=height, width=width)
    passed = split(model, inputs, 2).rows_of(slice(1)) if len(inputs[sample_name(model)]) == 2 else found
    return passed if passed.rows.keys() == found.rows.keys() else found


def split(model: Any, inputs: Inputs, batch: int) -> Conditions:
    """The conditions among the inputs of a pass of ``batch`` rows; tensors of that length have one row each."""
    found = _conditions(model, inputs)
    rows = {name: value for name, value in found.items() if isinstance(value, Tensor) and value.shape[:1] == (batch,)}
    return Conditions(rows, {name: value for name, value in found.items() if name not in rows})


def joined(parts: Sequence[Conditions]) -> Conditions:
    """The conditions of several parts, concatenated.

    Raises:
        UserError: The parts differ in more than their rows.
    """
    first = parts[0]
    for name in first.rows:
        shapes = {part.rows[name].shape[1:] for part in parts}
        if len(shapes) > 1:
            raise UserError(f"the pipeline pads prompts to different lengths ({name}: {sorted(map(tuple, shapes))})")
    return Conditions({name: torch.cat([part.rows[name] for part in parts]) for name in first.rows}, first.shared)


def _captured(pipeline: Any, prompts: Sequence[str], size: dict[str, int | None]) -> Inputs:
    inputs = captured_inputs(pipeline, prompts, height=size["height"], width=size["width"])
    return _conditions(denoiser(pipeline), inputs)


def _conditions(model: Any, inputs: Inputs) -> dict[str, Any]:
    others = (sample_name(model), *NOT_CONDITIONS)
    return _flat({name: value for name, value in inputs.items() if name not in others})


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value.cpu() if isinstance(value, Tensor) else value
    return found
