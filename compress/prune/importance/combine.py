"""The config key that sets how incoming and outgoing weights of a channel are combined into one score."""

from dataclasses import dataclass

from compress.errors import bad_value

COMBINE = ("product", "sum", "outgoing")


def check_combine(value: str) -> None:
    """Raise UserError if :func:`compress.prune.importance.score.score` does not support the value."""
    if value not in COMBINE:
        raise bad_value("combine", value, "product, sum or outgoing")


@dataclass(frozen=True)
class Combined:
    """Config of an importance with no other keys.

    Attributes:
        combine: See :func:`compress.prune.importance.score.score`.
    """

    combine: str = "outgoing"

    def __post_init__(self) -> None:
        """Checks the choice.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        check_combine(self.combine)
