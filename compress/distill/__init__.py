"""Distillation: a compressed denoiser is trained to do what its teacher does."""

from compress.system.callable import make_callable

make_callable(__name__)  # compress.distill(pipeline, ...)
