"""Where configs, recipes and methods are, and the folders that runs write to."""

from datetime import datetime
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
NOT_STAGES = ("model", "data", "evaluate", "track", "benchmark")  # groups of conf/ that hold no stage
config_dirs: list[Path] = []  # the user's, of --config-dir; see compress.config.compose.use_config_dir


def default_out(recipe_name: str, begun: datetime | None = None) -> Path:
    """``runs/<recipe>/<time stamp with microseconds>``, of now where no time is given."""
    return Path("runs") / recipe_name / f"{begun or datetime.now():%Y-%m-%d_%H-%M-%S_%f}"


def known_kinds() -> list[str]:
    """Kinds of stages that come with the package: the groups of ``conf/`` that have code of the same name."""
    return sorted(name for name in groups() if (PACKAGE / name / "__init__.py").is_file() and name not in NOT_STAGES)


def known_methods(kind: str) -> list[str]:
    """Methods of a kind: the modules in its folder that declare a ``STAGE``."""
    files = (PACKAGE / kind).glob("*.py")
    return sorted(file.stem for file in files if "\nSTAGE = " in file.read_text(encoding="utf-8"))


def groups() -> list[str]:
    """Config groups, those of the user among them, without recipes."""
    found = {file.parent.name for folder in conf_folders() for file in folder.glob("*/*.yaml")}
    return sorted(found - {"recipe", "hydra"})


def stage_groups() -> list[str]:
    """Config groups that hold methods of stages: the package's, and those that the user added."""
    return [name for name in groups() if name not in NOT_STAGES]


def options(group: str) -> list[str]:
    """The options of a group, or of a group in a group such as ``prune/importance``; empty where there is none."""
    return sorted({file.stem for folder in conf_folders() for file in (folder / group).glob("*.yaml")})


def conf_folder() -> Path:
    """The config groups: inside an installed package, beside it in a checkout."""
    return _folder("conf")


def conf_folders() -> list[Path]:
    """The package's config groups and the user's."""
    return [conf_folder(), *config_dirs]


def recipe_files() -> dict[str, Path]:
    """The recipes by name: those that come with the package, and the user's, which count where both have a name."""
    own = [file for folder in config_dirs for file in sorted((folder / "recipe").glob("*.yaml"))]
    return {file.stem: file for file in [*sorted(_folder("recipes").glob("*.yaml")), *own]}


def _folder(name: str) -> Path:
    return next(folder for folder in (PACKAGE / name, PACKAGE.parent / name) if folder.is_dir())
