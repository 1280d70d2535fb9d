"""Any image encoder of transformers, for Fréchet and kernel distances of its features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from compress.assets import resolve
from compress.errors import UserError
from compress.evaluate.networks.weights import own_preprocessing, weights_hash
from compress.models.quiet import hide_notices, no_load_reports, no_progress_bars


class Encoder:
    """One feature vector an image, by what the model is.

    A model with a projection (``CLIPModel``, ``CLIPVisionModelWithProjection``) gives the projected embedding, a model
    with a trained pooler (CLIP, SigLIP, DINOv2, ConvNeXt) the pooler's output, any other model the class token.

    Args:
        path: Folder or hub id.
        device: Where to compute.
        key: The config key of ``path``, for messages.

    Raises:
        UserError: There is no such model, weights are missing, it is not an image encoder, or it is not deterministic.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu", key: str = "evaluate.encoders") -> None:
        hide_notices()
        from transformers import AutoImageProcessor

        folder = Path(resolve(path)).expanduser()
        source = str(folder) if folder.exists() else path
        self.name = path
        try:
            with no_progress_bars(), no_load_reports():
                model, info = _model_class(source).from_pretrained(
                    source, dtype=torch.float32, output_loading_info=True
                )
            # On Pillow: the processor on torchvision gives other pixels.
            self.processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{key}={path}: cannot load an image encoder from it ({error})") from None
        missing = {name for name in info["missing_keys"] if name.partition(".")[0] not in ("pooler", "text_model")}
        if missing:
            raise UserError(f"{key}={path}: incomplete image encoder, {min(missing)} is missing")
        self.pooled = not any(name.startswith("pooler") for name in info["missing_keys"])
        self.model = model.to(device).eval()
        if self.model.main_input_name != "pixel_values" and not hasattr(self.model, "vision_model"):
            raise UserError(f"{key}={path}: expected an image encoder, not a {type(model).__name__}")
        self.sha256 = weights_hash(self.model)
        self.preprocessing = own_preprocessing(self.processor)
        self._check_steady(f"{key}={path}")

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Features ``(b, d)``; see :class:`compress.evaluate.networks.Network`."""
        seen = self.processor(
            images=[image.numpy() for image in images], return_tensors="pt", input_data_format="channels_first"
        )
        pixels = seen["pixel_values"].to(self.model.device)
        if hasattr(self.model, "visual_projection"):
            projected = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
            return projected.float().cpu()
        tower: Any = getattr(self.model, "vision_model", self.model)
        output = tower(pixels)
        pooled = getattr(output, "pooler_output", None) if self.pooled else None
        features = output.last_hidden_state[:, 0] if pooled is None else pooled
        return features.flatten(1).float().cpu()

    def _check_steady(self, shown: str) -> None:
        """Refuses a model that is random in evaluation mode, such as one that masks parts of an image."""
        image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        first, again = self(image), self(image)
        if not torch.allclose(first, again, rtol=0, atol=1e-3 * float(first.abs().max())):  # beyond a GPU's rounding
            kind = type(self.model).__name__
            raise UserError(f"{shown}: expected a deterministic encoder, but {kind} gives random features")


def _model_class(source: str) -> Any:
    """The class that loads the model with its projection, if it has one."""
    import transformers
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(source)
    named = (config.architectures or [""])[0]
    return getattr(transformers, named) if named.endswith("VisionModelWithProjection") else AutoModel
