"""Stages that store the denoiser's weights in fewer bits."""
