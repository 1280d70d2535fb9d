"""Models of diffusers with layers that a stock config cannot express: of other shapes, or with packed weights.

A checkpoint with such a model carries this file beside the weights, so that diffusers loads it as it loads any other::

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=True)

Nothing but torch, diffusers and transformers is needed. The stock class must not be asked for it, as by
``UNet2DConditionModel.from_pretrained``: that ignores the keys below and may start from random weights after a warning.

``config.json`` holds the keys of the stock class, which describe the model that this one was made from, and two more.

``layers``, of a UNet: the name of every layer that is another now, and what it is::

    Conv2d, Linear  {"in": 320, "out": 256}              channels of its input and output
                    {"in": 320, "out": 256, "rank": 64}  a product of two: "reduce" to 64 channels, which has the kernel
                                                         and the stride but no bias, and "expand" (1x1) to 256
    GroupNorm       {"channels": 256}                    in as many groups as before
    LayerNorm       {"channels": 256}
    Attention       {"heads": 6}                         of equally many channels each; query, key and value have to
                                                         be of one width, that of their layers

Whatever else diffusers derives from the widths (the scale of attention, ``channels`` of an upsampler, ...) is set to
what the layers are.

``packed_layers``, of any model: the name of every Conv2d and Linear with packed weights, and how they are packed::

    {"format": "int", "bits": 4, "granularity": "group", "group_size": 64, "symmetric": false}

A weight of shape (out, in, ...) is seen as ``out`` rows. ``codes`` holds a number of ``bits`` for each weight, and the
weight is (level - zero) * scale. The level is the number itself for ``int`` (less 2^(bits - 1) if ``symmetric``), and
an entry of a table for ``fp8`` (e4m3), ``fp4`` (e2m1) and ``nf4``. ``scale`` is one for the layer (``tensor``), for
each row (``channel``) or for ``group_size`` weights of a row (``group``), and so is ``zero``, which only asymmetric
ones have. The weights of a ``palette`` are entries of ``palette``, which belongs to the layer or to a row. Scales and
zeros are bfloat16 and palettes float32, both stored as integers of as many bits: diffusers would cast floats.
"""

import functools
import inspect
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

MODULE = "compressed_model"  # the name of this file, without .py

Shape = Mapping[str, int]
Packing = Mapping[str, Any]


def _init(
    stock: type[nn.Module], key: str, apply: Callable[[nn.Module, Mapping[str, Any]], None]
) -> Callable[..., None]:
    """The stock constructor with an argument more, in its signature too, where diffusers finds the keys of a config."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        found = kwargs.pop(key, None) or {}
        stock.__init__(self, *args, **kwargs)
        self.register_to_config(**{key: {name: dict(entry) for name, entry in found.items()}})
        self.__module__ = MODULE  # diffusers writes it into model_index.json, wherever this file was imported from
        apply(self, found)

    signature = inspect.signature(stock.__init__)
    added = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None)
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


def _extract_init_dict(stock: type[Any]) -> Any:
    """The stock method, which leaves out what is there for ``AutoModel``."""

    def extract_init_dict(cls: Any, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        config = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return stock.extract_init_dict.__func__(cls, config, **kwargs)

    return classmethod(extract_init_dict)


def _extended(stock: type[Any], prefix: str, key: str, apply: Callable[[nn.Module, Mapping[str, Any]], None]) -> Any:
    """A subclass of a stock class whose config has a key more."""
    parts = {
        "__doc__": f"A ``{stock.__name__}`` whose config has ``{key}``.",
        "__module__": __name__,
        "__init__": _init(stock, key, apply),
        "save_pretrained": _save_pretrained(stock),
        "extract_init_dict": _extract_init_dict(stock),
        "_auto_class": "AutoModel",  # has config.json name this file, for AutoModel.from_pretrained
    }
    return type(prefix + stock.__name__, (stock,), parts)


def _of_transformers(stock: type[Any]) -> Any:
    """A subclass of a model of transformers whose config has ``packed_layers``."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        self.__module__ = MODULE
        pack_layers(self, getattr(config, "packed_layers", {}))

    doc = f"A ``{stock.__name__}`` whose config has ``packed_layers``."
    parts = {"__doc__": doc, "__module__": __name__, "__init__": __init__, "save_pretrained": _save_pretrained(stock)}
    return type(f"Packed{stock.__name__}", (stock,), parts)


def __getattr__(name: str) -> Any:
    """``Packed<Class>`` for any class of model of diffusers, of transformers or of this file."""
    stock = name.removeprefix("Packed")
    found = globals().get(stock) or getattr(diffusers, stock, None) or getattr(transformers, stock, None)
    if name == stock or not isinstance(found, type):
        raise AttributeError(name)
    if issubclass(found, diffusers.ModelMixin):
        globals()[name] = _extended(found, "Packed", "packed_layers", pack_layers)
    else:
        globals()[name] = _of_transformers(found)
    return globals()[name]


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


ShapedUNet2DConditionModel = _extended(UNet2DConditionModel, "Shaped", "layers", reshape)
ShapedUNet2DModel = _extended(UNet2DModel, "Shaped", "layers", reshape)


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


NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def levels(packing: Packing) -> Tensor:
    """The level of each code, ``(2 ** bits,)``, float32; a palette has none."""
    if packing["format"] == "int":
        return torch.arange(2 ** packing["bits"]).float() - (2 ** (packing["bits"] - 1) if packing["symmetric"] else 0)
    if packing["format"] == "fp8":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.tensor({"nf4": NF4, "fp4": FP4}[packing["format"]])


def decode(
    codes: Tensor, packing: Packing, scale: Tensor | None, zero: Tensor | None, palette: Tensor | None
) -> Tensor:
    """Weights, ``(rows, columns)``, float32.

    Args:
        codes: ``(rows, columns)``, uint8.
        packing: As described at the top of this file.
        scale: ``(rows, groups)``, float32; one row and group for the layer; None for a palette.
        zero: Like ``scale``; None if symmetric.
        palette: ``(rows, 2 ** bits)``, float32; one row for the layer.
    """
    if palette is not None:
        return palette.expand(len(codes), -1).gather(1, codes.long())
    assert scale is not None
    weights = levels(packing).to(codes.device)[codes.int()]
    if zero is not None:
        weights -= spread(zero, packing, codes.shape[1])
    return weights.mul_(spread(scale, packing, codes.shape[1]))


def spread(shared: Tensor, packing: Packing, columns: int) -> Tensor:
    """What groups share, ``(rows, groups)``, for each weight: ``(rows, columns)``, or such that it broadcasts to it."""
    if packing["granularity"] != "group":
        return shared
    return shared.repeat_interleave(packing["group_size"], 1)[:, :columns]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 in [0, 2 ** bits), as bytes without gaps: in parts of 8, 4, 2 and 1 bits that add up to ``bits``."""
    parts, shift = [], 0
    for width in _parts(bits):
        part = (codes.flatten() >> shift) & (2**width - 1)
        part = F.pad(part, (0, -part.numel() % (8 // width))).view(-1, 8 // width)
        parts.append((part << torch.arange(0, 8, width, device=codes.device, dtype=torch.uint8)).sum(1).to(torch.uint8))
        shift += width
    return torch.cat(parts)


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of :func:`pack`."""
    codes, start, shift = torch.zeros(count, dtype=torch.uint8, device=data.device), 0, 0
    for width in _parts(bits):
        part = data[start : (start := start + _bytes(count, width)), None]
        part = (part >> torch.arange(0, 8, width, device=data.device, dtype=torch.uint8)) & (2**width - 1)
        codes |= part.flatten()[:count] << shift
        shift += width
    return codes


def _parts(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def _bytes(count: int, width: int) -> int:
    return -(-count * width // 8)


class _Packed(nn.Module):
    """What layers with packed weights have in common."""

    packing: Packing
    codes: Tensor
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """As the float layer's, in the dtype of the bias; made anew each time."""
        return self.dequantize().to(torch.float32 if self.bias is None else self.bias.dtype)

    def dequantize(self) -> Tensor:
        """The weight, ``(out, in, ...)``, float32."""
        rows, columns = self.shape[0], self.shape[1:].numel()
        codes = unpack(self.codes, self.packing["bits"], rows * columns).view(rows, columns)
        return decode(codes, self.packing, *map(self.scales, ("scale", "zero", "palette"))).view(self.shape)

    def scales(self, name: str) -> Tensor | None:
        """``scale``, ``zero`` or ``palette`` as float32; None if there is none."""
        tensor = getattr(self, name, None)
        kinds = {torch.int16: torch.bfloat16, torch.int32: torch.float32}
        return None if tensor is None else tensor.view(kinds[tensor.dtype]).float()

    @property
    def shape(self) -> torch.Size:
        """Of the weight: ``(out, in)``, or ``(out, in / groups, height, width)``."""
        if isinstance(self, nn.Linear):
            return torch.Size((self.out_features, self.in_features))
        assert isinstance(self, nn.Conv2d)
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))


class PackedLinear(_Packed, nn.Linear):
    """A Linear that unpacks its weight at every call."""

    def forward(self, input: Tensor) -> Tensor:
        """As a Linear's."""
        return F.linear(input, self.dequantize().to(input.dtype), self.bias)


class PackedConv2d(_Packed, nn.Conv2d):
    """A Conv2d that unpacks its weight at every call."""

    def forward(self, input: Tensor) -> Tensor:
        """As a Conv2d's."""
        return self._conv_forward(input, self.dequantize().to(input.dtype), self.bias)


def pack_layer(layer: nn.Module, packing: Packing, tensors: Mapping[str, Tensor]) -> None:
    """Makes a float layer, in place, one with packed weights.

    Args:
        layer: A Conv2d or Linear.
        packing: As described at the top of this file.
        tensors: ``codes``, ``scale``, ``zero`` and ``palette`` as they are stored, those that there are.

    Raises:
        ValueError: The layer is neither.
    """
    kinds = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}
    if type(layer) not in kinds:
        raise ValueError(f"{type(layer).__name__}: a Conv2d and a Linear can be packed")
    layer.register_parameter("weight", None)
    del layer.weight
    layer.__class__ = kinds[type(layer)]
    layer.packing = dict(packing)
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor)


def stored(tensor: Tensor) -> Tensor:
    """Floats as the integers that they are stored as: bfloat16 as int16, float32 as int32."""
    return tensor.view({torch.bfloat16: torch.int16, torch.float32: torch.int32}[tensor.dtype])


def pack_layers(model: nn.Module, packings: Mapping[str, Packing]) -> None:
    """Replaces the weights of layers by empty packed ones, for loading.

    Raises:
        ValueError: For a name that does not fit the model.
    """
    modules = dict(model.named_modules())
    for name, packing in packings.items():
        if name not in modules:
            raise ValueError(f"packed_layers: {name} is no module of this {type(model).__name__}")
        weight = modules[name].weight
        pack_layer(modules[name], packing, empty_tensors(weight, packing))


def empty_tensors(weight: Any, packing: Packing) -> dict[str, Tensor]:
    """The tensors of a layer, of the right shapes and without values."""
    rows, columns = len(weight), weight[0].numel()
    if packing["granularity"] == "tensor":
        shared = (1, 1)
    else:
        shared = (rows, -(-columns // packing["group_size"]) if packing["granularity"] == "group" else 1)
    sizes = sum(_bytes(rows * columns, width) for width in _parts(packing["bits"]))
    tensors = {"codes": torch.empty(sizes, dtype=torch.uint8, device=weight.device)}
    if packing["format"] == "palette":
        shape = (shared[0], 2 ** packing["bits"])
        return tensors | {"palette": torch.empty(shape, dtype=torch.int32, device=weight.device)}
    for name in ("scale",) if packing["symmetric"] else ("scale", "zero"):
        tensors[name] = torch.empty(shared, dtype=torch.int16, device=weight.device)
    return tensors
