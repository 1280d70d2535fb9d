"""Small stand-ins for data, the CLIP model and the Inception network."""

from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from compress.data import Data
from tests.tiny import seeded, tiny_tokenizer


def tiny_data(n: int = 12, side: int = 16) -> Data:
    """Random images with different captions, the first one wider than high and with an alpha channel."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(n)]
    images[0] = images[0].resize((2 * side, side)).convert("RGBA")
    text = [f"a red cat {index}" for index in range(n)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return Data(datasets.Dataset.from_dict({"image": images, "text": text}, features), text, "fingerprint", None)


def tiny_clip(folder: Path) -> str:
    """Saves a CLIP model with random weights that sees 16 px images."""
    tokenizer = tiny_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**size, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": 1}
    vision = {**size, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    with seeded(3):
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return str(folder)


class TinyInception(torch.nn.Module):
    """Random features of images of any size, in place of the network that takes 0.1 s an image."""

    num_features = 24
    name = "tiny-inception"
    sha256 = "0" * 64

    def __init__(self, path: str = "auto", device: str = "cpu", resize: str = "tensorflow1") -> None:
        super().__init__()
        self.preprocessing = resize
        with seeded(5):
            self.layer = torch.nn.Linear(3 * 16, self.num_features)

    @torch.no_grad()
    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """From uint8 ``(n, 3, height, width)``, or n of ``(3, height, width)``, to ``(n, 24)``."""
        small = [torch.nn.functional.adaptive_avg_pool2d(image / 255, 4).flatten() for image in images]
        return self.layer(torch.stack(small)).relu()
