"""The transformer of Flux, whose latents are a sequence of 2 x 2 patches."""

from typing import Any

from compress.models.families import Draw, Family, spread_blocks

TOKENS = 512
SIDE = 128  # of the latents; not in the config


def example(config: Any, draw: Draw) -> dict[str, Any]:
    """See :class:`compress.models.families.Family`."""
    tokens, (height, width) = draw.tokens or TOKENS, draw.sides(SIDE)
    patches = (height // 2) * (width // 2)
    inputs: dict[str, Any] = {
        "hidden_states": draw.normal(patches, config.in_channels),
        "timestep": draw.timesteps(last=1),
        "encoder_hidden_states": draw.normal(tokens, config.joint_attention_dim),
        "pooled_projections": draw.normal(config.pooled_projection_dim),
        "img_ids": draw.filled(0.0, patches, 3),
        "txt_ids": draw.filled(0.0, tokens, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = draw.filled(3.5, draw.batch)
    return inputs


FAMILY = Family(
    classes=("FluxTransformer2DModel",),
    sample="hidden_states",
    example=example,
    features=lambda model: spread_blocks(model, ["transformer_blocks", "single_transformer_blocks"]),
    blocks={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    packed=True,
    time_scale=1e-3,
)
