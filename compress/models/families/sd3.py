"""The transformer of Stable Diffusion 3."""

from typing import Any

from compress.models.families import Draw, Family, spread_blocks

TOKENS = 77 + 256  # of CLIP and of T5


def example(config: Any, draw: Draw) -> dict[str, Any]:
    """See :class:`compress.models.families.Family`."""
    return {
        "hidden_states": draw.normal(config.in_channels, *draw.sides(config.sample_size)),
        "timestep": draw.timesteps(),
        "encoder_hidden_states": draw.normal(draw.tokens or TOKENS, config.joint_attention_dim),
        "pooled_projections": draw.normal(config.pooled_projection_dim),
    }


FAMILY = Family(
    classes=("SD3Transformer2DModel",),
    sample="hidden_states",
    example=example,
    features=lambda model: spread_blocks(model, ["transformer_blocks"]),
    blocks={"transformer_blocks": "num_layers"},
    places=("dual_attention_layers",),
    keep_last=True,  # it gives no text features, which only the last block may
)
