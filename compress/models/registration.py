"""Has diffusers load shaped UNets with the class installed here, once ``compress`` is imported.

Diffusers looks for the class of a component in the module that ``model_index.json`` names: first among its own
pipelines, as ``diffusers.pipelines.<module>``, then in a file ``<module>.py`` in the component's folder, which it runs
if ``trust_remote_code=True`` is given. Our module is therefore put among the pipelines. Then the flag is not needed,
and the file in the checkpoint is not run.

Neither torch nor diffusers is loaded for that: an import hook waits for ``diffusers.pipelines``, and the module itself
is imported when diffusers asks it for a class.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader  # which takes half of the time that importing compress may take

PIPELINES = "diffusers.pipelines"
MODULE = "shaped_unet"


class _Lazy(ModuleType):
    """Stands for ``compress.models.shaped_unet`` until something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(f"compress.models.{MODULE}"), name)


class _Register:
    """Loads a module as its own loader does, then registers ours in it."""

    def __init__(self, loader: "Loader") -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # who looks later finds what would be there without us
        self.loader.exec_module(module)
        _add()


class _Finder:
    """Waits for ``diffusers.pipelines``, then goes."""

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
    # diffusers puts a lazy module in the place of the one that was executed: hence by name.
    setattr(sys.modules[PIPELINES], MODULE, _Lazy(MODULE))
