"""Inputs for a denoiser where there is no data for it."""

from typing import Any

import torch

from compress.errors import UserError
from compress.models.probe import PROBE_SIDE, probe_inputs

TOKENS = 77  # of a text


def random_inputs(model: Any, count: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Normal latents ``(count, c, h, w)``, of at most the probe's size, and conditions of as many rows.

    Args:
        model: The denoiser.
        count: How many examples.
        seed: Of the normal values.

    Raises:
        UserError: It is not known what the denoiser takes.
    """
    batches = [_probe(model, seed + index) for index in range(-(-count // 2))]
    inputs = _stacked(batches, count)
    del inputs["timestep"]
    return inputs.pop("sample").float(), inputs


def full_size(model: Any) -> dict[str, Any]:
    """Keyword arguments for one example of the model's own size, with a text of usual length; values do not matter.

    Raises:
        UserError: It is not known what the denoiser takes.
    """
    inputs = _stacked([_probe(model, 0)], 1)
    size = model.config.sample_size or PROBE_SIDE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    inputs["sample"] = torch.empty(1, model.config.in_channels, height, width)
    if "encoder_hidden_states" in inputs:
        inputs["encoder_hidden_states"] = torch.empty(1, TOKENS, inputs["encoder_hidden_states"].shape[-1])
    return inputs


def _probe(model: Any, seed: int) -> dict[str, Any]:
    from diffusers import UNet2DModel

    inputs = probe_inputs(model, seed)
    if inputs is not None:
        return inputs
    if not isinstance(model, UNet2DModel) or model.config.class_embed_type or model.config.num_class_embeds:
        raise UserError(f"it is not known what a {type(model).__name__} of this config takes besides latents")
    size = model.config.sample_size or PROBE_SIDE
    sides = [min(side, PROBE_SIDE) for side in (size if isinstance(size, (list, tuple)) else (size, size))]
    generator = torch.Generator("cpu").manual_seed(seed)
    sample = torch.randn(2, model.config.in_channels, *sides, generator=generator)
    return {"sample": sample.to(model.device, model.dtype), "timestep": torch.tensor([1, 501], device=model.device)}


def _stacked(batches: list[Any], count: int) -> Any:
    """Several nested dictionaries of tensors as one, the first ``count`` rows."""
    if isinstance(batches[0], dict):
        return {key: _stacked([batch[key] for batch in batches], count) for key in batches[0]}
    return torch.cat(batches)[:count]
