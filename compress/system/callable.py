"""Callable packages: ``compress.prune`` is a package of methods and the function that runs one."""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(importlib.import_module("compress.api"), self.__name__.rpartition(".")[2])
        return function(*args, **kwargs)


def make_callable(name: str) -> None:
    """Makes a call of a package run the function of that name in :mod:`compress.api`.

    Args:
        name: ``__name__`` of the package.
    """
    sys.modules[name].__class__ = _Callable
