"""The possible widths of a UNet's levels, and those nearest to the requested ratios, from the config only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from compress.errors import UserError, bad_value

# Blocks in which all layers have the level's width. Others scale and shift by the time embedding, or have other widths.
KNOWN_BLOCKS: dict[str, set[Any]] = {
    "resnet_time_scale_shift": {"default"},
    "time_embedding_type": {"positional"},
    "attention_type": {"default"},
    "dual_cross_attention": {False},
    "downsample_type": {"conv"},
    "upsample_type": {"conv"},
}
KNOWN_WITH_TEXT: dict[str, set[Any]] = {
    "down_block_types": {"DownBlock2D", "CrossAttnDownBlock2D"},
    "mid_block_type": {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None},
    "up_block_types": {"UpBlock2D", "CrossAttnUpBlock2D"},
}
KNOWN_WITHOUT_TEXT: dict[str, set[Any]] = {
    "down_block_types": {"DownBlock2D", "AttnDownBlock2D"},
    "mid_block_type": {"UNetMidBlock2D", None},
    "up_block_types": {"UpBlock2D", "AttnUpBlock2D"},
}
LARGE = 256  # from this width on, kernels are tuned to multiples of LARGE_MULTIPLE
LARGE_MULTIPLE = 64
FAST_MULTIPLE = 16  # floats of a vector register of 512 bits
FAST_HEAD = 8


@dataclass(frozen=True)
class Shape:
    """The widths and config changes of a narrower UNet.

    Attributes:
        widths: ``block_out_channels``, in channels.
        heads: ``"narrow"`` or ``"remove"``: whether heads lose channels or whole heads are removed.
        multiple: Every changed width is a multiple of this, besides norm groups and heads.
        changes: Changed keys of the stock config, including ``block_out_channels``.
    """

    widths: list[int]
    heads: str
    multiple: int
    changes: dict[str, Any]


def check_blocks(config: Mapping[str, Any]) -> None:
    """Raise a :class:`UserError` if a UNet of this config cannot be pruned; it names the reason."""
    for key, known in (KNOWN_BLOCKS | (KNOWN_WITH_TEXT if _has_text(config) else KNOWN_WITHOUT_TEXT)).items():
        if key not in config:  # each UNet class lacks some
            continue
        for value in config[key] if isinstance(config[key], (list, tuple)) else [config[key]]:
            if value not in known:
                names = ", ".join(sorted(str(name) for name in known))
                raise UserError(f"this UNet cannot be pruned: its {key} is {value}; known: {names}")
    if not config["norm_num_groups"]:
        raise UserError("this UNet cannot be pruned: it has no norm groups (norm_num_groups)")
    for level, (width, heads) in enumerate(zip(config["block_out_channels"], level_heads(config), strict=True)):
        head_dim = None if _has_text(config) else config["attention_head_dim"]
        if heads is not None and width % (head_dim or heads):
            raise UserError(
                f"this UNet cannot be pruned: attention_head_dim={config['attention_head_dim']} does not divide the "
                f"{width} channels of level {level} into heads"
            )


def _has_text(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of a ``UNet2DConditionModel``; a ``UNet2DModel`` has no text input."""
    return "cross_attention_dim" in config


def level_heads(config: Mapping[str, Any]) -> list[int | None]:
    """Number of heads of each level, None if it has no attention."""
    widths = config["block_out_channels"]
    given = config["attention_head_dim"]
    heads: list[int | None] = []
    for level, width in enumerate(widths):
        blocks = [config["down_block_types"][level], config["up_block_types"][len(widths) - 1 - level]]
        attention = any("Attn" in block for block in blocks)
        if level == len(widths) - 1 and config["mid_block_type"] is not None:
            attention |= "CrossAttn" in config["mid_block_type"] if _has_text(config) else config["add_attention"]
        if not attention:
            heads.append(None)
        elif _has_text(config):  # in its stock config, attention_head_dim is the number of heads
            heads.append(given[level] if isinstance(given, (list, tuple)) else given)
        else:
            heads.append(width // given if given else 1)
    return heads


def default_multiple(config: Mapping[str, Any]) -> int:
    """64 at the size of Stable Diffusion, for fast attention and convolutions; otherwise 1."""
    widths = config["block_out_channels"]
    return LARGE_MULTIPLE if all(w >= LARGE and w % LARGE_MULTIPLE == 0 for w in widths) else 1


def fast_shape(config: Mapping[str, Any], heads: str = "auto", multiple: int | None = None) -> tuple[str, int]:
    """What engines' kernels like: mode for heads and multiple of widths; what is given stays.

    Widths are multiples of 16, or of :func:`default_multiple` if that is more. Whole heads go where their width is a
    multiple of 8 and half of every level's can go. Otherwise heads get narrower, to multiples of 8 where widths allow.

    Args:
        config: Config of the UNet to prune.
        heads: ``"auto"``, ``"narrow"`` or ``"remove"``.
        multiple: Or None.
    """
    base = max(default_multiple(config), FAST_MULTIPLE) if multiple is None else multiple
    numbers = [(width, n) for width, n in zip(config["block_out_channels"], level_heads(config), strict=True) if n]
    modes = _modes(config, heads)
    if "remove" in modes and len(modes) > 1:
        whole = all(width // n % FAST_HEAD == 0 for width, n in numbers)
        steps = level_steps(config, "remove", base)
        halves = all(2 * step <= width for step, width in zip(steps, config["block_out_channels"], strict=True))
        modes = ["remove" if numbers and whole and halves else "narrow"]
    if modes[0] == "narrow" and multiple is None:
        step = math.lcm(base, *(FAST_HEAD * n for _, n in numbers))
        if all(width % step == 0 and width > step for width, _ in numbers):
            base = step
    return modes[0], base


def level_steps(config: Mapping[str, Any], heads: str = "auto", multiple: int | None = None) -> list[int]:
    """The divisor of each level's width if it changes.

    Args:
        config: Config of the UNet to prune.
        heads: ``"narrow"``: divisible by the number of heads, which stays. ``"remove"``: divisible by the width of a
            head, which stays. ``"auto"``: the mode that allows more widths, narrow on a tie.
        multiple: A further divisor besides heads and norm groups; None: :func:`default_multiple`.

    Raises:
        UserError: The levels have no common width, because layers have individual shapes.
    """
    if config.get("layers"):
        raise UserError(
            "this UNet cannot be pruned by level: its layers have individual shapes from an earlier stage; use method "
            "per_layer or low_rank"
        )
    if heads == "auto":
        modes = _modes(config, heads)
        return min((level_steps(config, mode, multiple) for mode in modes), key=lambda steps: -_number(config, steps))
    multiple = default_multiple(config) if multiple is None else multiple
    steps = []
    for width, number in zip(config["block_out_channels"], level_heads(config), strict=True):
        head_step = 1 if number is None else number if heads == "narrow" else width // number
        steps.append(math.lcm(config["norm_num_groups"], config.get("attn_norm_num_groups") or 1, head_step, multiple))
    return steps


def _number(config: Mapping[str, Any], steps: list[int]) -> int:
    """Total number of possible widths on all levels."""
    return sum(-(-width // step) for width, step in zip(config["block_out_channels"], steps, strict=True))


def possible_widths(config: Mapping[str, Any], heads: str = "auto", multiple: int | None = None) -> list[list[int]]:
    """The possible widths of each level, ascending; the last is the current one. Arguments as :func:`level_steps`."""
    steps = level_steps(config, heads, multiple)
    return [[*range(step, width, step), width] for step, width in zip(steps, config["block_out_channels"], strict=True)]


def _modes(config: Mapping[str, Any], heads: str) -> list[str]:
    """The possible modes for heads, ``"narrow"`` and ``"remove"``, of those requested."""
    one_width_for_all = not _has_text(config) and config["attention_head_dim"] is not None and any(level_heads(config))
    possible = ["remove"] if one_width_for_all else ["narrow", "remove"]
    modes = [mode for mode in possible if heads in ("auto", mode)]
    if not modes:
        raise bad_value(
            "heads", heads, "remove or auto: a UNet2DModel has one attention_head_dim for the heads of all levels"
        )
    return modes


def level_ratios(ratio: float | list[float], widths: list[int]) -> list[float]:
    """One ratio per level.

    Raises:
        UserError: The length of a list differs from the number of levels.
    """
    if not isinstance(ratio, (list, tuple)):
        return [float(ratio)] * len(widths)
    if len(ratio) != len(widths):
        levels = ", ".join(str(width) for width in widths)
        raise bad_value("ratio", ratio, f"one number, or {len(widths)}: one for each level (of widths {levels})")
    return [float(value) for value in ratio]


def choose_shape(
    config: Mapping[str, Any], ratios: list[float], heads: str = "auto", multiple: int | None = None
) -> Shape:
    """The possible shape with the least total distance to the requested widths; on a tie, the widest.

    Neighboring levels of different widths stay different: a stock UNet has a learned shortcut only between these, and
    equal widths would remove it.

    Args:
        config: Config of the UNet to prune.
        ratios: Share to remove per level, in [0, 1).
        heads: ``"narrow"``, ``"remove"``, or ``"auto"``: the nearer of the two, narrow on a tie.
        multiple: See :class:`Shape`; None: :func:`default_multiple`.

    Raises:
        UserError: No level would become narrower (the message names the nearest ratios that work, or the possible
            widths), or level 0 would but must keep its width.
    """
    multiple = default_multiple(config) if multiple is None else multiple
    modes = _modes(config, heads)
    widths = [int(width) for width in config["block_out_channels"]]
    wanted = [width * (1 - ratio) for width, ratio in zip(widths, ratios, strict=True)]

    def error(chosen: tuple[int, ...]) -> tuple[float, int]:
        off = sum(abs(new - goal) / old for new, goal, old in zip(chosen, wanted, widths, strict=True))
        return round(off, 9), -sum(chosen)

    nearest = {mode: _nearest_first(possible_widths(config, mode, multiple), wanted, ratios) for mode in modes}
    best = {
        mode: min((c for c in product(*near) if keeps_shortcuts(widths, c)), key=error, default=tuple(widths))
        for mode, near in nearest.items()
    }
    mode = min(modes, key=lambda mode: error(best[mode])[0])
    chosen = list(best[mode])
    if chosen == widths:
        smaller = [c for near in nearest.values() for c in product(*near) if keeps_shortcuts(widths, c)]
        smaller = [c for c in smaller if list(c) != widths]
        raise _impossible(config, ratios, modes, multiple, min(smaller, key=error, default=None))
    if chosen[0] != widths[0] and config.get("class_embed_type") == "timestep":
        raise UserError(
            "this UNet cannot be pruned to these widths: class_embedding.linear_1.weight has as many inputs as level 0 "
            "has channels; do not prune this level (a ratio of 0 in the list)"
        )
    return Shape(chosen, mode, multiple, {"block_out_channels": tuple(chosen), **_head_changes(config, mode, chosen)})


def _nearest_first(possible: list[list[int]], wanted: list[float], ratios: list[float]) -> list[list[int]]:
    """For each level the three widths nearest to the wanted one; at least one of three differs from both neighbors."""
    near = []
    for widths, goal, ratio in zip(possible, wanted, ratios, strict=True):
        by_distance = sorted((abs(width - goal), -width) for width in widths)
        near.append([-negative for _, negative in by_distance[:3]] if ratio else widths[-1:])
    return near


def keeps_shortcuts(old: Sequence[int], new: Sequence[int]) -> bool:
    """Whether neighboring levels of different widths stay different, so that their learned shortcuts remain."""
    return all(old[i] == old[i + 1] or new[i] != new[i + 1] for i in range(len(old) - 1))


def _impossible(
    config: Mapping[str, Any], ratios: list[float], modes: list[str], multiple: int, nearest: tuple[int, ...] | None
) -> UserError:
    old = config["block_out_channels"]
    if nearest is not None:
        near = [round(1 - new / width, 4) for new, width in zip(nearest, old, strict=True)]
        hint = f"the nearest that leaves fewer channels is {near}"
    else:
        hint = "no ratio leaves fewer channels"
    listed = "; or, heads removed, ".join(
        "; ".join(
            f"level {i}: {', '.join(str(w) for w in widths)}"
            for i, widths in enumerate(possible_widths(config, mode, multiple))
        )
        for mode in modes
    )
    beyond = f", by {multiple}" if multiple > 1 else ""
    return bad_value(
        "ratio",
        ratios,
        f"ratios that leave fewer channels; the nearest possible widths are the current ones, and {hint}. Widths must "
        f"be divisible by the norm groups{beyond} and by the heads and stay different where they differ: {listed}",
    )


def _head_changes(config: Mapping[str, Any], heads: str, widths: list[int]) -> dict[str, Any]:
    """Change of ``attention_head_dim``: the number of heads; in a ``UNet2DModel`` it is a width and does not change."""
    numbers = level_heads(config)
    if heads == "narrow" or not _has_text(config) or not any(numbers):
        return {}
    old, given = config["block_out_channels"], config["attention_head_dim"]
    given = given if isinstance(given, (list, tuple)) else [given] * len(old)
    # The number of a level without attention is unused.
    left = [n * new // was if n else any_ for n, any_, new, was in zip(numbers, given, widths, old, strict=True)]
    return {"attention_head_dim": left}
