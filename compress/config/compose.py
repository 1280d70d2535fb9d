"""Composition by Hydra: recipes as a group, and Hydra's errors in one sentence."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from compress.config.folders import conf_folder, known_kinds, recipe_files
from compress.config.values import nearest, unknown_key
from compress.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def register_recipes() -> None:
    """Makes every file in ``recipes/`` an option of Hydra's group ``recipe``."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for name, file in recipe_files().items():
        ConfigStore.instance().store(group="recipe", name=name, node=OmegaConf.load(file), package="_global_")


def compose(overrides: list[str]) -> "DictConfig":
    """Composes a config in this process, as the command line would.

    Args:
        overrides: ``["recipe=prune", "stages.prune.ratio=0.4"]``.

    Raises:
        UserError: An unknown recipe, option or key, or an override that cannot be read.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    overrides = place_choices(quoted(overrides))
    try:
        return _compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides)) from error


def quoted(overrides: list[str]) -> list[str]:
    """Puts quotes around values that Hydra cannot read without, such as names of folders with an umlaut or a bracket.

    Values that begin as a list, a dictionary or a quoted text stay, so that a mistake in one is named.

    Args:
        overrides: As on the command line.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, found = OverridesParser.create(), []
    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            parser.parse_override(override)
        except HydraException:
            if equals and value[:1] not in "[{('\"":
                escaped = value.replace("\\", "\\\\").replace('"', '\\"')
                override = f'{key}="{escaped}"'
        found.append(override)
    return found


def place_choices(overrides: list[str]) -> list[str]:
    """Says for every choice of a stage's method that it is meant for the stage of that kind's name.

    ``prune=taylor`` becomes ``prune@stages.prune=taylor``, and ``prune/importance=l1`` becomes
    ``prune/importance@stages.prune.importance=l1``; all else stays.

    Args:
        overrides: As on the command line.
    """
    return [_placed(override) for override in overrides]


def _placed(override: str) -> str:
    key, equals, value = override.partition("=")
    kind = key.partition("/")[0]
    if not equals or "@" in key or kind not in known_kinds() or not (conf_folder() / key).is_dir():
        return override
    return f"{key}@stages.{key.replace('/', '.')}={value}"


def explain(error: Exception, overrides: list[str]) -> str:
    """One of Hydra's or OmegaConf's errors in a sentence that names the key and what would be right.

    Args:
        error: What Hydra raised for ``overrides``.
        overrides: Used to find the keys there are.
    """
    from hydra.errors import MissingConfigException, OverrideParseException

    text = str(error)
    if isinstance(error, OverrideParseException):
        reason = " ".join(line.strip() for line in text.splitlines() if line.strip() and set(line.strip()) != {"^"})
        return f"{error.override}: cannot be read as key=value ({reason})"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return _no_option(group, option, list(error.options))
    if match := re.match(r"You must specify '(\w+)'", text):
        return f"{match[1]} is missing: give {match[1]}=NAME, one of {', '.join(recipe_files())}"
    if match := re.match(r"Could not (?:override|append|delete)[^']*'([^']+)'", text):
        return _no_key(match[1], overrides)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _compose(overrides: list[str]) -> "DictConfig":
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_recipes()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3", job_name="compress"):
        return hydra_compose("config", overrides=overrides)


def _no_option(group: str, option: str, options: list[str]) -> str:
    hint = {
        "model": "; a folder or hub id is given as model.path=...",
        "data": "; a file, folder or hub id is given as data.path=...",
    }.get(group, "")
    return f"{group}={option}: no such {group}{nearest(option, options)}; known: {', '.join(options)}{hint}"


def _no_key(key: str, overrides: list[str]) -> str:
    """Names the keys there are where ``key`` was looked for."""
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, _, place = key.partition("@")
    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()} | {"recipe"}
    if key.partition("/")[0] in known_kinds():
        return _no_stage(key, place, overrides)
    choices = [override for override in overrides if override.partition("=")[0].partition("@")[0] in groups]
    try:
        node = _compose(choices)
    except (HydraException, OmegaConfBaseException):
        return f"{key}: no such key"
    path, *rest = key.split(".")
    above: list[str] = []
    for part in [path, *rest]:
        if part not in node:
            return unknown_key(".".join(above), part, [str(known) for known in node])
        above.append(part)
        child = OmegaConf.select(node, part)
        if not isinstance(child, DictConfig):
            break
        node = child
    return f"{key}: cannot be set like this; {'.'.join(above)} is a value"


def _no_stage(key: str, place: str, overrides: list[str]) -> str:
    """Says that the recipe has no such stage, or the stage no such choice, and which there are."""
    kind, _, choice = key.partition("/")
    given = next((o for o in overrides if o.partition("=")[0].partition("@")[0].lstrip("+~") == key), key)
    if not (conf_folder() / key).is_dir():
        known = sorted(folder.name for folder in (conf_folder() / kind).iterdir() if folder.is_dir())
        return f"{given}: no such choice{nearest(choice, known)}; of {kind} there are {', '.join(known) or 'none'}"
    stages = _stages(kind, overrides)
    name = place.split(".")[1] if place.startswith("stages.") else kind
    if name in stages:
        chosen = stages[name]
        return f"{given}: stages.{name} ({chosen.kind}={chosen.method}) has no choice of {key}"
    has = f"the recipe's stages are {', '.join(stages)}" if stages else "the recipe has no stages"
    return (
        f"{given}: {has}, and none is named {name}: choose a stage's method with {kind}@stages.NAME=..., and "
        f"add a stage with +{kind}@stages.NAME=..."
    )


def _stages(kind: str, overrides: list[str]) -> "DictConfig":
    """The stages of the recipe, with methods of ``kind`` as they were chosen where that is possible."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    recipe = [override for override in overrides if override.startswith("recipe=")]
    methods = [override for override in overrides if override.lstrip("+").startswith(f"{kind}@stages.")]
    for chosen in (recipe + methods, recipe):
        try:
            return _compose(chosen).stages
        except (HydraException, OmegaConfBaseException):
            continue
    return OmegaConf.create()


def sentence(recipe: Path) -> str:
    """What a recipe says about itself: the comment in its first line."""
    with recipe.open(encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").strip()
