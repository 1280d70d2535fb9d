"""Least squares after channel pruning: each layer is fitted to give what it gave before at its remaining outputs.

After He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", https://arxiv.org/abs/1707.06168,
section 3.1, for all layers of a denoiser. The pruned denoiser runs once over all calibration examples. When the pass
reaches a layer, that layer is fitted to the inputs that the layers before it, fitted already, give it now.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.data.calibration import Calibration
from compress.system.progress import bar
from compress.system.random import generator

HELD_OUT = 8  # one in this many examples decides whether a layer's fit is kept


@dataclass
class _Layer:
    """A layer to fit.

    Attributes:
        kept: Its remaining outputs, as indices of the old ones, ``(c,)``.
        scale: Of its outputs, against the old ones.
        index: Chosen places of all examples, in the order of ``(example, place)``, ``(p,)``.
        wanted: What the old layer gives there, ``(p, c)``.
    """

    kept: Tensor
    scale: float
    index: list[Tensor] = field(default_factory=list)
    wanted: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def reconstruct(
    teacher: nn.Module,
    student: nn.Module,
    kept: Mapping[str, Tensor],
    scales: Mapping[str, float],
    calibration: Calibration,
    places: int = 16384,
    ridge: float = 1e-3,
) -> dict[str, tuple[float, float]]:
    """Fits the Conv2d and Linear layers of a pruned denoiser, in place.

    Args:
        teacher: The denoiser before it was pruned.
        student: The same with fewer channels; layers have the same names.
        kept: Name of a layer to the indices of its remaining outputs; layers that are not named keep all.
        scales: Name of a layer to a factor of its outputs against the teacher's, where it is not 1.
        calibration: Examples for both.
        places: Number of pixels or tokens, over all examples, at which each layer is fitted.
        ridge: Penalty on the change of the weights, as a share of the mean square of the inputs, above 0.

    Returns:
        Name of each fitted layer to its relative error before and after: mean squared error over the variance of the
        teacher's outputs, on examples that the fit does not see.
    """
    layers = {
        name: _Layer(kept[name] if name in kept else torch.arange(len(module.weight)), scales.get(name, 1.0))
        for name, module in teacher.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and _fits(student, name)
    }
    with _observed(teacher, layers, calibration, places) as set_part:
        for part in calibration.parts():
            set_part(part)
            calibration.predict(teacher, part)
    errors: dict[str, tuple[float, float]] = {}
    with bar() as progress:
        task = progress.add_task("fitting the layers", total=len(layers))
        with _fitting(student, layers, ridge, errors, lambda: progress.advance(task)):
            calibration.predict(student, slice(0, len(calibration.latents)))
    return errors


def _fits(student: nn.Module, name: str) -> bool:
    """Whether the student has a layer of this name that is a plain product with patches of its input."""
    try:
        module = student.get_submodule(name)
    except AttributeError:
        return False
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.dilation == (1, 1) and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) and not name.startswith("time_embedding")


@contextmanager
def _observed(
    teacher: nn.Module, layers: Mapping[str, _Layer], calibration: Calibration, places: int
) -> Iterator[Callable[[slice], None]]:
    """Collects the teacher's outputs at random places of each part of the examples."""
    current = slice(0)

    def hook(name: str, layer: _Layer) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            rows = _rows(output)
            each = len(rows) // len(output)
            count = max(1, places * len(output) // len(calibration.latents))
            index = torch.randperm(len(rows), generator=generator(0, name, current.start))[:count].sort().values
            layer.index.append(index + current.start * each)
            layer.wanted.append(rows[index.to(rows.device)][:, layer.kept.to(rows.device)] * layer.scale)

        return keep

    def set_part(part: slice) -> None:
        nonlocal current
        current = part

    handles = [teacher.get_submodule(name).register_forward_hook(hook(name, layers[name])) for name in layers]
    try:
        yield set_part
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _fitting(
    student: nn.Module,
    layers: dict[str, _Layer],
    ridge: float,
    errors: dict[str, tuple[float, float]],
    advance: Callable[[], None],
) -> Iterator[None]:
    """Fits each layer when a pass over all examples reaches it."""

    def hook(name: str) -> Any:
        def fit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            layer = layers.pop(name, None)
            if layer is not None and layer.wanted:
                index, wanted = torch.cat(layer.index), torch.cat(layer.wanted)
                errors[name] = _fit(module, _patches(module, inputs[0], index), wanted, ridge)
            advance()

        return fit

    handles = [student.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(output: Tensor) -> Tensor:
    """Outputs with one row a place, ``(b * places, c)``, from ``(b, c, h, w)`` or ``(b, ..., c)``."""
    return output.movedim(1, -1).flatten(0, 2) if output.ndim == 4 else output.flatten(0, -2)


def _patches(module: nn.Module, inputs: Tensor, index: Tensor) -> Tensor:
    """What a layer multiplies with its weights at some places, ``(p, inputs)``, in the order of the weights."""
    index = index.to(inputs.device)
    if not isinstance(module, nn.Conv2d):
        return inputs.flatten(0, -2)[index]
    (kh, kw), (sh, sw), (ph, pw) = module.kernel_size, module.stride, module.padding
    height, width = ((inputs.shape[2] + 2 * ph - kh) // sh + 1, (inputs.shape[3] + 2 * pw - kw) // sw + 1)
    padded = F.pad(inputs, (pw, pw, ph, ph))
    image, row, column = index // (height * width), index // width % height * sh, index % width * sw
    taps = [padded[image, :, row + y, column + x] for y in range(kh) for x in range(kw)]
    return torch.stack(taps, dim=2).flatten(1)


def _fit(module: Any, inputs: Tensor, wanted: Tensor, ridge: float) -> tuple[float, float]:
    """Ridge regression of the change of a layer's weights; returns the relative error before and after."""
    weight = module.weight.flatten(1).float()
    given, wanted = inputs.float(), wanted.float()
    if module.bias is not None:
        given = torch.cat([given, torch.ones_like(given[:, :1])], dim=1)
        weight = torch.cat([weight, module.bias.float()[:, None]], dim=1)
    left = wanted - given @ weight.T
    seen = len(given) - len(given) // HELD_OUT  # the last rows are those of the last examples
    products = given[:seen].T @ given[:seen]
    products.diagonal().add_(ridge * products.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(products)
    change = torch.cholesky_solve(given[:seen].T @ left[:seen], factor).T
    change[:, : module.weight[0].numel()] *= module.weight.flatten(1) != 0  # zeros of sparse pruning stay
    size = wanted.var(0, correction=0).mean().clamp(min=1e-12)
    before = float(left[seen:].square().mean() / size)
    after = float((left[seen:] - given[seen:] @ change.T).square().mean() / size)
    if failed or not after < before:
        return before, before
    if module.bias is not None:
        module.bias.add_(change[:, -1].to(module.bias.dtype))
        change = change[:, :-1]
    module.weight.add_(change.reshape(module.weight.shape).to(module.weight.dtype))
    return before, after
