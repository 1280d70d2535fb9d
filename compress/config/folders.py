"""Where configs, recipes and methods are, and the folders that runs write to."""

from datetime import datetime
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
NOT_STAGES = ("model", "data", "evaluate", "track", "pretrain", "benchmark")  # groups of conf/ that hold no stage


def default_out(recipe_name: str, begun: datetime | None = None) -> Path:
    """``runs/<recipe>/<time stamp with microseconds>``, of now where no time is given."""
    return Path("runs") / recipe_name / f"{begun or datetime.now():%Y-%m-%d_%H-%M-%S_%f}"


def known_kinds() -> list[str]:
    """Kinds of stages: the groups of ``conf/`` that have code of the same name."""
    return sorted(
        group.name
        for group in conf_folder().iterdir()
        if group.is_dir() and group.name not in NOT_STAGES and (PACKAGE / group.name / "__init__.py").is_file()
    )


def known_methods(kind: str) -> list[str]:
    """Methods of a kind: the modules in its folder that declare a ``STAGE``."""
    files = (PACKAGE / kind).glob("*.py")
    return sorted(file.stem for file in files if "\nSTAGE = " in file.read_text(encoding="utf-8"))


def conf_folder() -> Path:
    """The config groups: inside an installed package, beside it in a checkout."""
    return _folder("conf")


def recipe_files() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted(_folder("recipes").glob("*.yaml"))}


def _folder(name: str) -> Path:
    return next(folder for folder in (PACKAGE / name, PACKAGE.parent / name) if folder.is_dir())
