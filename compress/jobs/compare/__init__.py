"""``recipe=compare_quantization``: stages that are alternatives, each from the teacher, in one table."""

from dataclasses import replace
from pathlib import Path
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
    merged = merge(results, config.recipe_name, config.out) | {"refused": refused}
    grids = pictures(results, config.out)
    compress.report.write_page(config.out, compress.report.write_report(config.out, merged, grids))
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


def merge(results: dict[str, dict[str, Any]], recipe: str, out: Path) -> dict[str, Any]:
    """One report: the teacher of the first, the stages of all, each followed by its row in an engine, if it has one."""
    first = next(iter(results.values()))
    rows = []
    for result in results.values():
        rows += result["stages"]
        if "accelerated" in result:
            rows.append({"kind": "engine", **result["accelerated"]})
    kept = {key: value for key, value in first.items() if key not in ("accelerated", "checkpoint", "wall_seconds")}
    times = {key: sum(result[key] for result in results.values()) for key in ("seconds", "computed_seconds")}
    return kept | {"recipe": recipe, "out": str(out), "stages": rows} | times


def pictures(results: dict[str, dict[str, Any]], out: Path) -> dict[str, list[dict[str, Any]]]:
    """The images of the teacher and of every row, as the runs in ``out`` left them."""
    from PIL import Image

    from compress.report.images import file_name

    found: dict[str, list[dict[str, Any]]] = {}
    for stage, result in results.items():
        for row in ("teacher", *(r["name"] for r in (*result["stages"], result.get("accelerated")) if r)):
            files = [out / stage / "images" / file_name(row) / f"{i}.png" for i in range(len(result.get("grid") or ()))]
            if row not in found and files and all(file.is_file() for file in files):
                cells = zip(result["grid"], files, strict=True)
                found[row] = [{**cell, "image": Image.open(file).convert("RGB")} for cell, file in cells]
    return found
