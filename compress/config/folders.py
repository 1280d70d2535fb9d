"""Folders of configs, recipes and methods, and the default folder of a run."""

from datetime import datetime
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
NOT_STAGES = ("model", "data", "evaluate", "track", "benchmark")  # groups of conf/ without stages
REPORT, FAILURE = "report.json", "failure.json"  # what a run, and a point of a grid that failed, leaves in its folder
POINTS = "points.json"  # what a report of several runs leaves in its folder
config_dirs: list[Path] = []  # the user's --config-dir; see compress.config.compose.use_config_dir


def default_out(recipe_name: str, begun: datetime | None = None) -> Path:
    """``runs/<recipe>/<time stamp with microseconds>``; ``begun`` is now by default."""
    return Path("runs") / recipe_name / f"{begun or datetime.now():%Y-%m-%d_%H-%M-%S_%f}"


def known_kinds() -> list[str]:
    """Kinds of stages that come with the package: the groups of ``conf/`` that have code of the same name."""
    return sorted(name for name in groups() if (PACKAGE / name / "__init__.py").is_file() and name not in NOT_STAGES)


def known_methods(kind: str) -> list[str]:
    """Methods of a kind: the modules in its folder that declare a ``STAGE``."""
    files = (PACKAGE / kind).glob("*.py")
    return sorted(file.stem for file in files if "\nSTAGE = " in file.read_text(encoding="utf-8"))


def groups() -> list[str]:
    """Config groups of the package and the user, without recipes."""
    found = {file.parent.name for folder in conf_folders() for file in folder.glob("*/*.yaml")}
    return sorted(found - {"recipe", "hydra", "accelerate"})  # the last are files for accelerate launch


def stage_groups() -> list[str]:
    """Config groups of stages, of the package and the user."""
    return [name for name in groups() if name not in NOT_STAGES]


def options(group: str) -> list[str]:
    """The options of a group, perhaps nested such as ``prune/importance``; empty for an unknown group."""
    return sorted({file.stem for folder in conf_folders() for file in (folder / group).glob("*.yaml")})


def conf_folder() -> Path:
    """The config groups: inside an installed package, beside it in a checkout."""
    return _folder("conf")


def conf_folders() -> list[Path]:
    """The package's config groups and the user's."""
    return [conf_folder(), *config_dirs]


def recipe_files() -> dict[str, Path]:
    """The recipes by name, such as ``prune`` or ``ablations/importance_ratio``.

    A user's recipe takes precedence over the package's of that name.
    """
    places = [recipe_folder(), *(folder / "recipe" for folder in config_dirs)]
    return {
        file.relative_to(place).with_suffix("").as_posix(): file
        for place in places
        for file in sorted(place.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    }


def recipe_folder() -> Path:
    """The package's recipes."""
    return _folder("recipes")


def _folder(name: str) -> Path:
    return next(folder for folder in (PACKAGE / name, PACKAGE.parent / name) if folder.is_dir())
