"""UNets of diffusers with layers of shapes that a stock config cannot express.

A checkpoint with such a UNet carries this file beside the weights, so that diffusers loads it as it loads any other::

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=True)

Nothing but torch and diffusers is needed. The stock class must not be asked for it, as by
``UNet2DConditionModel.from_pretrained``: that ignores ``layers`` and may start from random weights after a warning.

``config.json`` holds the keys of the stock class, which describe the UNet that this one was made from, and ``layers``:
the name of every layer that is another now, and what it is::

    Conv2d, Linear  {"in": 320, "out": 256}              channels of its input and output
                    {"in": 320, "out": 256, "rank": 64}  a product of two: "reduce" to 64 channels, which has the kernel
                                                         and the stride but no bias, and "expand" (1x1) to 256
    GroupNorm       {"channels": 256}                    in as many groups as before
    LayerNorm       {"channels": 256}
    Attention       {"heads": 6}                         of equally many channels each; query, key and value have to
                                                         be of one width, that of their layers

Whatever else diffusers derives from the widths (the scale of attention, ``channels`` of an upsampler, ...) is set to
what the layers are.
"""

import functools
import inspect
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

MODULE = "shaped_unet"  # the name of this file, without .py

Shape = Mapping[str, int]


def _init(stock: type[nn.Module]) -> Callable[..., None]:
    """The stock constructor with an argument more, in its signature too, where diffusers finds the keys of a config."""

    def __init__(self: Any, *args: Any, layers: Mapping[str, Shape] | None = None, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        self.register_to_config(layers={name: dict(shape) for name, shape in (layers or {}).items()})
        self.__module__ = MODULE  # diffusers writes it into model_index.json, wherever this file was imported from
        reshape(self, layers or {})

    signature = inspect.signature(stock.__init__)
    added = inspect.Parameter("layers", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore
    return __init__


def _save_pretrained(stock: type[Any]) -> Callable[..., None]:
    """The stock method, which puts a copy of this file into the folder first."""

    @functools.wraps(stock.save_pretrained)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        os.makedirs(save_directory, exist_ok=True)
        shutil.copyfile(__file__, os.path.join(save_directory, f"{MODULE}.py"))
        stock.save_pretrained(self, save_directory, *args, **kwargs)

    return save_pretrained


class ShapedUNet2DConditionModel(UNet2DConditionModel):
    """A ``UNet2DConditionModel`` whose config has ``layers`` of other shapes."""

    __init__ = _init(UNet2DConditionModel)
    save_pretrained = _save_pretrained(UNet2DConditionModel)
    _auto_class = "AutoModel"  # has config.json name this file, for AutoModel.from_pretrained

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Leaves out what is there for ``AutoModel``."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)


class ShapedUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` whose config has ``layers`` of other shapes."""

    __init__ = _init(UNet2DModel)
    save_pretrained = _save_pretrained(UNet2DModel)
    _auto_class = "AutoModel"

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Leaves out what is there for ``AutoModel``."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)


def reshape(unet: nn.Module, layers: Mapping[str, Shape]) -> None:
    """Replaces layers of a stock UNet by new ones of other shapes and tells the modules around them.

    Args:
        unet: Changed. Its new layers are on the device and in the dtype of the old ones.
        layers: Name to shape, as described at the top of this file.

    Raises:
        ValueError: For a name or a shape that does not fit the UNet.
    """
    modules = dict(unet.named_modules(remove_duplicate=False))
    for name, shape in layers.items():
        if name not in modules:
            raise ValueError(f"layers: {name} is no module of this {type(unet).__name__}")
        new = _layer(modules[name], name, shape)
        for path in [path for path, module in modules.items() if module is modules[name]]:  # some have two names
            parent, _, child = path.rpartition(".")
            modules[parent].register_module(child, new)
    for name, module in unet.named_modules():
        _update(module, name)


def _layer(old: nn.Module, name: str, shape: Shape) -> nn.Module:
    """What takes the old layer's place; attention stays, with other heads."""
    keys = set(shape)
    if any(type(size) is not int or size < 1 for size in shape.values()):
        raise ValueError(f"layers: {name}: {dict(shape)} are not whole numbers of at least 1")
    if isinstance(old, Attention) and keys == {"heads"}:
        old.heads = old.sliceable_head_dim = shape["heads"]
        return old
    if isinstance(old, nn.GroupNorm) and keys == {"channels"}:
        return nn.GroupNorm(old.num_groups, shape["channels"], old.eps, old.affine, **_place(old))
    if isinstance(old, nn.LayerNorm) and keys == {"channels"}:
        bias = old.bias is not None
        return nn.LayerNorm(shape["channels"], old.eps, old.elementwise_affine, bias, **_place(old))
    if type(old) in (nn.Linear, nn.Conv2d) and keys in ({"in", "out"}, {"in", "out", "rank"}):
        bias = old.bias is not None
        if "rank" not in shape:
            return _like(old, shape["in"], shape["out"], bias)
        reduce = _like(old, shape["in"], shape["rank"], bias=False)
        if isinstance(old, nn.Linear):
            expand: nn.Module = nn.Linear(shape["rank"], shape["out"], bias, **_place(old))
        else:
            expand = nn.Conv2d(shape["rank"], shape["out"], 1, bias=bias, **_place(old))
        return nn.Sequential(OrderedDict(reduce=reduce, expand=expand))
    raise ValueError(f"layers: {name} is a {type(old).__name__}, which cannot be {dict(shape)}")


def _like(old: nn.Module, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """A layer of the old one's kind and geometry."""
    if isinstance(old, nn.Linear):
        return nn.Linear(inputs, outputs, bias, **_place(old))
    return nn.Conv2d(
        inputs,
        outputs,
        old.kernel_size,
        old.stride,
        old.padding,
        old.dilation,
        bias=bias,
        padding_mode=old.padding_mode,
        **_place(old),
    )


def _place(old: nn.Module) -> dict[str, Any]:
    return {} if old.weight is None else {"device": old.weight.device, "dtype": old.weight.dtype}


def _update(module: nn.Module, name: str) -> None:
    """Sets what a module remembers of the widths of its layers."""
    if isinstance(module, Attention) and module.to_k is not None and module.to_out is not None:
        module.query_dim, module.inner_dim = _ends(module.to_q)
        module.cross_attention_dim, module.inner_kv_dim = _ends(module.to_k)
        module.out_dim = _ends(module.to_out[0])[1]
        widths = {module.inner_dim, module.inner_kv_dim, _ends(module.to_v)[1], _ends(module.to_out[0])[0]}
        if len(widths) > 1 or module.inner_dim % module.heads:
            raise ValueError(f"layers: {name}: {module.heads} heads cannot share {sorted(widths)} channels")
        module.scale = (module.inner_dim // module.heads) ** -0.5 if module.scale_qk else 1.0
    elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
        module.in_channels, module.inner_dim = _ends(module.proj_in)
        module.out_channels = _ends(module.proj_out)[1]
    elif isinstance(module, ResnetBlock2D):
        module.in_channels, module.out_channels = _ends(module.conv1)
        for resampler in (module.upsample, module.downsample):
            if isinstance(resampler, (Upsample2D, Downsample2D)):
                resampler.channels = resampler.out_channels = module.in_channels
    elif isinstance(module, (Upsample2D, Downsample2D)) and module.use_conv:
        module.channels, module.out_channels = _ends(module.conv if hasattr(module, "conv") else module.Conv2d_0)


def _ends(layer: nn.Module) -> tuple[int, int]:
    """Channels of input and output."""
    if isinstance(layer, nn.Sequential):
        return _ends(layer[0])[0], _ends(layer[-1])[1]
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels
