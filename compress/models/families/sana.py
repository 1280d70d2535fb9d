"""The transformer of SANA."""

from typing import Any

from compress.models.families import Draw, Family, spread_blocks

TOKENS = 300


def example(config: Any, draw: Draw) -> dict[str, Any]:
    """See :class:`compress.models.families.Family`."""
    tokens = draw.tokens or TOKENS
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(config.in_channels, *draw.sides(config.sample_size)),
        "timestep": draw.timesteps(),
        "encoder_hidden_states": draw.normal(tokens, config.caption_channels),
        "encoder_attention_mask": draw.filled(1.0, draw.batch, tokens),
    }
    if config.guidance_embeds:
        inputs["guidance"] = draw.filled(0.45, draw.batch)
    return inputs


FAMILY = Family(
    classes=("SanaTransformer2DModel",),
    sample="hidden_states",
    example=example,
    features=lambda model: spread_blocks(model, ["transformer_blocks"]),
    blocks={"transformer_blocks": "num_layers"},
    widths={"feed_forward": "mlp_ratio", "heads": "num_cross_attention_heads"},
)
