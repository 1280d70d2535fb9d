"""``recipe=prune_sensitivity``: the error when each level, block or head loses a share of channels, and a plan."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from compress.config.values import PRECISIONS
from compress.errors import UserError, bad_value
from compress.system.files import replace_with, write_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from compress.prune.sensitivity.blocks import Measured
    from compress.run.config import RunConfig, StageConfig


def run_job(cfg: "DictConfig") -> None:
    """Measures what a composed config describes; writes ``sensitivity.json`` and ``heat_map.png``; prints the plan.

    Raises:
        UserError: The user made a mistake; raised before a weight is loaded where possible.
    """
    from rich.console import Console

    from compress.jobs.sensitivity.figure import draw_heat_map
    from compress.run import output, preflight
    from compress.run.config import to_run_config
    from compress.store import Store
    from compress.store.uses import key_inside, using

    config = to_run_config(cfg)
    stage = _stage(config)
    preflight.check(config)
    store = Store(config.store)
    with using(store, config.out, config.recipe_name, key_inside(store, config.model.path)):
        result = measure(config, stage)
    config.out.mkdir(parents=True, exist_ok=True)
    output.write_config(config)
    write_text(config.out / "sensitivity.json", json.dumps(result, indent=2) + "\n")
    with replace_with(config.out / "heat_map.png") as file:
        draw_heat_map({title: result[title] for title in ("levels", "blocks", "heads")}, file)
    _print_end(Console(), result, config, stage)


def _stage(config: "RunConfig") -> "StageConfig":
    from compress.prune.width import Config

    stages = [stage for stage in config.stages if isinstance(stage.config, Config)]
    if len(stages) != 1 or len(config.stages) != 1:
        named = ", ".join(f"{stage.name} ({stage.kind}={stage.method})" for stage in config.stages)
        raise UserError(f"stages: job prune_sensitivity needs one stage of method width; this recipe has {named}")
    return stages[0]


def measure(config: "RunConfig", stage: "StageConfig") -> dict[str, Any]:
    """Measures levels, blocks and heads and plans for the stage's target.

    Returns:
        ``levels``, ``blocks`` and ``heads``, each a list of ``name`` and ``points`` (``ratio``, ``relative``,
        ``psnr``); ``plan`` (``target``, ``widths``, ``ratios``, ``left``, ``predicted`` and, pruned so, ``measured``);
        and what was measured with.

    Raises:
        UserError: The denoiser cannot be narrowed, or no widths meet the target.
    """
    import torch

    import compress.data
    import compress.models
    from compress.data.calibration import calibrate
    from compress.prune.importance import make_scorer
    from compress.prune.sensitivity.blocks import inner_groups, measure_blocks, measure_heads
    from compress.prune.sensitivity.error import UnchangedPrediction
    from compress.prune.width import make_planner, pruner
    from compress.system import processes

    wanted = stage.config
    if not wanted.planned:
        raise bad_value(f"stages.{stage.name}.target", "null", "a share of params, macs, bytes or latency to plan for")
    dtype = getattr(torch, PRECISIONS[config.precision])
    pipeline = compress.models.load_teacher(config.model, processes.join(config.device), dtype)
    unet: Any = compress.models.denoiser(pipeline)
    planner = make_planner(pipeline, wanted)
    assert planner is not None
    data = compress.data.load_data(config.data)
    calibration = calibrate(pipeline, data.train, wanted.calibration, config.seed)
    scorer = make_scorer(wanted.importance, calibration, config.seed)
    reference = UnchangedPrediction(calibration)
    ratios = wanted.sensitivity.ratios
    groups = inner_groups(unet)
    prune = pruner(unet, wanted, scorer)
    plan = planner.plan(prune, reference, ratios)
    by_level: Measured = {}
    for found in plan.measured:
        name = f"level {found.level} ({planner.full[found.level]} wide)"
        by_level.setdefault(name, {})[found.ratio] = found.error
    about = {key: value for key, value in asdict(plan).items() if key != "measured"}
    return {
        "model": config.model.path,
        "importance": asdict(wanted.importance),
        "examples": calibration.source,
        "seed": config.seed,
        "levels": _rows(by_level),
        "blocks": _rows(measure_blocks(unet, groups, scorer, reference, ratios)),
        "heads": _rows(measure_heads(unet, groups, scorer, reference, ratios)),
        "plan": {
            "target": asdict(wanted.target),
            **about,
            "measured": asdict(reference.error(prune(plan.ratios).unet)),
        },
    }


def _rows(measured: "Measured") -> list[dict[str, Any]]:
    return [
        {"name": name, "points": [{"ratio": ratio, **asdict(error)} for ratio, error in sorted(points.items())]}
        for name, points in measured.items()
    ]


def _print_end(console: Any, result: dict[str, Any], config: "RunConfig", stage: "StageConfig") -> None:
    from rich.table import Table

    rows = [row for kind in ("levels", "blocks", "heads") for row in result[kind]]
    table = Table(box=None)
    table.add_column("part", overflow="fold")
    table.add_column("share removed and PSNR of the prediction (dB)", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], "  ".join(f"{point['ratio']:.0%} {point['psnr']:.1f}" for point in row["points"]))
    plan, (unit, share) = result["plan"], stage.config.target.goal
    ratios = ",".join(f"{ratio:.4g}" for ratio in plan["ratios"])
    console.print(table)
    console.print(
        f"plan for {unit} {share:g}: widths {', '.join(map(str, plan['widths']))}, {plan['left']:.3f} left; relative "
        f"error of the prediction {plan['predicted']:.3f} predicted, {plan['measured']['relative']:.3f} measured"
    )
    console.print(f"  recipe=prune stages.{stage.name}.ratio=[{ratios}]", markup=False)
    console.print(f"  {config.out / 'heat_map.png'}  {config.out / 'sensitivity.json'}", markup=False)
