"""Builds config dataclasses from plain values, with messages that name the full key."""

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

from compress.errors import UserError, bad_value

T = TypeVar("T")

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Values of ``precision`` and torch's name of the dtype."""

EXPECTED = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def build(cls: type[T], values: Any, path: str) -> T:
    """Makes a config dataclass from plain values and checks names and types; the dataclass checks its ranges.

    Args:
        cls: A dataclass, perhaps with dataclasses as fields.
        values: The mapping in the recipe.
        path: Its key, such as ``"stages.prune"``; ``""`` at the top.

    Raises:
        UserError: With the full key.
    """
    if not isinstance(values, dict):
        raise bad_value(path, values, "keys and values")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise UserError(unknown_key(path, str(key), list(fields)))
    built = {key: _typed(hints[key], value, _join(path, key)) for key, value in values.items()}
    for key, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and (key not in built or built[key] == "???"):
            raise UserError(f"{_join(path, key)} is missing: expected {_describe(hints[key])}")
    try:
        return cls(**built)
    except UserError as error:
        raise UserError(_join(path, str(error))) from error


def unknown_key(path: str, key: str, known: list[str]) -> str:
    """The message for an unknown key, with the nearest known one."""
    if not known:
        return f"{_join(path, key)}: no such key, and {path} is empty; a key is added with + before it"
    return f"{_join(path, key)}: no such key{nearest(key, known)}; known: {', '.join(known)}"


def nearest(word: str, known: list[str]) -> str:
    """``" (did you mean ratio?)"``, or empty if no known word is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _typed(hint: Any, value: Any, key: str) -> Any:
    """``value`` converted to the type ``hint`` as OmegaConf does (``"3"`` to 3, 1 to 1.0)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if value == "???":
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, key)
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise bad_value(key, value, _describe(hint))
        return value
    try:
        schema = OmegaConf.structured(dataclasses.make_dataclass("Field", [("value", hint)]))
    except OmegaConfBaseException:
        return value  # a union that OmegaConf cannot express: its dataclass checks it
    try:
        schema.value = value
        converted = typing.cast(dict[str, Any], OmegaConf.to_container(schema))["value"]
    except OmegaConfBaseException as error:
        if typing.get_origin(hint) is dict and isinstance(value, dict):
            for name, part in value.items():  # name the wrong one
                _typed(typing.get_args(hint)[1], part, _join(key, str(name)))
        such = ""
        if isinstance(value, str | int | float) and _holds_list(hint):
            such = f", such as [{', '.join([str(value)] * _length(hint))}]"
        raise bad_value(key, value, _describe(hint) + such) from error
    return tuple(converted) if typing.get_origin(hint) is tuple and converted is not None else converted


def _holds_list(hint: Any) -> bool:
    """Whether a type is a list, or a list or null."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return any(typing.get_origin(part) in (list, tuple) for part in (typing.get_args(hint) if union else (hint,)))


def _length(hint: Any) -> int:
    """How many values a type of a list asks for, 1 where any number will do."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    pairs = [typing.get_args(part) for part in parts if typing.get_origin(part) is tuple]
    return max([len(of) for of in pairs if ... not in of], default=1)


def _describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _describe(argument) for argument in arguments)
    if origin in (list, tuple):
        inner = EXPECTED.get(arguments[0], "") if arguments else ""
        return f"a list of {inner.split(' ', 1)[-1]}s" if inner.startswith("a ") else "a list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "keys and values"
    return EXPECTED.get(hint, str(getattr(hint, "__name__", hint)))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by their full keys, such as ``stages.prune.ratio``; an empty one is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
