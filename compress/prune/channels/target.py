"""A target for a UNet's remaining cost, and the widths that meet it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, bad_value
from compress.runtime import check_engine_name

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.inputs import Inputs

TOLERANCE = 0.02
"""Maximum deviation of the remaining share from the target, relative to the target."""

SLACK = 0.1
"""Share by which a predicted error may exceed the least: of such choices at equal multiply-accumulates, the one with
most parameters follows its teacher best after a training."""

Widths = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """The remaining share of the UNet's cost, in (0, 1). At most one may be set; None: no target.

    Attributes:
        params: Share of the parameters.
        macs: Share of the multiply-accumulates of one forward pass at the model's own size.
        bytes: Share of the bytes of the weights, in the run's precision.
        latency: Share of the seconds of one forward pass, measured in ``engine``; of method ``width`` only.
        engine: ``auto`` or one of :data:`compress.runtime.ENGINES`, for ``latency``.
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency: float | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        given = self._given()
        for key, share in given.items():
            if not 0 < share < 1:
                raise bad_value(key, share, "the share to be left, a number in (0, 1), or null")
        if len(given) > 1:
            raise bad_value(list(given)[1], list(given.values())[1], f"null where {next(iter(given))} is given")
        check_engine_name(self.engine)

    @property
    def goal(self) -> tuple[str, float] | None:
        """The unit and the share of it, or None if none is set."""
        return next(iter(self._given().items()), None)

    def _given(self) -> dict[str, float]:
        shares = {key: share for key, share in asdict(self).items() if key != "engine"}
        return {key: share for key, share in shares.items() if share is not None}

    def check_counted(self, method: str) -> None:
        """Refuse a latency where a method counts costs alone.

        Raises:
            UserError: With the methods that measure it.
        """
        if self.latency is not None:
            raise bad_value(
                "target.latency",
                self.latency,
                f"null: {method} has no such target; width (prune=magnitude, taylor, ...) and depth have it",
            )


class WidthCosts:
    """The cost of a UNet at other widths, as a share of its current cost.

    Each layer's cost is a product of at most two widths, so the total cost is a polynomial of degree two. It is fitted
    to at most as many meta-device models as it has coefficients, and checked with one more per plan.

    Args:
        unet: Only its config is used; may be on the meta device.
        inputs: Arguments of one forward pass, for ``"macs"``.
        unit: ``"params"``, ``"macs"`` or ``"bytes"``.
        heads: See :class:`compress.prune.width.Config`.
        multiple: See :class:`compress.prune.width.Config`.
    """

    def __init__(
        self, unet: Any, inputs: "Inputs", unit: str, heads: str = "auto", multiple: int | None = None
    ) -> None:
        from compress.prune.channels.proxy import meta_model

        self.unet, self.unit, self.heads, self.multiple = unet, unit, heads, multiple
        self.widths = tuple(int(width) for width in unet.config.block_out_channels)
        full = meta_model(type(unet), unet.config).eval()
        # In one precision, parameters are bytes.
        self._times = _times_used(full, inputs) if unit == "macs" else None
        self._full = self._cost(full)

    def exact(self, widths: Widths) -> float:
        """The remaining share at these widths."""
        return self._count(widths) / self._full

    def estimate(self, choices: Sequence[Widths]) -> "Tensor":
        """The remaining shares at many choices of widths, shape ``(n,)``, float64.

        Exact, except for choices that make neighboring levels of different widths equally wide or vice versa.
        """
        import torch

        terms = _terms(torch.tensor(choices))
        samples = _spread(choices, terms.shape[1])
        found = torch.tensor([self.exact(sample) for sample in samples], dtype=torch.float64)
        scale = terms.amax(0)
        # If levels have few possible widths, some coefficients cannot be identified, and these do not matter.
        fit = torch.linalg.lstsq(_terms(torch.tensor(samples)) / scale, found[:, None], driver="gelsd").solution[:, 0]
        return terms / scale @ fit

    def _count(self, widths: Widths) -> float:
        from compress.prune.channels.proxy import meta_model

        if widths == self.widths:
            return self._full
        return self._cost(meta_model(type(self.unet), config_at(self.unet, widths, self.heads, self.multiple)))

    def _cost(self, model: Any) -> float:
        if self._times is None:
            return sum(parameter.numel() for parameter in model.parameters())
        total = 0.0
        for name, module in model.named_modules():
            if _is_attention(module):
                total += self._times[name] * module.inner_dim
            elif _is_layer(module):
                # A shortcut that the UNet does not have yet runs at the resolution of its resnet's output.
                like = name if name in self._times else f"{name.rpartition('.')[0]}.conv2"
                total += self._times[like] * module.weight.numel()
        return total


def _times_used(model: Any, inputs: "Inputs") -> dict[str, float]:
    """How often one pass uses each weight of a layer, and each channel of an attention's queries.

    This depends only on the size of the inputs, not on the widths of the model.
    """
    from compress.models.macs import count_macs
    from compress.prune.channels.rebuild import attention_macs

    macs = count_macs(model, inputs).by_module
    times = {name: macs.get(name, 0) / m.weight.numel() for name, m in model.named_modules() if _is_layer(m)}
    attentions = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
    return times | {name: attention_macs(name, module, macs) / module.inner_dim for name, module in attentions}


def _is_layer(module: Any) -> bool:
    from torch import nn

    return isinstance(module, (nn.Conv2d, nn.Linear))


def _is_attention(module: Any) -> bool:
    from diffusers.models.attention_processor import Attention

    return isinstance(module, Attention)


def _terms(widths: "Tensor") -> "Tensor":
    """1, every width and every product of two widths, shape ``(n, terms)``, float64."""
    import torch

    columns = [torch.ones(len(widths), dtype=torch.float64), *widths.double().T]
    pairs = itertools.combinations_with_replacement(range(1, len(columns)), 2)
    return torch.stack(columns + [columns[i] * columns[j] for i, j in pairs], 1)


def _spread(choices: Sequence[Widths], count: int) -> list[Widths]:
    """Choices that identify the coefficients: repeatedly the one least explained by those chosen before."""
    import torch

    candidates = _terms(torch.tensor(choices))
    candidates = candidates / candidates.amax(0)
    chosen: list[int] = []
    for _ in range(min(count, len(choices))):
        norms = candidates.norm(dim=1)
        best = int(norms.argmax())
        if norms[best] < 1e-9:
            break
        chosen.append(best)
        direction = candidates[best] / norms[best]
        candidates = candidates - (candidates @ direction)[:, None] * direction
    return [choices[index] for index in chosen]


def config_at(unet: Any, widths: Widths, heads: str = "auto", multiple: int | None = None) -> dict[str, Any]:
    """Config of a UNet narrowed to these widths, which are some of :func:`choices_of` with the same arguments."""
    from compress.prune.channels.widths import choose_shape

    ratios = [1 - new / old for new, old in zip(widths, unet.config.block_out_channels, strict=True)]
    changes = choose_shape(unet.config, ratios, heads, multiple).changes
    if "time_embedding_dim" in unet.config:
        changes["time_embedding_dim"] = unet.time_embedding.linear_1.out_features
    return {**unet.config, **changes}


def choices_of(config: Mapping[str, Any], heads: str = "auto", multiple: int | None = None) -> list[Widths]:
    """All widths to which a stock UNet of this config can be narrowed, including its current ones.

    Args:
        config: Config of the UNet.
        heads: See :class:`compress.prune.width.Config`.
        multiple: See :class:`compress.prune.width.Config`.
    """
    from compress.prune.channels.widths import keeps_shortcuts, possible_widths

    each = possible_widths(config, heads, multiple)
    return [choice for choice in itertools.product(*each) if keeps_shortcuts(config["block_out_channels"], choice)]


def meeting(target: Target, costs: WidthCosts, choices: Sequence[Widths]) -> list[Widths]:
    """The choices that meet a target, by estimated cost.

    Args:
        target: With one share set.
        costs: Costs in the target's unit.
        choices: Widths to choose from.

    Raises:
        UserError: No choice meets it; the message names the nearest possible shares.
    """
    assert target.goal is not None
    unit, share = target.goal
    shares = costs.estimate(choices)
    off = (shares / share - 1).abs()
    found = [choice for choice, error in zip(choices, off.tolist(), strict=True) if error <= TOLERANCE]
    if not found:
        near = [choices[i] for i in off.argsort()[:2].tolist()]
        listed = " or ".join(f"{costs.exact(choice):.3f} (widths {', '.join(map(str, choice))})" for choice in near)
        raise UserError(
            f"target.{unit}={share:g}: no widths of this UNet meet this within 2 %; nearest: {listed}; "
            "prune=per_layer comes nearer, as every layer has a width of its own"
        )
    return found


def best(
    target: Target, costs: WidthCosts, choices: Sequence[Widths], predicted: Callable[[Widths], float]
) -> tuple[Widths, float]:
    """The choice with the least predicted error that meets a target, and its remaining share.

    Multiply-accumulates say little of parameters: for them the choice has most parameters among those whose error is
    within :data:`SLACK` of the least.

    Args:
        target: With one share set.
        costs: Costs in the target's unit.
        choices: The result of :func:`meeting`.
        predicted: Predicted error of a choice.

    Raises:
        UserError: No choice meets the target when counted exactly.
    """
    assert target.goal is not None
    unit, share = target.goal

    def first(ordered: Sequence[Widths]) -> tuple[Widths, float] | None:
        lefts = ((choice, costs.exact(choice)) for choice in ordered)
        return next(((choice, left) for choice, left in lefts if abs(left / share - 1) <= TOLERANCE), None)

    ranked = sorted(choices, key=lambda widths: (predicted(widths), widths))
    if found := first(ranked):
        if unit != "macs":
            return found
        near = [widths for widths in ranked if predicted(widths) <= (1 + SLACK) * predicted(found[0])]
        sizes = WidthCosts(costs.unet, {}, "params", costs.heads, costs.multiple).estimate(near).tolist()
        largest = [near[i] for i in sorted(range(len(near)), key=lambda i: -sizes[i])]
        return first(largest) or found
    raise UserError(f"target.{unit}={share:g}: no widths of this UNet meet this within 2 %")
