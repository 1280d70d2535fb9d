"""Has diffusers load shaped UNets with the installed class, once ``compress`` is imported.

Diffusers looks for the class of a component in the module that ``model_index.json`` names: first among its
pipelines, as ``diffusers.pipelines.<module>``, then in a file ``<module>.py`` in the component's folder, which it runs
with ``trust_remote_code=True``. Our module is registered among the pipelines, so the flag is not needed and the file
in the checkpoint is not run.

This loads neither torch nor diffusers: an import hook waits for ``diffusers.pipelines``, and our module is imported
when diffusers first takes a class from it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader  # slow: half of the time allowed for importing compress

PIPELINES = "diffusers.pipelines"
MODULE = "compressed_model"


class _Lazy(ModuleType):
    """Loads ``compress.models.compressed_model`` at the first access to an attribute."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(f"compress.models.{MODULE}"), name)


class _Register:
    """Loads a module with its own loader, then registers ours in it."""

    def __init__(self, loader: "Loader") -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # restored, as without us
        self.loader.exec_module(module)
        _add()


class _Finder:
    """Waits for ``diffusers.pipelines``, then removes itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != PIPELINES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Register(spec.loader)  # type: ignore[assignment]
        return spec


def register() -> None:
    """Registers our module now or when diffusers is imported."""
    if PIPELINES in sys.modules:
        _add()
    else:
        sys.meta_path.insert(0, _Finder())


def _add() -> None:
    # By name, since diffusers replaces the executed module with a lazy one.
    setattr(sys.modules[PIPELINES], MODULE, _Lazy(MODULE))
