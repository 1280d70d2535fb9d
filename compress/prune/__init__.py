"""Stages that remove channels from a denoiser."""
