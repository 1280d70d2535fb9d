"""The transformer of PixArt-alpha and PixArt-sigma."""

from typing import Any

from compress.models.families import Draw, Family, spread_blocks

TOKENS = 300  # of PixArt-sigma; PixArt-alpha reads 120


def example(config: Any, draw: Draw) -> dict[str, Any]:
    """See :class:`compress.models.families.Family`."""
    tokens = draw.tokens or TOKENS
    sized = config.use_additional_conditions
    sized = config.sample_size == 128 if sized is None else sized
    return {
        "hidden_states": draw.normal(config.in_channels, *draw.sides(config.sample_size)),
        "timestep": draw.timesteps(),
        "encoder_hidden_states": draw.normal(tokens, config.caption_channels),
        "encoder_attention_mask": draw.filled(1.0, draw.batch, tokens),
        "added_cond_kwargs": {
            "resolution": draw.filled(1024.0, draw.batch, 2) if sized else None,
            "aspect_ratio": draw.filled(1.0, draw.batch, 1) if sized else None,
        },
    }


FAMILY = Family(
    classes=("PixArtTransformer2DModel",),
    sample="hidden_states",
    example=example,
    features=lambda model: spread_blocks(model, ["transformer_blocks"]),
    blocks={"transformer_blocks": "num_layers"},
)
