"""What pictures are sampled of: captions of the training data, or a file's."""

import csv
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError, bad_value
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
    expected = "a readable csv (with a heading) or jsonl file that has text in every row"
    try:
        content = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() in (".jsonl", ".json"):
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(content.splitlines(keepends=True)))
    except (OSError, ValueError, csv.Error) as error:
        raise bad_value(KEY, file, f"{expected} ({error})") from None
    if not rows:
        raise bad_value(KEY, file, f"{expected}; it has no rows")
    texts = [row.get("text") if isinstance(row, dict) else None for row in rows]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{KEY}={file}: row {number} has no text; expected {expected}, in the column text")
    return texts  # type: ignore[return-value]
