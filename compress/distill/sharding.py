"""Fully sharded training: each process keeps a share of weights, gradients, moments and averages (FSDP2 of torch)."""

import os

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def wanted() -> bool:
    """Whether ``accelerate launch`` was given a config file of FSDP and started several processes."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


class Sharded:
    """A module with sharded parameters, until :meth:`restore` makes them whole again.

    Every block of a list of blocks is gathered when it computes and is a share before and after; the rest of the module
    is gathered once a step.

    Args:
        module: On the device of its process, with the same weights in every process; sharded in place.
    """

    def __init__(self, module: nn.Module) -> None:
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # channels last cannot be split
        device = next(module.parameters()).device.type
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        self.module, self._whole = module, dict(module.named_parameters())
        for block in _blocks(module):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        self._shares = dict(module.named_parameters())
        for parameter in self._whole.values():
            parameter.data = parameter.data.new_empty(0)

    def share_of(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The sharded parameters in the place of the module's own."""
        names = {id(parameter): name for name, parameter in self._whole.items()}
        return [self._shares[names[id(parameter)]] for parameter in parameters]

    def average_gradients(self, wanted: bool) -> None:
        """Whether the next backward pass averages gradients over the processes, or keeps them for a later one."""
        self.module.set_requires_gradient_sync(wanted)  # type: ignore[operator]

    def restore(self) -> None:
        """Gives every module its own class and its own parameters back, whole, in every process."""
        shares = {id(self._shares[name]): name for name in self._shares}
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for module in self.module.modules():
            for key, share in list(module._parameters.items()):
                if share is not None and id(share) in shares:
                    parameter = self._whole[shares[id(share)]]
                    parameter.data = whole(share.detach())
                    module._parameters[key] = parameter
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()
                state._pre_forward_hook_handle.remove()
                state._post_forward_hook_handle.remove()
                module.__class__ = type(module).__mro__[FSDPModule._orig_cls_mro_index]


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes, each of which has to call this; itself, if it is no share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, share: Tensor) -> Tensor:
    """A whole tensor as the share that ``share`` is of its own; itself, if that is no share."""
    if not isinstance(share, DTensor):
        return tensor
    return distribute_tensor(tensor.to(share.device), share.device_mesh, share.placements)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found
