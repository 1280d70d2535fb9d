"""Notices of libraries that would drown the run's own lines."""

import logging

from pipelines import PIPELINES

from compress.models.conditions import conditions_of
from compress.models.quiet import say_truncations_once


def test_captions_that_are_cut_are_told_once() -> None:
    pipeline, told = PIPELINES["sd 1.x"](), logging.Handler()
    messages: list[str] = []
    told.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(type(pipeline).__module__)
    logger.addHandler(told)
    say_truncations_once(pipeline)
    for _ in range(2):
        conditions_of(pipeline, ["a cat " * 40, "a dog " * 40])
    logger.removeHandler(told)
    (message,) = messages
    assert "truncated" in message and message.endswith("tokens; said once") and "dog" not in message
