"""Files inside the package: the embedded model, its data and its networks for evaluation."""

from pathlib import Path

PREFIX = "embedded:"


def resolve(path: str) -> str:
    """Turns ``"embedded:emoji/pipeline"`` into the absolute path of that file or folder; other paths stay."""
    if path.startswith(PREFIX):
        return str(Path(__file__).parent / path.removeprefix(PREFIX))
    return path
