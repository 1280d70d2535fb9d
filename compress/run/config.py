"""Checks a composed config and makes it a frozen :class:`RunConfig`; ``DictConfig`` ends here."""

import dataclasses
import importlib
import os
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.folders import NOT_STAGES, default_out, known_kinds, known_methods
from compress.config.values import PRECISIONS, build, nearest, unknown_key
from compress.errors import UserError, bad_value
from compress.runtime import ENGINES
from compress.stage import Stage

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from compress.data import DataConfig
    from compress.evaluate import EvaluateConfig
    from compress.models import ModelConfig
    from compress.run.objective import SearchObjective
    from compress.track import TrackConfig


@dataclass(frozen=True)
class StageConfig:
    """One stage of a recipe.

    Attributes:
        name: Its key under ``stages``.
        kind: Folder of its method: ``prune``, ``distill``, ``quantize``, ...; a user's method may have any.
        method: Module in that folder, or a user's: ``my_package.my_stage``.
        config: The method's ``Config``.
    """

    name: str
    kind: str
    method: str
    config: Any

    @property
    def module(self) -> types.ModuleType:
        """The method's module."""
        return importlib.import_module(module_name(self.kind, self.method))

    @property
    def declared(self) -> Stage:
        """The method's ``STAGE``."""
        return self.module.STAGE

    def explain(self, error: UserError) -> UserError:
        """A method's error with the stage's name, and with the full key if the message begins with one."""
        own = str(error).partition("=")[0].partition(".")[0] in dataclasses.asdict(self.config)
        return UserError(f"stages.{self.name}{'.' if own else ': '}{error}")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    Attributes:
        recipe_name: Name of the recipe.
        model: The teacher.
        data: Images and captions.
        stages: In the order they run.
        evaluate: What is measured.
        track: Where curves and numbers go besides the report.
        seed: Of everything random, in [0, 2^32).
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        engine: What runs the last checkpoint in a row of its own, see :mod:`compress.runtime`; None: no such row.
        publish: Repository on the Hugging Face Hub for the last checkpoint, ``owner/name``; None: none.
        objective: Of a search, which may also end a run early; None: none.
        out: Folder of the run.
        store: Folder of checkpoints and evaluations.
    """

    recipe_name: str
    model: "ModelConfig"
    data: "DataConfig"
    stages: tuple[StageConfig, ...]
    evaluate: "EvaluateConfig"
    track: "TrackConfig"
    seed: int
    device: str
    precision: str
    engine: str | None
    publish: str | None
    objective: "SearchObjective | None"
    out: Path
    store: Path


@dataclass(frozen=True)
class Settings:
    """The top-level keys outside of the groups."""

    recipe_name: str
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    engine: str | None = None
    publish: str | None = None
    out: str | None = None
    store: str = "runs/store"
    job: str = "run"
    order: list[str] | None = None
    objective: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise bad_value("seed", self.seed, "a whole number from 0 to 2^32 - 1")
        check_device_name(self.device)
        if self.precision not in PRECISIONS:
            raise bad_value("precision", self.precision, " or ".join(PRECISIONS))
        if self.engine not in (None, "auto", *ENGINES):
            raise bad_value("engine", self.engine, f"one of {', '.join(('auto', *ENGINES))}, or null")
        if self.publish is not None:
            from compress.track.hub import check_name

            check_name(self.publish)
        for key in ("out", "store", "recipe_name"):
            if getattr(self, key) == "":
                raise bad_value(key, "", "a name, not an empty one")


def check_device_name(device: str) -> None:
    """Checks the form of a device's name.

    Raises:
        UserError: It is not auto, cpu, cuda, cuda:N or mps.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (":" in device and (kind != "cuda" or not index.isdigit())):
        raise bad_value("device", device, "auto, cpu, cuda, cuda:N or mps")


def to_run_config(cfg: "DictConfig", alternatives: bool = False) -> RunConfig:
    """Checks a composed config and makes it a :class:`RunConfig`.

    Args:
        cfg: With all its keys.
        alternatives: Whether each stage starts from the teacher, so that their order says nothing.

    Raises:
        UserError: An unknown key or method, a value of the wrong type or out of range, or an impossible order of
            stages.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(tree, dict)
    names = [field.name for field in dataclasses.fields(Settings)]
    groups = (*NOT_STAGES, "stages")
    for key in tree:
        if key not in names and key not in groups:
            raise UserError(unknown_key("", str(key), [*names, *groups]))
    settings = build(Settings, {key: value for key, value in tree.items() if key in names}, "")

    from compress.data import DataConfig
    from compress.evaluate import EvaluateConfig
    from compress.models import ModelConfig
    from compress.track import TrackConfig

    stages = _in_order(_stages(tree.get("stages")), settings.order)
    evaluate = build(EvaluateConfig, tree.get("evaluate"), "evaluate")
    if not alternatives:
        check_order(stages)
    return RunConfig(
        recipe_name=settings.recipe_name,
        model=build(ModelConfig, tree.get("model"), "model"),
        data=build(DataConfig, tree.get("data"), "data"),
        stages=stages,
        evaluate=evaluate,
        track=build(TrackConfig, tree.get("track"), "track"),
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
        engine=settings.engine,
        publish=settings.publish,
        objective=_objective(settings.objective, list(tree["stages"]), evaluate),
        out=Path(settings.out) if settings.out else default_out(settings.recipe_name),
        store=Path(settings.store),
    )


def _objective(
    values: dict[str, Any] | None, stages: list[str], evaluate: "EvaluateConfig"
) -> "SearchObjective | None":
    from compress.run.objective import SearchObjective

    if values is None:
        return None
    found = build(SearchObjective, values, "objective")
    found.check(stages, evaluate)
    return found


def check_order(stages: tuple[StageConfig, ...]) -> None:
    """Refuses a stage that needs float weights after one that leaves none, any stage after an artifact, and a training
    for any number of steps after one for few.

    Raises:
        UserError: Naming both stages.
    """
    last: StageConfig | None = None
    few: StageConfig | None = None
    for stage in stages:
        if few is not None and stage.declared.any_steps:
            raise UserError(
                f"stages.{stage.name} ({stage.kind}={stage.method}) would undo the few steps that stages.{few.name} "
                f"({few.kind}={few.method}) before it trains for: move stages.{stage.name} before it"
            )
        few = stage if stage.declared.few_steps else few
        left = last.declared.leaves if last is not None else "float"
        if left == "artifact" or (left == "quantized" and stage.declared.needs == "float"):
            assert last is not None
            needs, leaves = ("a model", "an artifact") if left == "artifact" else ("float weights", "none")
            raise UserError(
                f"stages.{stage.name} ({stage.kind}={stage.method}) needs {needs}, but stages.{last.name} "
                f"({last.kind}={last.method}) before it leaves {leaves}: move stages.{stage.name} before it"
            )
        if stage.declared.leaves != "float":
            last = stage


def _stages(tree: Any) -> tuple[StageConfig, ...]:
    if not isinstance(tree, dict):
        raise bad_value("stages", tree, "a mapping of names to stages")
    if not tree:
        raise UserError("stages: a recipe needs at least one stage, and this one has none")
    return tuple(stage_config(str(name), values, f"stages.{name}") for name, values in tree.items())


def _in_order(stages: tuple[StageConfig, ...], order: list[str] | None) -> tuple[StageConfig, ...]:
    """The stages named in ``order``; all as they stand in the recipe if it is None."""
    if order is None:
        return stages
    named = {stage.name: stage for stage in stages}
    if not order or len(set(order)) < len(order) or not set(order) <= set(named):
        raise bad_value("order", order, f"names of stages, each once: {', '.join(named)}")
    return tuple(named[name] for name in order)


def stage_config(name: str, values: Any, path: str) -> StageConfig:
    """Checks a stage's values and makes them its config.

    Args:
        name: Of the stage.
        values: ``kind``, ``method`` and the method's keys.
        path: Of the values, for messages.

    Raises:
        UserError: An unknown kind, method or key, or a value of the wrong type or range.
    """
    if not isinstance(values, dict):
        raise bad_value(path, values, "a stage: kind, method and the method's keys")
    kind, method = values.get("kind"), values.get("method")
    if isinstance(method, str) and "." in method:
        if not isinstance(kind, str) or not re.fullmatch(r"\w+", kind):
            raise bad_value(f"{path}.kind", kind, "a word for what the stage does, such as prune")
        module = _own_module(path, method)
    else:
        kind = _choice(path, "kind", kind, known_kinds())
        method = _choice(path, "method", method, known_methods(kind))
        try:
            module = importlib.import_module(module_name(kind, method))
        except ModuleNotFoundError as error:
            raise UserError(f"{path}.method={method}: needs the package {error.name}, not installed") from error
    own = {key: value for key, value in values.items() if key not in ("kind", "method")}
    return StageConfig(name, kind, method, build(module.Config, own, path))


def module_name(kind: str, method: str) -> str:
    """The module of a method: the package's, or the user's by its dotted name."""
    return method if "." in method else f"compress.{kind}.{method}"


def _own_module(path: str, method: str) -> types.ModuleType:
    """A user's method, from the current folder or installed.

    Raises:
        UserError: It cannot be imported or is incomplete.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(method)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{method}.".startswith(f"{error.name}."):
            raise UserError(f"{path}.method={method}: needs the package {error.name}, not installed") from error
        raise UserError(
            f"{path}.method={method}: there is no module {error.name}, neither in {os.getcwd()} nor installed"
        ) from error
    except Exception as error:  # noqa: BLE001 - importing a module can raise anything
        raise UserError(f"{path}.method={method}: cannot be imported: {type(error).__name__}: {error}") from error
    config = getattr(module, "Config", None)
    missing = [
        what
        for what, there in (
            ("STAGE (a compress.stage.Stage)", isinstance(getattr(module, "STAGE", None), Stage)),
            ("Config (a dataclass)", isinstance(config, type) and dataclasses.is_dataclass(config)),
            ("run(pipeline, config, context)", callable(getattr(module, "run", None))),
        )
        if not there
    ]
    if missing:
        raise UserError(f"{path}.method={method}: {module.__file__} has no {', no '.join(missing)}")
    return module


def _choice(path: str, key: str, value: Any, known: list[str]) -> str:
    if value not in known:
        if value is None:
            raise UserError(f"{path}.{key} is missing: expected one of {', '.join(known)}")
        own = "; your own method is named with its package, my_package.my_stage" if key == "method" else ""
        raise UserError(f"{path}.{key}={value}: unknown{nearest(str(value), known)}; known: {', '.join(known)}{own}")
    return str(value)
