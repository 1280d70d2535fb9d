"""Distillation: trains a compressed denoiser to follow its teacher."""

from compress.system.callable import make_callable

make_callable(__name__)  # compress.distill(pipeline, ...)
