"""Students of which only low-rank adapters train, merged into their weights at the end.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.distill.training import check_value
from compress.errors import UserError, bad_value

# torch and peft are imported in functions, so that checking a config does not load them.
if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Lora:
    """The adapters.

    Attributes:
        rank: Of every adapter, at least 1; 0: no adapters, all weights train.
        alpha: The adapters' output is scaled by alpha / rank, above 0; None: rank.
        targets: Ends of the names of the Linear and Conv2d that get one, such as ``to_q``.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            UserError: A value is out of its range.
        """
        check_value(self, "rank", self.rank >= 0, "an integer of at least 0")
        check_value(self, "alpha", self.alpha is None or self.alpha > 0, "a number above 0, or null")


def check_lora(student: "nn.Module", lora: Lora) -> list[str]:
    """Names of the layers that get an adapter; the student may be on the meta device.

    Raises:
        UserError: A target names no layer, or peft is not installed.
    """
    from torch import nn

    if not lora.rank:
        return []
    if importlib.util.find_spec("peft") is None:
        message = 'needs the package peft, which is not installed: pip install "compress[lora]"'
        raise UserError(f"lora.rank={lora.rank}: {message}")
    layers = [name for name, module in student.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    found = {end: [name for name in layers if f".{name}".endswith(f".{end}")] for end in lora.targets}
    for end, names in found.items():
        if not names:
            raise bad_value("lora.targets", end, f"the end of a layer's name in the {type(student).__name__}")
    if not found:
        raise bad_value("lora.targets", "[]", "at least one end of a layer's name")
    return [name for name in layers if any(name in names for names in found.values())]


@contextmanager
def adapted(student: "nn.Module", lora: Lora, seed: int) -> Iterator[list[str]]:
    """Freezes a student but for new adapters, which are merged and removed afterwards; without a rank changes nothing.

    At first the adapters change nothing. After an error they are removed without merging.

    Args:
        student: Placed and in float32.
        lora: See :class:`Lora`.
        seed: Of the adapters' first weights.

    Yields:
        Names of the layers with an adapter.
    """
    import torch

    from compress.system.random import generator

    names = check_lora(student, lora)
    if not names:
        yield names
        return
    from peft import LoraConfig, inject_adapter_in_model

    student.requires_grad_(False)
    alpha: Any = lora.alpha or lora.rank  # peft names an integer, and takes any number
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=names)
    inject_adapter_in_model(config, student)
    for number, name in enumerate(names):
        down = student.get_submodule(f"{name}.lora_A.default").weight
        bound = down[0].numel() ** -0.5
        start = torch.empty(down.shape).uniform_(-bound, bound, generator=generator(seed, "lora", number))
        down.data.copy_(start)  # type: ignore[operator]
    merge = False
    try:
        yield names
        merge = True
    finally:
        for name in names:
            layer = student.get_submodule(name)
            if merge:
                layer.merge()  # type: ignore[operator]
            student.set_submodule(name, layer.base_layer)  # type: ignore[arg-type]
        del student.peft_config
