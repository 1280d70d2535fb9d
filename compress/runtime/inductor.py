"""torch.compile: the same arithmetic in fused kernels, in bfloat16 where the processor has it."""

import copy
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from compress.errors import UserError
from compress.runtime.fake import float_model


def missing(device: torch.device) -> str | None:
    """What torch.compile lacks to run here; None if nothing."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        return "needs a C++ compiler: install g++, or name one in CXX"
    return None


def precision(asked: str, device: torch.device) -> torch.dtype:
    """What matrix products are computed in; ``auto`` is bfloat16 where the processor or GPU has it."""
    if asked != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[asked]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


@dataclass
class InductorModule:
    """Runs a module's calls; each new shape of its arguments is compiled once.

    Attributes:
        module: Stays as it was.
        name: Of the component, for messages.
        dtype: Of matrix products and convolutions.
    """

    module: nn.Module
    name: str
    dtype: torch.dtype

    def __deepcopy__(self, memo: Any) -> "InductorModule":
        return self

    @cached_property
    def _compiled(self) -> Any:
        plain = float_model(self.module, {})
        if plain is self.module:
            plain = copy.deepcopy(plain)
        return torch.compile(plain.to(memory_format=torch.channels_last), dynamic=False)  # type: ignore[call-overload]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output.

        Raises:
            UserError: The module cannot be compiled.
        """
        kind = next(self.module.parameters()).device.type
        try:
            with torch.no_grad(), torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
                found = self._compiled(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:  # the latter from the compiler
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"engine=inductor: the {self.name} cannot be run: {why}") from error
        dtype = next(self.module.parameters()).dtype
        return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, found)
