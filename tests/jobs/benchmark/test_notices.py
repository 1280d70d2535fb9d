"""What the libraries say of prompts that are too long is heard, and all else still said."""

import io
import logging

from tiny import tiny_pipeline

from compress.jobs.benchmark.notices import hear_truncation


def test_truncation_is_heard_and_nothing_else_kept_from_the_screen(monkeypatch):
    pipeline = tiny_pipeline()
    screen = io.StringIO()
    every = [handler for name in ("diffusers", "transformers") for handler in logging.getLogger(name).handlers]
    handlers = [handler for handler in every if isinstance(handler, logging.StreamHandler)]
    for handler in handlers:
        monkeypatch.setattr(handler, "stream", screen)
    listener = hear_truncation()
    try:
        pipeline("a cat", num_inference_steps=1)
        assert not listener.heard
        pipeline("a red cat " * 20, num_inference_steps=1)
        assert listener.heard
        assert screen.getvalue() == ""
        logging.getLogger("diffusers.pipelines").warning("something else")
        assert "something else" in screen.getvalue()
    finally:
        for handler in every:
            handler.removeFilter(listener)
