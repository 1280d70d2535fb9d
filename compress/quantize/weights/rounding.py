"""Rounds a weight to the levels of a scheme.

Rows are output channels; the weights that share a scale are next to each other in a row. Scales are rounded to
bfloat16, as they are stored, before the weights are rounded, so that nothing is lost between the two.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.compressed_model import decode, levels, pack, spread, stored
from compress.quantize.weights.scheme import Scheme

SEARCHES = ("absmax", "percentile", "mse", "hqq")
SHRINK = [1 - 0.03 * i for i in range(24)]  # shares of the largest magnitude that "mse" tries
TAIL = 1e-3  # share of the weights that "percentile" clips, on either side
SWEEPS = 100  # of k-means
HQQ = {"sweeps": 10, "beta": 10.0, "growth": 1.01, "power": 0.7}  # of Badri and Shaji 2023


@dataclass(frozen=True)
class Rounded:
    """A rounded weight, seen as rows.

    Attributes:
        codes: ``(rows, columns)``, uint8.
        scale: ``(rows or 1, groups)``, float32 with values of bfloat16; None for a palette.
        zero: Like ``scale``; None if symmetric.
        palette: ``(rows or 1, 2 ** bits)``, float32; None for the other formats.
    """

    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    palette: Tensor | None = None

    def weights(self, scheme: Scheme) -> Tensor:
        """What the codes stand for, ``(rows, columns)``, float32."""
        return decode(self.codes, asdict(scheme), self.scale, self.zero, self.palette)

    def tensors(self, bits: int) -> dict[str, Tensor]:
        """As they are stored, see :mod:`compress.models.compressed_model`."""
        found = {"codes": pack(self.codes, bits)}
        if self.palette is not None:
            return found | {"palette": stored(self.palette)}
        shared = {"scale": self.scale, "zero": self.zero}
        return found | {name: stored(t.bfloat16()) for name, t in shared.items() if t is not None}


def round_weight(weight: Tensor, scheme: Scheme, search: str = "mse") -> Rounded:
    """Rounds a weight.

    Args:
        weight: ``(out, ...)``, finite.
        scheme: Its levels.
        search: How scales are found: ``absmax`` (no weight is clipped), ``percentile`` (all but 0.1 % on either side),
            ``mse`` (least squared error), or ``hqq`` (moved zeros too, for asymmetric ones, by half-quadratic
            splitting; Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/). A palette is found by
            k-means.
    """
    rows = weight.detach().float().flatten(1)
    if scheme.format == "palette":
        palette = _palette(rows if scheme.granularity == "channel" else rows.view(1, -1), 2**scheme.bits)
        return round_with(weight, scheme, palette=palette)
    groups, real = _groups(rows, scheme)
    return round_with(weight, scheme, *_SEARCH[search](groups, real, scheme))


def round_with(
    weight: Tensor,
    scheme: Scheme,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    palette: Tensor | None = None,
) -> Rounded:
    """Rounds a weight ``(out, ...)`` to levels that are known, see :class:`Rounded`."""
    rows = weight.detach().float().flatten(1)
    if palette is not None:
        return Rounded(nearest(rows, palette), palette=palette)
    assert scale is not None
    return Rounded(encode(rows, scheme, scale, zero), scale, zero)


def encode(rows: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Codes of the nearest levels, ``(rows, columns)``, uint8.

    Args:
        rows: ``(rows, columns)``, float32.
        scheme: Not a palette.
        scale: ``(rows or 1, groups)``.
        zero: Like ``scale``, or None.
    """
    columns = rows.shape[1]
    # A scale of zero has weights of zero alone, whatever their codes.
    values = rows / spread(scale.masked_fill(scale == 0, 1), asdict(scheme), columns)
    if zero is not None:
        values = values + spread(zero, asdict(scheme), columns)
    return to_codes(values, scheme)


def to_codes(values: Tensor, scheme: Scheme) -> Tensor:
    """Codes of the levels nearest to values in units of the scale, uint8."""
    if scheme.format == "int":
        middle = 2 ** (scheme.bits - 1) if scheme.symmetric else 0
        return (values.round() + middle).clamp(1 if middle else 0, 2**scheme.bits - 1).to(torch.uint8)
    if scheme.format == "fp8":
        return values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    table, order = levels(asdict(scheme)).to(values.device).sort(stable=True)
    return order.to(torch.uint8)[torch.bucketize(values, (table[1:] + table[:-1]) / 2)]


def largest_level(scheme: Scheme) -> float:
    """The largest magnitude of a level; symmetric integers do not use the lowest one."""
    if scheme.format == "int":
        return 2 ** (scheme.bits - 1) - 1
    return {"fp8": 448.0, "fp4": 6.0, "nf4": 1.0}[scheme.format]


def _groups(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Weights that share a scale, ``(rows, groups, size)``; and which are real, if the last group is filled up."""
    if scheme.granularity == "tensor":
        return rows.reshape(1, 1, -1), None
    if scheme.granularity == "channel":
        return rows[:, None], None
    fill = -rows.shape[1] % scheme.group_size
    if not fill:
        return rows.view(len(rows), -1, scheme.group_size), None
    # The last weight once more: it changes no range.
    filled = torch.cat([rows, rows[:, -1:].expand(-1, fill)], 1).view(len(rows), -1, scheme.group_size)
    real = F.pad(torch.ones_like(rows[:1], dtype=torch.bool), (0, fill)).view(1, -1, scheme.group_size)
    return filled, real


Found = tuple[Tensor, Tensor | None]


def _absmax(groups: Tensor, real: Tensor | None, scheme: Scheme) -> Found:
    return _scales(groups.amin(2), groups.amax(2), scheme)


def _percentile(groups: Tensor, real: Tensor | None, scheme: Scheme) -> Found:
    ordered = groups.sort(2).values
    last = ordered.shape[2] - 1
    cut = round(last * TAIL)
    return _scales(ordered[..., cut], ordered[..., last - cut], scheme)


def _mse(groups: Tensor, real: Tensor | None, scheme: Scheme) -> Found:
    low, high = groups.amin(2), groups.amax(2)
    best: Found = _scales(low, high, scheme)
    least = _error(groups, real, scheme, best)
    for share in SHRINK[1:]:
        found = _scales(low * share, high * share, scheme)
        error = _error(groups, real, scheme, found)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, found[0], best[0])
        best = scale, None if best[1] is None or found[1] is None else torch.where(better, found[1], best[1])
    return best


def _hqq(groups: Tensor, real: Tensor | None, scheme: Scheme) -> Found:
    """Half-quadratic splitting: the zero that leaves a sparse error."""
    scale, zero = _mse(groups, real, scheme)
    if zero is None:
        return scale, zero
    best, least, beta = zero, _error(groups, real, scheme, (scale, zero)), HQQ["beta"]
    step = scale.masked_fill(scale == 0, 1)[..., None]
    for _ in range(int(HQQ["sweeps"])):
        codes = (groups / step + zero[..., None]).round().clamp(0, 2**scheme.bits - 1)
        left = groups - (codes - zero[..., None]) * step
        shrunk = left.sign() * (left.abs() - left.abs().clamp(min=1e-8).pow(HQQ["power"] - 1) / beta).clamp(min=0)
        zero = (codes - (groups - shrunk) / step).mean(2).bfloat16().float()
        beta *= HQQ["growth"]
        error = _error(groups, real, scheme, (scale, zero))
        best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
    return scale, best


_SEARCH: dict[str, Callable[[Tensor, Tensor | None, Scheme], Found]] = {
    "absmax": _absmax,
    "percentile": _percentile,
    "mse": _mse,
    "hqq": _hqq,
}


def _scales(low: Tensor, high: Tensor, scheme: Scheme) -> Found:
    """Scale and zero of groups, ``(rows, groups)``, whose levels reach from the lowest to the highest value."""
    if scheme.symmetric:
        return (torch.maximum(-low, high) / largest_level(scheme)).bfloat16().float(), None
    width = high - low
    # Equal weights: one step from zero.
    scale = torch.where(width > 0, width / (2**scheme.bits - 1), high.abs()).bfloat16().float()
    return scale, (-low / scale.masked_fill(scale == 0, 1)).bfloat16().float()


def _error(groups: Tensor, real: Tensor | None, scheme: Scheme, found: Found) -> Tensor:
    """Squared error of rounding, ``(rows, groups)``."""
    scale, zero = found[0][..., None], None if found[1] is None else found[1][..., None]
    values = groups / scale.masked_fill(scale == 0, 1)
    codes = to_codes(values if zero is None else values + zero, scheme)
    level = levels(asdict(scheme)).to(groups.device)[codes.int()]
    error = ((level if zero is None else level - zero) * scale - groups).square_()
    return (error if real is None else error * real).sum(2)


def _palette(rows: Tensor, count: int) -> Tensor:
    """Levels by k-means, from the quantiles (Lloyd 1982), ``(rows, count)``, in order."""
    ordered = rows.sort(1).values
    sums = F.pad(ordered.double().cumsum(1), (1, 0))  # of the weights before each, so that a cluster's is a difference
    columns = rows.shape[1]
    start = ((torch.arange(count, device=rows.device) + 0.5) / count * (columns - 1)).round().long()
    palette = ordered[:, start].contiguous()
    for _ in range(SWEEPS):
        inner = torch.searchsorted(ordered, _middles(palette))
        ends = F.pad(F.pad(inner, (1, 0)), (0, 1), value=columns)
        number, total = ends.diff(dim=1), sums.gather(1, ends).diff(dim=1)
        new = torch.where(number > 0, total / number.clamp(min=1), palette).float().sort(1).values
        if torch.equal(new, palette):
            break
        palette = new
    return palette


def nearest(rows: Tensor, palette: Tensor) -> Tensor:
    """Codes of the nearest entries of a palette, ``(rows, columns)``, uint8; ``palette`` is ``(rows or 1, count)``."""
    if len(palette) == 1:
        return torch.bucketize(rows, _middles(palette)[0]).to(torch.uint8)
    return torch.searchsorted(_middles(palette), rows).to(torch.uint8)


def _middles(palette: Tensor) -> Tensor:
    return ((palette[:, 1:] + palette[:, :-1]) / 2).contiguous()
