"""What the libraries say of prompts that are too long: heard once, and not said in every call of every row."""

import logging

WORDS = ("was truncated because", "Token indices sequence length is longer")


class Truncation(logging.Filter):
    """Drops these notices and remembers whether there was one."""

    heard = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is about something else."""
        about = any(words in record.getMessage() for words in WORDS)
        self.heard = self.heard or about
        return not about


def hear_truncation() -> Truncation:
    """Adds the filter to what diffusers and transformers print their notices with, so that it meets those of all parts.

    Both have to be imported before, since they make their handlers then.
    """
    listener = Truncation()
    for library in ("diffusers", "transformers"):
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(listener)
    return listener
