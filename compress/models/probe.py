"""Small seeded inputs for a denoiser, and what its layers do with them."""

from typing import Any

import torch
from torch import nn

PROBE_SIDE = 32  # latents: enough for every level of a UNet, and cheap even for the largest
PROBE_TOKENS = 8


def probe_inputs(denoiser: nn.Module, seed: int = 0) -> dict[str, Any] | None:
    """Inputs of the denoiser's ``forward`` for a batch of 2, the same on every machine.

    Args:
        denoiser: A ``UNet2DConditionModel`` or ``UNet2DModel``, whose config tells the shapes: ``sample`` (2, C, S, S)
            with S at most :data:`PROBE_SIDE`, ``timestep`` (2,) within [1, 501]; of the first also
            ``encoder_hidden_states`` (2, :data:`PROBE_TOKENS`, D), and the extra conditions of SDXL.
        seed: Seed of the normal values.

    Returns:
        Keyword arguments on the denoiser's device and in its dtype, or None if its kind is not known.
    """
    from diffusers import UNet2DConditionModel, UNet2DModel

    if not isinstance(denoiser, (UNet2DConditionModel, UNet2DModel)):
        return None
    config, device, dtype = denoiser.config, denoiser.device, denoiser.dtype
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        return None
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    size = config.sample_size or PROBE_SIDE
    sides = [min(side, PROBE_SIDE) for side in (size if isinstance(size, (list, tuple)) else (size, size))]
    inputs: dict[str, Any] = {
        "sample": normal(2, config.in_channels, *sides),
        "timestep": torch.tensor([1, 501], device=device),
    }
    if isinstance(denoiser, UNet2DModel):
        return inputs
    if config.encoder_hid_dim_type not in (None, "text_proj") or config.addition_embed_type not in (None, "text_time"):
        return None
    width = config.cross_attention_dim
    width = config.encoder_hid_dim or (width[0] if isinstance(width, (list, tuple)) else width)
    inputs["encoder_hidden_states"] = normal(2, PROBE_TOKENS, width)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": normal(2, pooled), "time_ids": normal(2, 6)}
    return inputs


@torch.no_grad()
def probe_output(denoiser: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The denoiser's output (2, C, S, S) on the CPU, computed in evaluation mode."""
    training = denoiser.training
    denoiser.eval()
    try:
        return denoiser(**inputs, return_dict=False)[0].cpu()
    finally:
        denoiser.train(training)


def layer_macs(denoiser: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Multiply-accumulates of a forward pass, by torch's own counter.

    Args:
        denoiser: A denoiser in float weights.
        inputs: What :func:`probe_inputs` gave.

    Returns:
        MACs of every module by name, and of the whole pass with its attention products.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused attention kernels of the CPU are not counted
        probe_output(denoiser, inputs)
    flops = {str(name): sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(denoiser).__name__ + "."
    layers = {name.removeprefix(root): count // 2 for name, count in flops.items() if name.startswith(root)}
    return layers, flops["Global"] // 2
