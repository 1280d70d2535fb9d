"""What images are sampled of: captions of the training data, or a file's."""

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

    Of the data a random choice without repetition until all have been used once; of a file of prompts the first ones in
    its order, again from the start where it has fewer. The choice of a smaller n is the beginning of a larger one's.

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
