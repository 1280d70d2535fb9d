"""How much the denoiser's prediction suffers when levels, blocks and heads lose channels."""
