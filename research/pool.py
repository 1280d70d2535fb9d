"""Real features to draw from: a large pool of images, seen through Inception and CLIP once, and their captions.

``embedded`` stands for the training images of the embedded model that are not in its reference, two of each: turned
by up to 8 degrees, shifted by up to 4 px, blurred by up to 1.5 px and with another hue, as a generator's images are
not quite right. The network ``stored`` stands for the Inception features of training images that come with the
embedded data, without any network: 256 to compare with, 512 to draw from. Anything else is a folder of images.
"""

import csv
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageFilter

from compress.data import Data, DataConfig, load_data
from compress.data.white import on_white
from compress.errors import UserError
from compress.evaluate.captions import read_captions
from compress.evaluate.config import EvaluateConfig
from compress.evaluate.images import image_files
from compress.evaluate.networks import OF_INCEPTION, Networks
from compress.evaluate.reference import data_reference, folder_reference
from compress.system.progress import track

EMBEDDED = "embedded"
DATA = DataConfig(
    "embedded:emoji/emoji.parquet", split_column="split", reference="embedded:emoji/inception.safetensors"
)
SIZE = (64, 64)
VIEWS = 2  # of every embedded image
WHITE = (255, 255, 255)
OF_REFERENCE = 256  # of the stored features


@dataclass(frozen=True)
class Pool:
    """Features of N images and of a reference.

    Attributes:
        images: float32 ``(N, d)`` by network, ``"inception"`` and ``"clip"``.
        reference: float32 ``(m, d)`` by the same networks.
        texts: Embeddings of the captions, ``(N, d)``; None without captions.
        ids: Which distinct caption each image has, ``(N,)``.
    """

    images: dict[str, torch.Tensor]
    reference: dict[str, torch.Tensor]
    texts: torch.Tensor | None
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)


def load(
    images: str, reference: str | None, captions: str | None, cache: Path, clip: str | None, network: str, most: int
) -> Pool:
    """The pool of a folder, or the embedded one.

    Args:
        images: Folder, or ``"embedded"``.
        reference: Folder of the images to compare with; not with ``"embedded"``, which has its own.
        captions: File with ``file_name`` and ``text``; not with ``"embedded"``.
        cache: Folder that keeps the features, and the embedded pool's images.
        clip: Folder or hub id of the CLIP model; None is emoji-clip.
        network: ``"inception"``, ``"clip"`` for the CLIP model alone, which is far quicker, or ``"stored"``.
        most: How many images of the embedded pool, a random choice of them.

    Raises:
        UserError: A folder or file is missing or wrong.
    """
    if network == "stored":
        return _stored()
    config = EvaluateConfig(reference_images=None, leave_out=OF_INCEPTION if network == "clip" else ())
    if clip is not None:
        config = replace(config, clip=clip)
    networks = Networks(config)
    if images == EMBEDDED:
        if reference is not None or captions is not None:
            raise UserError("--images embedded has a reference and captions of its own: leave both out")
        data = load_data(DATA)
        real = data_reference(data, replace(config, reference_images=768), SIZE, networks, cache)
        folder = cache / f"images-{most}"
        captions = str(_draw(data, folder, most))
    elif reference is None:
        raise UserError("--images DIR needs --reference DIR, the images to compare with")
    else:
        folder = Path(images).expanduser()
        real = folder_reference(reference, config, networks, cache, key="--reference")
    found = folder_reference(folder, config, networks, cache, key="--images")
    texts, ids = None, torch.arange(len(found.features["clip"]))
    if captions is not None:
        names = [file.relative_to(folder).as_posix() for file in image_files(folder, "--images")]
        written = read_captions(captions, names, "--captions")
        numbers = {text: number for number, text in enumerate(dict.fromkeys(written))}
        ids = torch.tensor([numbers[text] for text in written])
        texts = networks.clip.text(list(numbers))[ids]
    return Pool(found.features, real.features, texts, ids)


def _stored() -> Pool:
    """The Inception features that come with the embedded data: some to compare with, the others to draw from."""
    from safetensors.torch import load_file

    features = load_file(load_data(DATA).reference or "")["features"].float()
    return Pool(
        {"inception": features[OF_REFERENCE:]},
        {"inception": features[:OF_REFERENCE]},
        None,
        torch.arange(len(features) - OF_REFERENCE),
    )


def _draw(data: Data, folder: Path, most: int) -> Path:
    """Writes the embedded pool's images, if they are not there; returns the file of their captions."""
    from safetensors import safe_open

    written = folder / "captions.csv"
    if written.is_file():
        return written
    with safe_open(Path(data.reference or ""), "pt") as file:
        used = set(file.get_tensor("indices").tolist())
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(index, view) for index in range(len(data.text)) if index not in used for view in range(VIEWS)]
    rows = sorted(random.Random(0).sample(rows, min(most, len(rows))))
    captions = []
    for index, view in track(rows, f"drawing {len(rows)} images"):
        name = f"{index:05d}-{view}.png"
        image = on_white(data.train[index]["image"]).resize(SIZE[::-1], Image.Resampling.LANCZOS)
        _changed(image, random.Random(VIEWS * index + view)).save(folder / name)
        captions.append((name, data.text[index]))
    with written.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("file_name", "text"), *captions])
    return written


def _changed(image: Image.Image, chance: random.Random) -> Image.Image:
    """An image turned, shifted, blurred and with another hue, all a little."""
    shift = (chance.randint(-4, 4), chance.randint(-4, 4))
    image = image.rotate(chance.uniform(-8, 8), Image.Resampling.BICUBIC, translate=shift, fillcolor=WHITE)
    image = image.filter(ImageFilter.GaussianBlur(chance.uniform(0, 1.5)))
    hue, saturation, value = image.convert("HSV").split()
    turn = chance.randint(-20, 20)
    return Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), saturation, value)).convert("RGB")
