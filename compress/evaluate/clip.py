"""The CLIP score of pictures and their captions, with any stock ``CLIPModel``."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.assets import resolve
from compress.errors import UserError
from compress.models.quiet import hide_notices, no_progress_bars
from compress.progress import track

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


@dataclass(frozen=True)
class Clip:
    """A CLIP model with what prepares its input.

    Attributes:
        model: In evaluation mode, float32.
        tokenizer: Of its captions.
        processor: Of its pictures; always the one on Pillow, since the one on torchvision gives other pixels.
    """

    model: "CLIPModel"
    tokenizer: "CLIPTokenizer"
    processor: "CLIPImageProcessorPil"

    @property
    def sha256(self) -> str:
        """A hash of the names and float32 values of all weights, the same whichever file they came from."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_clip(path: str, device: torch.device | str = "cpu") -> Clip:
    """Loads a CLIP model from a folder, the package or the hub.

    Raises:
        UserError: It cannot be loaded.
    """
    hide_notices()
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = Path(resolve(path)).expanduser()
    source = str(folder) if folder.exists() else path
    try:
        with no_progress_bars():
            model = CLIPModel.from_pretrained(source, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(source)
        processor = CLIPImageProcessorPil.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"evaluate.clip={path}: no CLIP model can be loaded from there ({error})") from None
    return Clip(model.to(device).eval(), tokenizer, processor)


@torch.no_grad()
def clip_scores(pictures: torch.Tensor, captions: Sequence[str], clip: Clip, batch_size: int) -> torch.Tensor:
    """100 max(cos, 0) of each picture's and its caption's embedding.

    Hessel et al. 2021, https://arxiv.org/abs/2104.08718, with the factor 100 that is usual instead of their 2.5.

    Args:
        pictures: uint8 RGB, ``(n, 3, height, width)``.
        captions: n captions; cut where they are longer than the model's text.
        clip: The network.
        batch_size: Pairs at once.

    Returns:
        float64, ``(n,)``, in [0, 100].
    """
    model, device = clip.model, clip.model.device
    length = model.config.text_config.max_position_embeddings
    scores = []
    for start in track(range(0, len(pictures), batch_size), f"CLIP scores of {len(pictures)} pictures"):
        chosen = slice(start, start + batch_size)
        text = clip.tokenizer(
            list(captions[chosen]), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(device)
        seen = clip.processor(
            images=list(pictures[chosen].numpy()), return_tensors="pt", input_data_format="channels_first"
        )
        # The towers and projections directly: what get_image_features returns changed in transformers 5.
        image = model.visual_projection(model.vision_model(seen["pixel_values"].to(device)).pooler_output)
        words = model.text_projection(model.text_model(text.input_ids, text.attention_mask).pooler_output)
        scores.append(100 * torch.nn.functional.cosine_similarity(image, words).clamp(min=0).double().cpu())
    return torch.cat(scores)
