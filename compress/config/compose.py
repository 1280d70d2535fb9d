"""Composition by Hydra: recipes as a group, and Hydra's errors in one sentence."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config import folders
from compress.config.folders import conf_folder, groups, options, recipe_files, recipe_folder, stage_groups
from compress.config.values import nearest, unknown_key
from compress.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


# Launchers by the name of Hydra's choice, with the packages that bring them.
LAUNCHERS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
RECIPE = "recipe@_global_"  # Hydra's name for the choice of a recipe


def register_recipes() -> None:
    """Registers every file in ``recipes/`` as an option of Hydra's group ``recipe``."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for name, file in recipe_files().items():
        *above, stem = ["recipe", *name.split("/")]
        if recipe_folder() in file.parents:
            store.store(group="/".join(above), name=stem, node=OmegaConf.load(file))
        else:  # Hydra finds the user's recipe itself and would treat a registered one of that name as its schema
            group: Any = store.repo
            for part in above:
                group = group.get(part, {})
            group.pop(f"{stem}.yaml", None)


def use_config_dir(folder: str | None) -> None:
    """Uses the groups and recipes in a user's folder, in place of an earlier one.

    Args:
        folder: Holds ``recipe/*.yaml`` and groups such as ``prune/*.yaml``; None: no folder.

    Raises:
        UserError: The folder does not exist, or one of its options has a name that the package uses.
    """
    folders.config_dirs.clear()
    if folder is None:
        return
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")
    for file in conf_folder().rglob("*.yaml"):
        name = file.relative_to(conf_folder())
        if (path / name).is_file():
            raise UserError(
                f"{path / name}: the package already has {name.with_suffix('')} and would use that one: rename yours"
            )
    folders.config_dirs.append(path)


def compose(overrides: list[str], config_dir: str | None = None) -> "DictConfig":
    """Composes a config in this process, as the command line would.

    Args:
        overrides: ``["recipe=prune", "stages.prune.ratio=0.4"]``.
        config_dir: A folder with the user's recipes and groups.

    Raises:
        UserError: An unknown recipe, option or key, or an override that cannot be read.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    use_config_dir(config_dir)
    overrides = place_choices(quoted(overrides))
    try:
        return _compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides)) from error


def option(group: str, name: str) -> dict[str, Any]:
    """The values of one option of a config group, such as ``prune`` and ``magnitude``.

    A name with a dot is a user's method: a module without a file of values.

    Raises:
        UserError: There is no such option.
    """
    from omegaconf import OmegaConf

    if "." in name:
        return {"kind": group, "method": name}
    if name not in options(group):
        raise UserError(_no_option(group, name, options(group)))
    chosen: Any = OmegaConf.to_container(compose([f"+{group}@chosen={name}", "recipe=prune"]).chosen, resolve=True)
    return chosen


def quoted(overrides: list[str]) -> list[str]:
    """Quotes values that Hydra cannot read unquoted, such as folder names with an umlaut or a bracket.

    Values that begin like a list, a dictionary or a quoted text stay, so that a mistake in one is reported.

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
                override = f"{key}={_in_quotes(value)}"
        found.append(override)
    return found


def _in_quotes(value: str) -> str:
    """A value as text that Hydra reads as it is: a backslash escapes quotes, and itself before quotes alone."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value) + '"'


def place_choices(overrides: list[str]) -> list[str]:
    """Adds Hydra's package to choices of a stage's method and of the recipe.

    ``prune=taylor`` becomes ``prune@stages.prune=taylor``, and ``prune/importance=l1`` becomes
    ``prune/importance@stages.prune.importance=l1``. ``recipe=prune`` becomes ``recipe@_global_=prune``, so that a
    recipe needs no ``# @package _global_``; a recipe given as a file is registered. All else stays.

    Args:
        overrides: As on the command line.

    Raises:
        UserError: A recipe's file is missing or cannot be read.
    """
    return [_placed(override) for override in overrides]


def leave_to_points(overrides: list[str], multirun: bool) -> list[str]:
    """Hands the fixed keys of a stage whose choice varies to the sweeper, where this is a grid.

    Hydra composes a grid once with the recipe's own choice, and would refuse a key that only other choices have.

    Args:
        overrides: As :func:`place_choices` returns them.
        multirun: Whether the command line asks for a grid; a recipe can, too.

    Raises:
        HydraException: An override cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    recipe = _hydra_of_recipe(overrides)
    modes = [word.partition("=")[2] for word in overrides if word.startswith("hydra.mode=")]
    if not multirun and [recipe.get("mode"), *modes][-1] != "MULTIRUN":
        return overrides
    params = [f"{key}={value}" for key, value in ((recipe.get("sweeper") or {}).get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*params, *overrides])
    last = {override.get_key_element(): override for override in parsed}  # a later one replaces that of a recipe
    varied = [key for key, override in last.items() if override.is_sweep_override()]
    stages = [r"\w+"] * (RECIPE in varied) + re.findall(r"@stages\.(\w+)", " ".join(varied))
    theirs = re.compile(rf"([\w/]+@)?stages\.({'|'.join(stages)})\.")
    fixed = {
        key: value
        for key, _, value in (override.partition("=") for override in overrides)
        if theirs.match(key) and key not in varied
    }
    if not fixed:
        return overrides
    values = ", ".join(f"{key}: {_in_quotes(value)}" for key, value in fixed.items())
    rest = [override for override in overrides if override.partition("=")[0] not in fixed]
    return [*rest, f"++hydra.sweeper.params={{{values}}}"]


def _hydra_of_recipe(overrides: list[str]) -> dict[str, Any]:
    """What the chosen recipe itself sets of Hydra's config; nothing if there is no such recipe, or several."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    name = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith(f"{RECIPE}=")), "")
    registered: Any = ConfigStore.instance().repo.get("recipe", {}).get(f"{name}.yaml")
    file = recipe_files().get(name)
    node = OmegaConf.load(file) if file else registered.node if registered else OmegaConf.create()
    tree: Any = OmegaConf.to_container(node)
    return (tree.get("hydra") if isinstance(tree, dict) else None) or {}


def _placed(override: str) -> str:
    key, equals, value = override.partition("=")
    if key == "recipe" and equals:
        return f"{RECIPE}={','.join(_recipe(name) for name in value.split(','))}"
    kind = key.partition("/")[0]
    if not equals or "@" in key or kind not in stage_groups() or not options(key):
        return override
    return f"{key}@stages.{key.replace('/', '.')}={value}"


def _recipe(value: str) -> str:
    """The name of a recipe; a file is registered under its name."""
    text = value.strip("'\"")
    if ("/" not in text or text in recipe_files()) and not text.endswith((".yaml", ".yml")):
        return value
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf

    file = Path(text).expanduser().absolute()
    if not file.is_file():
        found = "this is a folder" if file.is_dir() else "no such file"
        raise UserError(f"recipe={text}: {found}; a recipe is a YAML file or one of {', '.join(recipe_files())}")
    try:
        node = OmegaConf.load(file)
    except Exception as error:  # noqa: BLE001 - from YAML's parser, the encoding or OmegaConf
        raise UserError(f"recipe={text}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"recipe={text}: expected a YAML file of keys and values")
    name = re.sub(r"\W", "_", file.stem)
    if name in recipe_files():
        name += f"_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    ConfigStore.instance().store(group="recipe", name=name, node=node)
    return name


def explain(error: Exception, overrides: list[str]) -> str:
    """An error of Hydra or OmegaConf as one sentence that names the key and what would be right.

    Args:
        error: Raised by Hydra for ``overrides``.
        overrides: Used to find the existing keys.
    """
    from hydra.errors import MissingConfigException, OverrideParseException

    text = str(error)
    if isinstance(error, OverrideParseException):
        reason = " ".join(line.strip() for line in text.splitlines() if line.strip() and set(line.strip()) != {"^"})
        if "=" not in str(error.override):
            return f"{error.override}: expected KEY=VALUE"
        return f"{error.override}: cannot be read as key=value ({reason})"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group.startswith("recipe"):
            return _no_option("recipe", error.missing_cfg_file.removeprefix("recipe/"), list(recipe_files()))
        if group == "hydra/launcher" and option in LAUNCHERS:
            extra = option.partition("_")[0]
            return f"{group}={option}: needs the package {LAUNCHERS[option]}: pip install 'compress[{extra}]'"
        return _no_option(group, option, list(error.options))
    if match := re.match(r"You must specify '(\w+)[@']", text):
        meant = [word for word in overrides if nearest(word.partition("=")[0], [match[1]])]
        if meant:
            return f"{meant[0]}: no such key{nearest(meant[0].partition('=')[0], [match[1]])}"
        return f"{match[1]} is missing: give {match[1]}=NAME, one of {', '.join(recipe_files())}"
    if match := re.match(r"Could not (?:override|append|delete)[^']*'([^']+)'", text):
        return _no_hydra_key(match[1], overrides) if match[1].startswith("hydra.") else _no_key(match[1], overrides)
    if match := re.match(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = match[1].partition("=")
        return f"{match[1]}: add -m to run each value, or write {key}=[{value}] for a list"
    if match := re.match(r"Error merging override (.+)", text):
        return f"{match[1]}: {str(error.__cause__ or 'not possible').splitlines()[0]}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _compose(overrides: list[str], with_hydra: bool = False) -> "DictConfig":
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_recipes()
    GlobalHydra.instance().clear()
    own = ",".join(f"'file://{folder}'" for folder in folders.config_dirs)
    search = [f"hydra.searchpath=[{own}]"] if own else []
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3", job_name="compress"):
        return hydra_compose("config", overrides=[*overrides, *search], return_hydra_config=with_hydra)


def _no_option(group: str, option: str, options: list[str]) -> str:
    hint = {
        "model": "; a folder or hub id is given as model.path=...",
        "data": "; a file, folder or hub id is given as data.path=...",
    }.get(group, "")
    return f"{group}={option}: no such {group}{nearest(option, options)}; known: {', '.join(options)}{hint}"


def _no_key(key: str, overrides: list[str]) -> str:
    """The message for an unknown key, with the known keys at its place."""
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, _, place = key.partition("@")
    if key.partition("/")[0] in stage_groups():
        return _no_stage(key, place, overrides)
    known = {*groups(), "recipe"}
    choices = [override for override in overrides if override.partition("=")[0].partition("@")[0] in known]
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
    else:
        return f"{key}: keys are added to it with a plus: '+{key}={{name: value}}', or '+{key}.name=value'"
    return f"{key}: cannot be set like this; {'.'.join(above)} is a value"


def _no_hydra_key(key: str, overrides: list[str]) -> str:
    """The message for an unknown key of Hydra's own config, with the known keys at its place."""
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    choices = [override for override in overrides if re.match(r"hydra/|recipe\b", override)]
    try:
        tree = _compose(choices, with_hydra=True)
    except (HydraException, OmegaConfBaseException):
        return f"{key}: no such key"
    path, _, last = key.rpartition(".")
    while not isinstance(node := OmegaConf.select(tree, path), DictConfig):
        path, _, last = path.rpartition(".")
    known = [str(name) for name in node if not str(name).startswith("_")]
    chosen = tree.hydra.runtime.choices.get(path.replace(".", "/"))
    of = f" of {path.replace('.', '/')}={chosen}" if chosen else ""
    return f"{key}: no such key{of}{nearest(last, known)}; known: {', '.join(known) or 'none'}"


def _no_stage(key: str, place: str, overrides: list[str]) -> str:
    """The message for an unknown stage or choice, with the known ones."""
    kind, _, choice = key.partition("/")
    given = next((o for o in overrides if o.partition("=")[0].partition("@")[0].lstrip("+~") == key), key)
    if not options(key):
        inside = (folder / kind for folder in folders.conf_folders() if (folder / kind).is_dir())
        known = sorted(path.name for folder in inside for path in folder.iterdir() if path.is_dir())
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
    """The stages of the recipe, with the chosen methods of ``kind`` where possible."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    recipe = [override for override in overrides if override.startswith(f"{RECIPE}=")]
    methods = [override for override in overrides if override.lstrip("+").startswith(f"{kind}@stages.")]
    for chosen in (recipe + methods, recipe):
        try:
            return _compose(chosen).stages
        except (HydraException, OmegaConfBaseException):
            continue
    return OmegaConf.create()


def sentence(recipe: Path) -> str:
    """A recipe's description: the comment in its first line."""
    with recipe.open(encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").strip()
