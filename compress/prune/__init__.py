"""Stages that remove channels, blocks or weights from a denoiser."""

from compress.system.callable import make_callable

make_callable(__name__)  # compress.prune(pipeline, ...)
