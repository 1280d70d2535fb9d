"""The prompts of sampled images: captions of the training data or of a file."""

import random
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.rows import rows
from compress.errors import bad_value
from compress.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from compress.data import Data

KEY = "evaluate.prompts"


def evaluation_prompts(data: "Data", config: EvaluateConfig, n: int, seed: int) -> list[str]:
    """The captions to sample.

    From the data: a random order, repeated when all captions are used. From a file: the first ones in its order,
    repeated if it has fewer. The prompts of a smaller n are the first ones of a larger n.

    Raises:
        UserError: The file cannot be read.
    """
    if config.prompts is not None:
        texts = read_prompts(Path(config.prompts).expanduser())
    else:
        texts = list(data.text)
        random.Random(seed).shuffle(texts)
    return [texts[index % len(texts)] for index in range(n)]


def read_prompts(file: Path) -> list[str]:
    """The column ``text`` of a csv file with a heading, or the same key of each line of a jsonl file.

    Raises:
        UserError: The file cannot be read, is empty, or a row has no text.
    """
    expected = "a readable csv (with a heading) or jsonl file that has text in every row, in the column text"
    try:
        texts = [text for _, (text,) in rows(file, ["text"])]
    except (OSError, ValueError) as error:
        raise bad_value(KEY, file, f"{expected} ({error})") from None
    if not texts:
        raise bad_value(KEY, file, f"{expected}; it has no rows")
    return texts
