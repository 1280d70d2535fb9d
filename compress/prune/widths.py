"""Which widths a UNet's levels can have, and which are nearest to the ratios asked for."""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

from compress.errors import UserError, bad_value

# The blocks whose layers all follow their level's width. Others keep the size of a head instead of the number of
# heads, or scale and shift by the time embedding.
KNOWN_BLOCKS: dict[str, set[Any]] = {
    "down_block_types": {"DownBlock2D", "CrossAttnDownBlock2D"},
    "mid_block_type": {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None},
    "up_block_types": {"UpBlock2D", "CrossAttnUpBlock2D"},
    "resnet_time_scale_shift": {"default"},
    "attention_type": {"default"},
    "dual_cross_attention": {False},
}


def check_blocks(config: Mapping[str, Any]) -> None:
    """Raise a :class:`UserError` that names what cannot be pruned in a UNet of this config."""
    for key, known in KNOWN_BLOCKS.items():
        values = config[key] if isinstance(config[key], (list, tuple)) else [config[key]]
        for value in values:
            if value not in known:
                names = ", ".join(sorted(str(name) for name in known))
                raise UserError(f"this UNet cannot be pruned: its {key} is {value}; known: {names}")
    if not config["norm_num_groups"]:
        raise UserError("this UNet cannot be pruned: it has no norm groups (norm_num_groups)")


def level_steps(config: Mapping[str, Any]) -> list[int]:
    """What each level's width must be divisible by: its norm groups and, where it has attention, its heads."""
    levels = len(config["block_out_channels"])
    # A stock config's attention_head_dim is the number of heads unless num_attention_heads is given.
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    heads = list(heads) if isinstance(heads, (list, tuple)) else [heads] * levels
    steps = []
    for level in range(levels):
        blocks = [config["down_block_types"][level], config["up_block_types"][levels - 1 - level]]
        if level == levels - 1:
            blocks.append(config["mid_block_type"] or "")
        attention = any("CrossAttn" in block for block in blocks)
        steps.append(math.lcm(config["norm_num_groups"], heads[level] if attention else 1))
    return steps


def level_ratios(ratio: float | list[float], widths: list[int]) -> list[float]:
    """One ratio per level.

    Raises:
        UserError: If a list has another length than there are levels.
    """
    if not isinstance(ratio, (list, tuple)):
        return [float(ratio)] * len(widths)
    if len(ratio) != len(widths):
        levels = ", ".join(str(width) for width in widths)
        raise bad_value("ratio", ratio, f"one number, or {len(widths)}: one for each level (of widths {levels})")
    return [float(value) for value in ratio]


def choose_widths(config: Mapping[str, Any], ratios: list[float]) -> list[int]:
    """The possible widths nearest to those asked for, together; of equally near ones the widest.

    Two neighboring levels of different widths stay different: a stock UNet has a learned shortcut only between
    those, and equal widths would throw it away.

    Args:
        config: Of the UNet to prune.
        ratios: Share to remove per level, in [0, 1).

    Raises:
        UserError: If no level would become narrower; it names the possible widths.
    """
    widths = [int(width) for width in config["block_out_channels"]]
    steps = level_steps(config)
    asked = [width * (1 - ratio) for width, ratio in zip(widths, ratios, strict=True)]
    choices = []
    for width, step, goal, ratio in zip(widths, steps, asked, ratios, strict=True):
        possible = [*range(step, width, step), width]
        # The three nearest are enough: of them at least one differs from each neighbor.
        choices.append(sorted(possible, key=lambda w: (abs(w - goal), -w))[:3] if ratio else [width])

    def error(chosen: tuple[int, ...]) -> tuple[float, int]:
        off = sum(abs(new - goal) / old for new, goal, old in zip(chosen, asked, widths, strict=True))
        return round(off, 9), -sum(chosen)

    def keeps_shortcuts(chosen: tuple[int, ...]) -> bool:
        pairs = range(len(widths) - 1)
        return all(widths[i] == widths[i + 1] or chosen[i] != chosen[i + 1] for i in pairs)

    best = min(filter(keeps_shortcuts, product(*choices)), key=error, default=tuple(widths))
    if list(best) == widths:
        listed = "; ".join(
            f"level {i}: {', '.join(str(w) for w in [*range(step, width, step), width])}"
            for i, (width, step) in enumerate(zip(widths, steps, strict=True))
        )
        raise bad_value(
            "ratio",
            ratios,
            f"ratios that leave fewer channels; the nearest possible widths are the present ones. Widths must be "
            f"divisible by the norm groups and heads and stay different where they differ: {listed}",
        )
    return list(best)
