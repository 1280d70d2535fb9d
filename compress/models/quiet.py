"""Hides harmless notices and progress bars of libraries."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Logger to words that mark a notice irrelevant to the user's model. All others are shown.
_NOTICES = {
    "torchao": ("Failed to load",),  # GPU kernels that this torch cannot load; int8 weights do not use them
    "torch.utils._pytree": ("is an Enum subclass",),
    "diffusers.quantizers.torchao.torchao_quantizer": (
        "Unable to import `torchao` Tensor objects",  # names of older torchao releases
        "You are trying to set torch_dtype",  # float32 works for int8 weights: the read-back proves it
    ),
    "diffusers.configuration_utils": ("were passed to AutoencoderTiny",),  # a key that this class saves and never reads
    "diffusers.pipelines.pipeline_utils": (
        "cannot run with `cpu` device",  # half precision runs there, if slowly
        "autoencoder_tiny.AutoencoderTiny'>",  # in the place of an AutoencoderKL
    ),
    "diffusers.models.modeling_utils": ("should be kept in float32: []",),
    "transformers.modeling_utils": ("`loss_type=None` was set",),  # said when a text encoder is traced
    "transformers.utils.import_utils": ("requires torchvision (not installed)",),
}


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(words in message for words in _NOTICES[record.name])


_TRUNCATED = "part of your input was truncated"
_said: set[str] = set()  # loggers whose first notice of a caption that is too long was shown


def _is_first(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if _TRUNCATED not in message:
        return True
    record.msg, record.args = f"{message.partition(': [')[0]}; said once", ()
    first = record.name not in _said
    _said.add(record.name)
    return first


def say_truncations_once(pipeline: object) -> None:
    """Has a pipeline say once that captions are too long for its text encoder, not for every batch."""
    logging.getLogger(type(pipeline).__module__).addFilter(_is_first)


def hide_notices() -> None:
    """Drops the known harmless log lines, of libraries imported later too. Loads nothing."""
    for name in _NOTICES:
        logging.getLogger(name).addFilter(_is_news)  # adding the same filter twice has no effect


@contextmanager
def no_load_reports() -> Iterator[None]:
    """Inside, transformers prints no report of missing or unexpected weights; the caller checks them."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside, diffusers and transformers show no progress bars for loading and saving."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    switches = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in switches:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in switches:
            log.enable_progress_bar()
