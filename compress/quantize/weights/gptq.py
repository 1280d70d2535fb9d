"""Rounding that makes up for its own errors (GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

The columns of a weight are rounded one after the other, and what a column's rounding changed in the outputs is taken
back by the columns that are not rounded yet. With inputs X as rows, the change that is kept small is that of X W^T: its
second derivative by a row of W is H = X^T X. Scales, zeros and palettes stay those of
:func:`compress.quantize.weights.rounding.round_weight`, so a checkpoint looks the same and only its codes differ.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import UserError
from compress.quantize.weights.apply import Layer
from compress.quantize.weights.rounding import Rounded, encode, nearest, round_weight
from compress.quantize.weights.scheme import Scheme

ROWS = 512  # inputs of a layer that are kept of one call, at random positions
COLUMNS = 2304  # of a block of H; the inputs of two blocks count as uncorrelated, so memory grows linearly
BATCH = 128  # columns whose errors are passed to all later ones at once
DAMPING = 0.01  # added to H's diagonal, as a share of its mean


@contextmanager
def input_products(layers: Mapping[str, Layer]) -> Iterator[dict[str, list[Tensor]]]:
    """Sums the products of a layer's inputs while the block runs.

    Args:
        layers: By name. Grouped convolutions are left out.

    Yields:
        Name to the diagonal blocks of H, each ``(columns, columns)``, float32, of up to :data:`COLUMNS` columns; a
        column is an input of a Linear, or an input channel and a place of the kernel of a Conv2d. A layer that was not
        called is missing.

    Raises:
        UserError: An input is NaN or infinite.
    """
    found: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)

    def watcher(name: str) -> Any:
        def hook(layer: Layer, args: tuple[Tensor, ...]) -> None:
            blocks = _rows(layer, args[0].detach(), generator).float().split(COLUMNS, 1)
            products = found.setdefault(name, [block.new_zeros(2 * block.shape[1:]) for block in blocks])
            for product, block in zip(products, blocks, strict=True):
                product.addmm_(block.T, block)

        return hook

    handles = [
        layer.register_forward_pre_hook(watcher(name))
        for name, layer in layers.items()
        if getattr(layer, "groups", 1) == 1
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, products in found.items():
        if not all(product.isfinite().all() for product in products):
            raise UserError(f"the input of {name} is NaN or infinite while images are sampled: use precision=fp32")


def round_with_feedback(weight: Tensor, products: list[Tensor], scheme: Scheme, search: str = "mse") -> Rounded:
    """Rounds a weight so that its layer's outputs change little.

    Args:
        weight: ``(out, ...)``, finite.
        products: Blocks of H, see :func:`input_products`. Columns whose inputs are zero get the nearest levels.
        scheme: Its levels.
        search: How scales are found, see :func:`compress.quantize.weights.rounding.round_weight`.
    """
    rounded = round_weight(weight, scheme, search)
    codes = torch.empty_like(rounded.codes)
    start = 0
    for product in products:
        columns = range(start, start := start + len(product))
        rows = weight.detach().float().flatten(1)[:, columns.start : columns.stop]
        order = product.diagonal().argsort(descending=True, stable=True)  # the largest inputs first
        upper = _inverse_root(product[order][:, order])
        left, done = rows[:, order], torch.empty_like(rows, dtype=torch.uint8)
        places = [columns[i] for i in order.tolist()]
        for begin in range(0, len(places), BATCH):
            part = slice(begin, begin + BATCH)
            now, factors = left[:, part], upper[part, part]
            errors = torch.empty_like(now)
            for i, place in enumerate(places[part]):
                done[:, begin + i], values = _column(now[:, i : i + 1].contiguous(), place, rounded, scheme)
                errors[:, i] = (now[:, i] - values) / factors[i, i]
                now[:, i + 1 :].addr_(errors[:, i], factors[i, i + 1 :], alpha=-1)
            left[:, begin + BATCH :].addmm_(errors, upper[part, begin + BATCH :], alpha=-1)
        codes[:, columns.start + order] = done
    return replace(rounded, codes=codes)


def _rows(layer: Layer, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """What the weight's rows are multiplied with at up to :data:`ROWS` random positions, ``(positions, columns)``."""
    if isinstance(layer, nn.Linear):
        rows = inputs.flatten(0, -2)
        return rows[torch.randperm(len(rows), generator=generator)[:ROWS]]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode)
    parts = []
    for image in padded:  # one at a time: unfolding takes as many times the memory as the kernel has places
        rows = F.unfold(image[None], layer.kernel_size, layer.dilation, 0, layer.stride)[0].T
        parts.append(rows[torch.randperm(len(rows), generator=generator)[: -(-ROWS // len(padded))]])
    return torch.cat(parts)


def _inverse_root(product: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, H damped; row i says how columns after i make up for column i."""
    damped = product.double()
    diagonal = damped.diagonal()
    diagonal += torch.where(diagonal == 0, 1.0, DAMPING * diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(product.dtype)


def _column(values: Tensor, place: int, rounded: Rounded, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes of a column, ``(rows,)``, and what they stand for.

    Args:
        values: ``(rows, 1)``.
        place: Of the column in the weight.
        rounded: Has its scales or palette.
        scheme: Of the weight.
    """
    if rounded.palette is not None:
        codes = nearest(values, rounded.palette)
        return codes[:, 0], Rounded(codes, palette=rounded.palette).weights(scheme)[:, 0]
    assert rounded.scale is not None
    group = place // scheme.group_size if scheme.granularity == "group" else 0
    scale = rounded.scale[:, group : group + 1]
    zero = None if rounded.zero is None else rounded.zero[:, group : group + 1]
    alone = replace(scheme, granularity="channel")
    codes = encode(values, alone, scale, zero)
    return codes[:, 0], Rounded(codes, scale, zero).weights(alone)[:, 0]
