"""``python -m compress``: runs a recipe, or prints the help."""

import os
import sys

import compress
from compress.config.compose import (
    explain,
    leave_to_points,
    place_choices,
    quoted,
    register_recipes,
    sentence,
    use_config_dir,
)
from compress.config.folders import NOT_STAGES, conf_folder, groups, options, recipe_files
from compress.errors import UserError
from compress.grid import job
from compress.grid.job import refuse

USAGE = """\
python -m compress recipe=NAME [KEY=VALUE ...]

Makes a text-to-image diffusion model smaller and faster, and measures what that cost.

Recipes
{recipes}

Ablations: recipes that are grids
{ablations}

Choices, as GROUP=OPTION
{groups}

Any other key is set by its path
  stages.prune.ratio=0.4 stages.distill.steps=80    a stage's own keys
  prune=taylor  prune=bk_sdm_small                  another choice for the stage of that name
  ~stages.distill                                   leaves a stage out
  model.path=/some/pipeline  model.path=owner/name  another model: a local folder or a hub id
  data.path=/some/images                            other images with captions
  seed=1  device=cuda  precision=bf16               device: auto, cpu, cuda, cuda:N, mps; precision: fp32, bf16, fp16
  out=DIR  store=DIR                                the folder of this run; checkpoints shared by runs

Examples
  python -m compress recipe=prune_distill_int8
  python -m compress recipe=prune_distill_int8 stages.prune.ratio=0.4 track=none evaluate=cost
  python -m compress recipe=prune_distill_int8 stages.prune.ratio=0.25,0.5 --multirun    one run after the other
  accelerate launch --multi_gpu --num_processes 2 -m compress recipe=prune_distill_int8
  python -m compress recipe=score images=DIR reference=DIR out=DIR     scores existing images
  python -m compress recipe=report runs='runs/prune/*'                 one page for many runs
  python -m compress recipe=benchmark limit.psnr_db=30                 finds the fastest way to run a pipeline
  python -m compress store                                             lists what the store holds; store --help

Options
  --config-dir DIR  your own recipes (DIR/recipe/*.yaml) and choices (DIR/prune/*.yaml, ...); recipe=FILE.yaml works too
  --cfg job         prints the composed config with all keys and runs nothing
  --info defaults   prints where each part of it comes from
  --multirun, -m    runs every combination of values given as a,b,c, each in a folder named after its values
  --version         the version of compress
  --hydra-help      further options, of Hydra
  --help, -h        this text

A run that was interrupted continues when the same command is given again.
"""


def usage() -> str:
    """The help text, with the recipes and config groups that are there."""
    width = max(map(len, recipe_files()), default=0)
    recipes, ablations = (
        "\n".join(
            f"  {name:{width}}  {sentence(file)}" for name, file in recipe_files().items() if ("/" in name) is grid
        )
        for grid in (False, True)
    )
    choices = {name: options(name) for name in groups()}
    # A stage's options are chosen under the name the recipe gives the stage.
    names = {name: name if name in NOT_STAGES else f"{name}@stages.NAME" for name in choices}
    room = max(map(len, names.values()), default=0)
    return USAGE.format(
        recipes=recipes,
        ablations=ablations,
        groups="\n".join(f"  {names[name]:{room}}  {', '.join(found)}" for name, found in choices.items() if found),
    )


def main() -> int:
    """Runs the command line; returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C, 1 for anything else."""
    arguments = sys.argv[1:]
    try:
        use_config_dir(_config_dir(arguments))
    except UserError as error:
        return refuse(str(error))
    if not arguments or (arguments[0] != "store" and {"-h", "--help"} & set(arguments)):
        print(usage(), end="")
        return 0
    if arguments[0] == "store":
        return _store(arguments[1:])
    if "--version" in arguments:
        print(f"compress {compress.__version__}")
        return 0
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    words = [word for word in arguments if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    try:
        overrides = place_choices(quoted(words))
    except UserError as error:
        return refuse(str(error))
    flags = [word for word in arguments if word not in words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of printing them
    job.arguments[:], job.codes[:] = arguments, []
    try:
        register_recipes()
        of_grid = leave_to_points(overrides, multirun=bool({"-m", "--multirun"} & set(flags)))
        sys.argv[1:] = of_grid + flags  # Hydra wants options last
        hydra.main(version_base="1.3", config_path=str(conf_folder().resolve()), config_name="config")(job.run)()
    except UserError as error:
        return refuse(str(error))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return refuse(explain(error, overrides))
    except KeyboardInterrupt:
        return 130
    return 1 if 1 in job.codes else max(job.codes, default=0)


def _config_dir(arguments: list[str]) -> str | None:
    """The folder that ``--config-dir`` names."""
    for word, following in zip(arguments, [*arguments, None][1:], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            return value if equals else following
    return None


def _store(arguments: list[str]) -> int:
    """The command ``store``."""
    from compress.store import command

    try:
        return command.main(arguments)
    except UserError as error:
        return refuse(str(error))
    except OSError as error:
        return refuse(f"{error.filename or 'store'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130


def entry() -> None:
    """The command ``compress``."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
