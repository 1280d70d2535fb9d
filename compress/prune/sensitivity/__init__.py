"""How much the denoiser's prediction changes when levels, blocks and heads lose channels."""
