"""Prints what the denoisers of well-known models weigh under each scheme: ``python benchmarks/quantized_size.py``.

Models are made from their published configs on the meta device, so nothing is downloaded and no weight is needed.
"""

from typing import Any

import diffusers
import torch
from torch import nn

from compress.models.compressed_model import empty_tensors
from compress.quantize.packed import Config, choose_schemes, packing

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5": (
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    ),
    "SDXL": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "PixArt": (
        "PixArtTransformer2DModel",
        {"sample_size": 128, "num_layers": 28, "caption_channels": 4096, "cross_attention_dim": 1152},
    ),
    "SD 3 medium": ("SD3Transformer2DModel", {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}),
    "Flux.1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
}
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "fp8": {"format": "fp8", "bits": 8},
    "int6": {"bits": 6, "granularity": "group", "symmetric": False},
    "int4": {"bits": 4, "granularity": "group", "symmetric": False},
    "nf4": {"format": "nf4", "bits": 4, "granularity": "group"},
    "palette4": {"format": "palette", "bits": 4, "granularity": "tensor"},
    "int3": {"bits": 3, "granularity": "group", "symmetric": False},
    "int2": {"bits": 2, "granularity": "group", "symmetric": False},
}


def model_bytes(model: nn.Module, config: Config) -> int:
    """Bytes of a model's weights under a scheme; what stays in float is counted as fp16."""
    total = sum(2 * parameter.numel() for parameter in model.parameters())
    for name, scheme in choose_schemes(model, config).items():
        weight = model.get_submodule(name).weight
        packed = empty_tensors(weight, packing(scheme)).values()
        total += sum(tensor.numel() * tensor.element_size() for tensor in packed) - 2 * weight.numel()
    return total


def main() -> None:
    """Prints a Markdown table."""
    print("| denoiser | parameters | fp16 | " + " | ".join(SCHEMES) + " |")
    print("|---|---:|---:|" + "---:|" * len(SCHEMES))
    for name, (kind, keys) in MODELS.items():
        with torch.device("meta"):
            model = getattr(diffusers, kind)(**keys)
        params = sum(parameter.numel() for parameter in model.parameters())
        sizes = [model_bytes(model, Config(**scheme)) for scheme in SCHEMES.values()]
        cells = [f"{size / 1e9:.2f} GB ({size / (2 * params):.2f}x)" for size in sizes]
        print(f"| {name} | {params / 1e9:.2f} G | {2 * params / 1e9:.2f} GB | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
