"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """A mistake in a recipe, an argument or a file; shown as one message without a traceback, exit code 2."""


def bad_value(key: str, value: object, expected: str) -> UserError:
    """A :class:`UserError` that names the config key, its value and what would be right."""
    return UserError(f"{key}={value}: expected {expected}")
