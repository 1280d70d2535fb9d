"""The UNets of Stable Diffusion 1.x, 2.x and XL, latent consistency models, inpainting and DDPM."""

from typing import TYPE_CHECKING, Any

from compress.models.families import Draw, Family

if TYPE_CHECKING:
    from torch import nn

TOKENS = 77


def example(config: Any, draw: Draw) -> dict[str, Any] | None:
    """See :class:`compress.models.families.Family`."""
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        return None
    inputs: dict[str, Any] = {
        "sample": draw.normal(config.in_channels, *draw.sides(config.sample_size)),
        "timestep": draw.timesteps(),
    }
    if "cross_attention_dim" not in config:
        return inputs
    if config.encoder_hid_dim_type not in (None, "text_proj") or config.addition_embed_type not in (None, "text_time"):
        return None
    width = config.cross_attention_dim
    width = config.encoder_hid_dim or (width[0] if isinstance(width, (list, tuple)) else width)
    inputs["encoder_hidden_states"] = draw.normal(draw.tokens or TOKENS, width)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": draw.normal(pooled), "time_ids": draw.normal(6)}
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = draw.normal(config.time_cond_proj_dim)
    return inputs


def features(unet: "nn.Module") -> list[str]:
    """Down blocks, the mid block and up blocks, as in BK-SDM."""
    names = [f"down_blocks.{i}" for i in range(len(unet.get_submodule("down_blocks")))]  # type: ignore[arg-type]
    names += ["mid_block"] * (getattr(unet, "mid_block", None) is not None)
    return names + [f"up_blocks.{i}" for i in range(len(unet.get_submodule("up_blocks")))]  # type: ignore[arg-type]


FAMILY = Family(
    classes=("UNet2DConditionModel", "UNet2DModel", "ShapedUNet2DConditionModel", "ShapedUNet2DModel"),
    sample="sample",
    example=example,
    features=features,
)
