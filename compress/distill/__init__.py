"""Distillation: a compressed denoiser is trained to do what its teacher does."""
