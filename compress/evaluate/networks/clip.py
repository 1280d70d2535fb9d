"""Embeddings of images and captions by any stock ``CLIPModel``."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from compress.assets import resolve
from compress.errors import UserError
from compress.evaluate.networks.weights import own_preprocessing, weights_hash
from compress.models.quiet import hide_notices, no_load_reports, no_progress_bars

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

AT_ONCE = 256  # captions


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its tokenizer and image processor (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

    Attributes:
        model: In evaluation mode, float32.
        tokenizer: Tokenizer of the captions.
        processor: Image processor on Pillow; the one on torchvision gives other pixels.
        name: Name in reports.
    """

    model: "CLIPModel"
    tokenizer: "CLIPTokenizer"
    processor: "CLIPImageProcessorPil"
    name: str = "CLIP"

    @cached_property
    def sha256(self) -> str:
        """See :func:`compress.evaluate.networks.weights.weights_hash`."""
        return weights_hash(self.model)

    @cached_property
    def preprocessing(self) -> str:
        """See :func:`compress.evaluate.networks.weights.own_preprocessing`."""
        return own_preprocessing(self.processor)

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Embeddings ``(b, d)`` of images, not normalized; see :class:`compress.evaluate.networks.Network`."""
        seen = self.processor(
            images=[image.numpy() for image in images], return_tensors="pt", input_data_format="channels_first"
        )
        # Not get_image_features: its result changed in transformers 5.
        tower = self.model.vision_model(seen["pixel_values"].to(self.model.device))
        return self.model.visual_projection(tower.pooler_output).float().cpu()

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, not normalized.

        Args:
            captions: n captions, truncated to the model's text length. Equal captions are computed once.

        Returns:
            float32, ``(n, d)``, on the CPU.
        """
        distinct = list(dict.fromkeys(captions))
        length = self.model.config.text_config.max_position_embeddings
        batches = []
        for start in range(0, len(distinct), AT_ONCE):
            words = self.tokenizer(
                distinct[start : start + AT_ONCE],
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.model.device)
            tower = self.model.text_model(words.input_ids, words.attention_mask)
            batches.append(self.model.text_projection(tower.pooler_output).float().cpu())
        place = {caption: index for index, caption in enumerate(distinct)}
        return torch.cat(batches)[[place[caption] for caption in captions]]


def load_clip(
    path: str, device: torch.device | str = "cpu", name: str | None = None, key: str = "evaluate.clip"
) -> Clip:
    """Loads a CLIP model from a folder, from the package or from the hub.

    Args:
        path: Folder or hub id.
        device: Where to compute.
        name: Name in reports; None for the path.
        key: The config key of ``path``, for messages.

    Raises:
        UserError: It cannot be loaded.
    """
    hide_notices()
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = Path(resolve(path)).expanduser()
    source = str(folder) if folder.exists() else path
    try:
        with no_progress_bars(), no_load_reports():
            model, info = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        tokenizer = CLIPTokenizer.from_pretrained(source)
        processor = CLIPImageProcessorPil.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{key}={path}: cannot load a CLIP model from it ({error})") from None
    if info["missing_keys"]:
        raise UserError(f"{key}={path}: incomplete CLIP model, {sorted(info['missing_keys'])[0]} is missing")
    _check_words(tokenizer, model, f"{key}={path}")
    return Clip(model.to(device).eval(), tokenizer, processor, name or path)


def _check_words(tokenizer: "CLIPTokenizer", model: "CLIPModel", shown: str) -> None:
    """Refuses the empty tokenizer that transformers makes if its files are missing."""
    cat, dog = (tokenizer(word).input_ids for word in ("cat", "dog"))
    known = model.config.text_config.vocab_size
    if cat == dog or len(tokenizer) > known:
        raise UserError(
            f"{shown}: its tokenizer has {len(tokenizer)} tokens, the model {known}: add the model's tokenizer files, "
            "tokenizer.json or vocab.json and merges.txt"
        )
