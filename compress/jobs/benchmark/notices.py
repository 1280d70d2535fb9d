"""Catches the libraries' notices of truncated prompts, which would repeat in every call of every row."""

import logging

WORDS = ("was truncated because", "Token indices sequence length is longer")


class Truncation(logging.Filter):
    """Drops these notices and records whether there was one."""

    heard = False

    def filter(self, record: logging.LogRecord) -> bool:
        """True for other records."""
        about = any(words in record.getMessage() for words in WORDS)
        self.heard = self.heard or about
        return not about


def hear_truncation() -> Truncation:
    """Adds the filter to the log handlers of diffusers and transformers.

    Both must be imported before: the import creates their handlers.
    """
    listener = Truncation()
    for library in ("diffusers", "transformers"):
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(listener)
    return listener
