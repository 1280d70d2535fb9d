"""Stages that store the denoiser's weights in fewer bits."""

from compress.system.callable import make_callable

make_callable(__name__)  # compress.quantize(pipeline, ...)
