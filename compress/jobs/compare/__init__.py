"""``recipe=compare_quantization``: stages that are alternatives, each from the teacher, in one table."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from compress.run.config import RunConfig


def run_job(cfg: "DictConfig") -> None:
    """Runs each stage of a composed config on the teacher alone; writes one report for all of them.

    A stage that cannot run here, such as one whose package is missing, costs its row alone. What the stages share (the
    teacher's evaluation) is computed once, and what is in the store is not computed again.

    Raises:
        UserError: The user made a mistake, or no stage could run.
    """
    from rich.console import Console

    import compress.report
    from compress.run import output
    from compress.run.config import to_run_config

    config = to_run_config(cfg, alternatives=True)
    results, refused = run_each(config)
    if not results:
        raise UserError("\n".join(f"{name}: {why}" for name, why in refused.items()))
    output.write_config(config)
    merged = merge(results, config.recipe_name) | {"refused": refused}
    compress.report.write_page(config.out, compress.report.write_report(config.out, merged, {}))
    console = Console()
    compress.report.print_summary(merged, console)
    for name, why in refused.items():
        console.print(f"{name}: not run: {why}", markup=False, soft_wrap=True)
    console.print(f"  {config.out / 'report.md'}", markup=False, soft_wrap=True)


def run_each(config: "RunConfig") -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Runs each stage as a recipe of its own, into a folder of its name.

    Returns:
        Name of a stage to its report, and to the reason of those that cannot run.
    """
    from compress.run.recipe import run_recipe

    results, refused = {}, {}
    for stage in config.stages:
        recipe = f"{config.recipe_name}_{stage.name}"
        alone = replace(config, recipe_name=recipe, stages=(stage,), out=config.out / stage.name)
        try:
            results[stage.name] = run_recipe(alone)
        except UserError as error:
            refused[stage.name] = str(error)
    return results, refused


def merge(results: dict[str, dict[str, Any]], recipe: str) -> dict[str, Any]:
    """One report: the teacher of the first, the stages of all, each followed by its row in an engine, if it has one."""
    first = next(iter(results.values()))
    rows = []
    for result in results.values():
        rows += result["stages"]
        if "accelerated" in result:
            rows.append({"kind": "engine", **result["accelerated"]})
    seconds = sum(result["seconds"] for result in results.values())
    kept = {key: value for key, value in first.items() if key not in ("accelerated", "checkpoint", "wall_seconds")}
    return kept | {"recipe": recipe, "stages": rows, "seconds": seconds}
