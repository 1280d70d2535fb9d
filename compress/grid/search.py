"""A search by Optuna's own interface (its plugin for Hydra is of an older Optuna)."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.compose import quoted
from compress.config.folders import default_out
from compress.config.values import build
from compress.errors import UserError, bad_value
from compress.grid.points import folder_name
from compress.grid.sweep import (
    Point,
    check_point,
    compose_point,
    given_params,
    launch,
    refuse_points,
    refuse_processes,
    report,
    say,
    say_times,
    summarize,
    use_folder,
)
from compress.run.objective import SearchObjective, read_report

if TYPE_CHECKING:
    import optuna
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext
    from omegaconf import DictConfig

VIOLATIONS = "violations"


def run_search(
    config: "DictConfig", context: "HydraContext", arguments: Sequence[str], launcher: "Callable[[], Launcher]"
) -> list[Point]:
    """Tries points, prints the best one and a summary; arguments as :func:`compress.grid.sweep.run_grid`.

    A trial that fails, measures nothing or breaks a bound counts for the sampler as such. The store has what earlier
    trials computed. A storage is continued by the same recipe with the same values, space and objective.

    Raises:
        UserError: There is no objective, nothing varies, something would be published, Optuna is not installed, or
            there are several processes.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    refuse_processes()
    try:
        import optuna
    except ImportError as error:
        raise UserError("hydra/sweeper=optuna: needs the package optuna: pip install 'compress[optuna]'") from error
    if config.get("objective") is None:
        raise UserError(
            "objective=null: a search needs one, such as objective='{minimize: bytes, subject_to: {fid: 125}}'"
        )
    objective = build(SearchObjective, OmegaConf.to_container(config.objective, resolve=True), "objective")
    settings, begun = config.hydra.sweeper, time.time()
    parser = OverridesParser.create(config_loader=context.config_loader)
    parsed = parser.parse_overrides([*given_params(config), *arguments])
    last = {override.get_key_element(): override for override in parsed}
    space = {
        key: _distribution(override, OmegaConf.select(config, key))
        for key, override in last.items()
        if override.is_sweep_override()
    }
    if not space:
        raise UserError("hydra/sweeper=optuna: no key varies; give one values such as seed=0,1 or x=interval(0.1,0.5)")
    if "publish" in space or config.get("publish"):
        raise UserError("publish: every trial of a search would be published: publish the best one by a run of its own")
    fixed = [f"{k}={o.get_value_element_as_str()}" for k, o in last.items() if k not in space and k != "out"]
    out = last["out"].value() if "out" in last else None
    folder = Path(str(out)) if out else default_out(str(config.recipe_name), datetime.now())
    use_folder(config, folder)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials, seed = _whole("n_trials", settings.n_trials, 1), settings.seed
    sampler = optuna.samplers.TPESampler(
        seed=None if seed is None else _whole("seed", seed, 0),
        constraints_func=lambda trial: trial.user_attrs.get(VIOLATIONS, [1.0]),
    )
    try:
        study = optuna.create_study(
            study_name=_study_name(config, space, fixed),
            storage=settings.storage,
            load_if_exists=True,
            direction="minimize" if objective.minimize else "maximize",
            sampler=sampler,
        )
    except Exception as error:  # of SQLAlchemy, which comes with Optuna, or of a driver of its databases
        why = str(error).splitlines()[0]
        expected = f"null or the address of a database, such as sqlite:///search.db ({why})"
        raise bad_value("hydra.sweeper.storage", settings.storage, expected) from error
    tried: dict[Path, Point] = {}
    running = launcher()
    for number in range(1, trials + 1):
        trial = study.ask(space)
        varies = [f"{key}={value}" for key, value in trial.params.items()]
        point = Point(number, [*fixed, *varies], varies, folder / folder_name(varies))
        best, again = _best(study, objective), point.out in tried
        say(f"\n[{number}/{trials}] {point.name}", "tried before" * again, best and f"best so far: {best}")
        if again:
            point = tried[point.out]
        else:
            tried[point.out] = point
            point.overrides += quoted([f"out={point.out}"])
            if (cfg := compose_point(point, config, context.config_loader)) is not None:
                check_point(point, cfg, {})
            if point.code is None:
                launch([point], running)
            else:
                refuse_points([point], trials)
        value = None if point.code else _measured(point, trial, objective)
        ended = optuna.trial.TrialState.FAIL if point.code else optuna.trial.TrialState.PRUNED
        study.tell(trial, value, state=ended if value is None else None)
    points = list(tried.values())
    summarize(points, folder)
    if trials > len(points):
        say(f"trials      {trials}, of {len(points)} different points")
    report([point.config for point in points if point.config and not point.code], points, folder)
    say_times(points, begun, one_by_one=True)
    say(f"best        {_best(study, objective) or 'no trial keeps to the bounds'}")
    return points


def _whole(key: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise bad_value(f"hydra.sweeper.{key}", value, f"a whole number of at least {least}")
    return value


def _measured(point: Point, trial: "optuna.Trial", objective: SearchObjective) -> float | None:
    """The objective of a trial, its bounds noted in it; None if it ended early or, with a message, lacks a number."""
    try:
        measured = read_report(point.out)
        if measured.get("stopped"):
            return None
        trial.set_user_attr(VIOLATIONS, objective.violations(measured))
        return objective.value(measured)
    except UserError as error:
        point.message, point.code = str(error), 2
        refuse_points([point], 0)
        return None


def _study_name(config: "DictConfig", space: dict[str, Any], fixed: Sequence[str]) -> str:
    """The same for searches that may continue one another."""
    what = [{key: repr(of) for key, of in space.items()}, sorted(fixed), str(config.objective)]
    return f"{config.recipe_name}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]}"


def _best(study: "optuna.Study", objective: SearchObjective) -> str:
    """The best trial that keeps to all bounds, as text; empty if there is none."""
    done = [trial for trial in study.trials if trial.value is not None]
    kept = [trial for trial in done if max(trial.user_attrs[VIOLATIONS], default=0) <= 0]
    if not kept:
        return ""
    best = (min if objective.minimize else max)(kept, key=lambda trial: trial.value or 0.0)
    values = " ".join(f"{key}={value}" for key, value in best.params.items())
    return f"{objective.minimize or objective.maximize} {best.value:.6g} with {values}"


def _distribution(override: Any, default: Any) -> "optuna.distributions.BaseDistribution":
    """Optuna's distribution of a sweep: choices, ranges and intervals.

    Args:
        override: Of Hydra, whose ``interval(1,8)`` has ends of float.
        default: The key's own value; an interval of a key that is an integer is one of integers.
    """
    import optuna
    from hydra.core.override_parser.types import IntervalSweep

    value = override.value()
    if not isinstance(value, IntervalSweep):
        return optuna.distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
    low, high, log = value.start or 0, value.end or 0, "log" in value.tags
    whole = isinstance(default, int) and not isinstance(default, bool)
    if whole or (isinstance(low, int) and isinstance(high, int)):
        return optuna.distributions.IntDistribution(int(low), int(high), log=log)
    return optuna.distributions.FloatDistribution(float(low), float(high), log=log)
