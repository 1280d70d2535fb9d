"""Runs a recipe: each stage is computed or taken from the store, then measured, tracked and reported."""

import gc
import shutil
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import compress.data
import compress.models
import compress.report
import compress.run.preflight
import compress.track
from compress.errors import UserError
from compress.evaluate.cost.memory import watch_memory
from compress.evaluate.sample import own_settings
from compress.models.sampling import sampling_from, saved_sampling
from compress.run import estimate, output
from compress.run.config import RunConfig
from compress.run.keys import Plan, Step
from compress.run.work import Inputs, ToMeasure, artifact_folder, compute, measure
from compress.runtime import resolve
from compress.stage import declares
from compress.store import checkpoint
from compress.store.uses import key_inside, using
from compress.system import processes
from compress.system.progress import Overall, duration
from compress.track import StageRun, Tracker

if TYPE_CHECKING:
    from compress.data import Verified

KEPT = ("kind", "method", "key", "seconds", "peak_memory_bytes", "peak_memory_of", "coverage", "curves")
MOST_TEXT = 1000  # characters of a detail in the report; longer ones are in the checkpoint's compress.json only

_kept: list[Inputs] = []  # of the last run that was asked to keep them


def run_recipe(config: RunConfig, keep: bool = False) -> dict[str, Any]:
    """Runs a recipe and writes its report, images and final checkpoint to ``config.out``.

    Under ``accelerate launch`` every process calls it; all share evaluations and stages made for several processes,
    the first does the rest.

    Args:
        config: Of the run.
        keep: Whether teacher, data and networks stay in memory for the next run of this process, as in a grid.

    Returns:
        The report as in ``report.json``; empty in processes other than the first.

    Raises:
        UserError: A user's mistake; before anything is computed where possible.
    """
    device = processes.join(config.device)
    config = with_engines(config, device)
    inputs = Inputs(config, device)
    if not processes.is_main():
        while (asked := processes.receive()) is not None:
            if isinstance(asked, ToMeasure):
                measure(inputs, asked)
            else:
                compute(inputs, Step(config.stages[asked[0]], *asked[1]), [], StageRun(None))
        return {}
    try:
        report = _Run(inputs).go()
    finally:
        if keep and "fingerprints" in inputs.__dict__:  # otherwise it ended before it loaded anything
            _kept[:] = [inputs]
    processes.send(None)
    return report


def with_engines(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with the engines that ``auto`` stands for here.

    Raises:
        UserError: An engine cannot run here.
    """
    try:
        evaluated = resolve(config.evaluate.engine, device)
    except UserError as error:
        raise UserError(f"evaluate.{error}") from error
    last = None if config.engine is None else resolve(config.engine, device)
    if last == evaluated or config.stages[-1].declared.leaves == "artifact":
        last = None  # that row is there already, or there is nothing to run
    return replace(config, engine=last, evaluate=replace(config.evaluate, engine=evaluated))


class _Run:
    """The first process's part: it alone prints, tracks and writes, and sends the others their work."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.config, self.store = inputs, inputs.config, inputs.store
        self.grids: dict[str, list[dict[str, Any]]] = {}
        self.computing = 0.0  # seconds in stages and evaluations that were not in the store

    def go(self) -> dict[str, Any]:
        """Checks, runs all stages, and returns the report."""
        begun = time.perf_counter()
        config = self.config
        verified = compress.run.preflight.check(config)
        self.plan = Plan(config, self.store, self.inputs.device)
        keys = [*self.plan.keys(), *key_inside(self.store, config.model.path)]
        with using(self.store, config.out, config.recipe_name, keys):
            if not self.plan.holds():  # something was removed before the store knew of this run
                self.plan = Plan(config, self.store, self.inputs.device)
            return self._go(begun, verified)

    def _go(self, begun: float, verified: "Verified | None") -> dict[str, Any]:
        """Runs all stages, with the store's entries reserved, and returns the report."""
        config = self.config
        self.inputs.fingerprints = (self.plan.teacher, self.plan.data)
        for earlier in _kept:
            self.inputs.take_over(earlier)
        _kept.clear()
        steps = self.plan.steps
        to_run = sum(not step.cached for step in steps)
        if to_run:
            size = compress.run.preflight.folder_bytes(output.model_folder(config.model))
            compress.run.preflight.check_room(config.store, size, to_run)
        config.out.mkdir(parents=True, exist_ok=True)
        output.write_config(config)
        self.overall = Overall(estimate.parts(self.plan))
        self.overall.say(f"{config.recipe_name} of {config.model.path}, to {config.out}")
        # In a multirun the parent folder names the multirun.
        group = "-".join([config.recipe_name, *(name for name in config.out.parts[-2:] if name != config.recipe_name)])
        tracker = compress.track.start(config.track, group, config.out, output.plain(config))
        try:
            with self.overall:
                result = self._report(tracker, begun, verified)
            output.track_report(tracker, result, config)
        finally:
            tracker.close()
        output.print_end(Console(), result, config, tracker.where)
        if "stopped" not in result:
            output.publish(Console(), result, config)
        return result

    def _report(self, tracker: Tracker, begun: float, verified: "Verified | None") -> dict[str, Any]:
        """Runs all stages; writes the report after every computed stage and at the end."""
        config, steps = self.config, self.plan.steps
        result: dict[str, Any] = {
            "recipe": config.recipe_name, "seed": config.seed, "precision": config.precision,
            "device": str(self.inputs.device), "out": str(config.out), "store": str(config.store),
            "data": self._data(verified), **self._teacher(tracker), "stages": [],
        }  # fmt: skip
        history: list[dict[str, Any]] = []
        for step in steps:
            result["stages"].append(self._stage(tracker, step, history))
            if not step.cached:
                result |= self._seconds(begun)
                compress.report.write_report(config.out, result, self.grids)
            if config.objective is not None and (why := config.objective.exceeded(result["stages"][-1])):
                result["stopped"] = why
                break
        if config.engine is not None and "stopped" not in result:
            try:
                result["accelerated"] = self._accelerated(tracker, steps[-1])
            except UserError as error:  # all stages are done: their results count without that row
                self.overall.say(f"{error}; the table has no row for it")
        if "stopped" in result:
            shutil.rmtree(config.out / "checkpoint", ignore_errors=True)  # of an earlier run of other values
        else:
            self._export(steps[-1], history, result)
        result |= self._seconds(begun)
        written = compress.report.write_report(config.out, result, self.grids)
        compress.report.write_page(config.out, written)
        return written

    def _seconds(self, begun: float) -> dict[str, float]:
        return {"seconds": time.perf_counter() - begun, "computed_seconds": self.computing}

    def _data(self, verified: "Verified | None") -> dict[str, Any]:
        """The report's entry of the data: its path, and how many images are used and skipped."""
        found: dict[str, Any] = {"path": self.config.data.path, "fingerprint": self.plan.data}
        if verified is not None:
            found |= {"examples": verified.examples, "skipped": len(verified.problems)}
            if verified.problems:
                total = verified.examples + len(verified.problems)
                shown = "; ".join(f"{name}: {why}" for name, why in list(verified.problems.items())[:3])
                self.overall.say(f"{len(verified.problems)} of {total} images of the data are skipped ({shown})")
        return found

    def _teacher(self, tracker: Tracker) -> dict[str, Any]:
        """The report's entries of the teacher: its evaluation, the noise floor and the manifest."""
        config, plan = self.config, self.plan
        folder = output.model_folder(config.model)
        with tracker.stage("teacher", "teacher", asdict(config.model)) as run:
            evaluation, cached = self._evaluated("teacher", ToMeasure(plan.teacher_evaluation, None, folder, None))
            summary = _numbers(evaluation)
            found: dict[str, Any] = {"manifest": evaluation["manifest"]} if evaluation["manifest"] else {}
            if config.evaluate.noise_floor and config.evaluate.images:
                floor, _ = self._evaluated(
                    "noise floor", ToMeasure(plan.noise_floor, None, folder, plan.teacher_evaluation)
                )
                found["noise_floor"] = {"metrics": floor["metrics"], "evaluation": plan.noise_floor}
                summary["noise_floor"] = floor["metrics"]
            run.finish(summary, evaluation["grid"])
        about = {"path": config.model.path, "fingerprint": plan.teacher, "cached": cached}
        about["evaluation"] = plan.teacher_evaluation
        return {"teacher": about | _numbers(evaluation), **found}

    def _stage(self, tracker: Tracker, step: Step, history: list[dict[str, Any]]) -> dict[str, Any]:
        stage = step.stage
        settings = {"kind": stage.kind, "method": stage.method, **asdict(stage.config)}
        with tracker.stage(stage.name, stage.kind, settings) as run:
            cached, begun = step.cached, time.perf_counter()
            self.overall.begin()
            if not cached:
                with self.store.lock(step.key, lambda: self._waiting(stage.name)):
                    cached = self.store.find(step.key) is not None  # another run may have computed it
                    if not cached:
                        self._make(step, history, run)
            self.store.finish(step.key)  # also what a process that was killed before this left
            folder = self.store.path(step.key)
            about = checkpoint.read_info(folder)
            entry = about["stages"][-1] | {"name": stage.name}
            took = f"{estimate.doing(stage.kind)[1]} in {duration(time.perf_counter() - begun)}"
            self.overall.finish("from the store" if cached else took)
            if cached:
                _replay(entry["curves"], run)
            history.append(entry)
            key, teacher = self.plan.evaluation(step), self.plan.teacher_evaluation
            subject = ToMeasure(key, step.key, folder, teacher, stage.declared.sampled)
            evaluation, _ = self._evaluated(stage.name, subject)
            run.finish(_numbers(evaluation), evaluation["grid"])
        kept = {name: entry[name] for name in KEPT if name in entry}
        kept["details"] = {name: value for name, value in entry["details"].items() if len(str(value)) <= MOST_TEXT}
        place = {"checkpoint": str(folder), "evaluation": key, "model_file": about.get("model_file")}
        return {"name": stage.name, "cached": cached} | place | kept | _numbers(evaluation)

    def _accelerated(self, tracker: Tracker, step: Step) -> dict[str, Any]:
        """The report's entry of the last checkpoint as the engine runs it."""
        name = f"{step.stage.name}, {self.config.engine}"
        key, teacher = self.plan.accelerated(step), self.plan.teacher_evaluation
        with tracker.stage(name, "engine", {"engine": self.config.engine}) as run:
            subject = ToMeasure(key, step.key, self.store.path(step.key), teacher, engine=self.config.engine)
            evaluation, _ = self._evaluated(name, subject)
            run.finish(_numbers(evaluation), evaluation["grid"])
        return {"name": name, "engine": self.config.engine, "evaluation": key, **_numbers(evaluation)}

    def _make(self, step: Step, history: list[dict[str, Any]], run: StageRun) -> None:
        """Computes a stage and puts its checkpoint into the store."""
        stage = step.stage
        begun, memory = time.perf_counter(), watch_memory(self.inputs.device)
        if stage.declared.distributed:
            processes.send((self.config.stages.index(stage), (step.key, step.parent, step.cached)))
        pipeline, report = compute(self.inputs, step, history, run)
        artifact = artifact_folder(self.inputs, step)
        if artifact is not None and not any(artifact.iterdir()):
            raise UserError(f"stages.{stage.name} ({stage.kind}={stage.method}) wrote no files to context.artifact")
        if artifact is None and not report.coverage.get("modules"):
            reasons = "; ".join(f"{name}: {why}" for name, why in report.coverage.get("skipped", {}).items())
            raise UserError(
                f"stages.{stage.name} ({stage.kind}={stage.method}) changed nothing ({reasons or 'no reason'})"
            )
        entry = {
            "name": stage.name, "kind": stage.kind, "method": stage.method, "key": step.key,
            "config": asdict(stage.config), "declared": stage.declared.declared(),
            "coverage": report.coverage, "details": report.details,
            "curves": report.curves, "seconds": time.perf_counter() - begun, **memory(),
        }  # fmt: skip
        model_file = checkpoint.model_file(pipeline)
        info = output.info(self.config, self.plan.teacher, self.plan.data, [*history, entry], model_file)
        info |= saved_sampling(pipeline)
        card, folder = compress.report.model_card(info), self.store.path(step.key)
        exact, libraries = bool(declares(info["stages"], "exact")), declares(info["stages"], "libraries")
        checkpoint.save_checkpoint(
            pipeline, folder, info, card,
            exact=exact, libraries=libraries, artifact=artifact, store=self.store.root,
        )  # fmt: skip
        del pipeline
        gc.collect()
        self.computing += time.perf_counter() - begun

    def _evaluated(self, name: str, subject: ToMeasure) -> tuple[dict[str, Any], bool]:
        """The evaluation of a checkpoint as stock diffusers loads it, or of the teacher.

        Returns:
            The evaluation, and whether it was in the store.
        """
        key = subject.key
        self.overall.begin()
        found = self.store.evaluation(key)
        cached = found is not None
        if found is None:
            with self.store.lock(key, lambda: self._waiting(f"the evaluation of {name}")):
                found = self.store.evaluation(key)
                if found is None:
                    found = self._measured(name, subject)
        self.grids[name] = found["grid"]
        fid = ((found["metrics"].get("fid") or {}).get("value")) if not cached else None
        took = f"evaluated in {duration(found['seconds'])}" if found.get("seconds") else "evaluated"
        self.overall.finish(
            "evaluation from the store" if cached else f"{took}{'' if fid is None else f', FID {fid:.0f}'}",
            measured=not cached and "like" in found and "seconds" in found,
        )
        return found, cached

    def _measured(self, name: str, subject: ToMeasure) -> dict[str, Any]:
        """Measures a checkpoint and puts the evaluation into the store."""
        key, begun = subject.key, time.perf_counter()
        images = self.plan.images(subject.checkpoint, subject.is_noise_floor, subject.engine)
        self.store.adopt(images, key)
        # With images already sampled, the time is no estimate for an evaluation.
        fresh = not any((self.store.work(key) / "images").glob("*"))
        processes.send(subject)
        of = {"recipe": self.config.recipe_name, "checkpoint": subject.checkpoint, "teacher": subject.teacher}
        content = {"images": images, "of": of | {"what": name}, **measure(self.inputs, subject)}
        if not subject.is_noise_floor and subject.engine is None:  # another takes another time
            content["like"] = self.plan.like
        if fresh:
            content["seconds"] = time.perf_counter() - begun
        # Students are compared with the teacher's images; a student's are not needed again.
        keep = self.config.evaluate.keep_images or subject.teacher is None
        self.store.put_evaluation(key, content, keep_images=keep)
        found = self.store.evaluation(key)
        assert found is not None
        self.computing += time.perf_counter() - begun
        return found

    def _export(self, step: Step, history: list[dict[str, Any]], result: dict[str, Any]) -> None:
        """Exports the final checkpoint with the measurements."""
        info = checkpoint.read_info(self.store.path(step.key))
        info |= {"recipe": self.config.recipe_name, "stages": history, "evaluation": _all_numbers(result)}
        if grid := self.grids[step.stage.name]:
            settings = own_settings(self.config.evaluate, sampling_from(info))
            how = {key: getattr(settings, key) for key in ("steps", "guidance", "height", "width")}
            fits = "scheduler_asked" not in result["manifest"]
            how["scheduler"] = settings.scheduler if fits else "checkpoint"
            info["example"] = {"prompt": grid[0]["prompt"], "seed": grid[0]["seed"], **how}
        output.export(self.store.path(step.key), self.config.out / "checkpoint", info)
        result["checkpoint"] = str(self.config.out / "checkpoint")

    def _waiting(self, what: str) -> None:
        self.overall.say(f"another run is computing {what}: waiting for it")


def _replay(curves: dict[str, list[list[float]]], run: StageRun) -> None:
    """Logs the curves of a stage from the store, so that the run's tracking is complete."""
    points: dict[int, dict[str, float]] = {}
    for name, curve in curves.items():
        for at, value in curve:
            points.setdefault(int(at), {})[name] = value
    for at in sorted(points):
        run.log(points[at], at)


def _numbers(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {"cost": evaluation["cost"], "metrics": evaluation["metrics"]}


def _all_numbers(result: dict[str, Any]) -> dict[str, Any]:
    rows = [{"name": "teacher", **_numbers(result["teacher"])}]
    last = [result["accelerated"]] if "accelerated" in result else []
    rows += [{"name": stage["name"], **_numbers(stage)} for stage in (*result["stages"], *last)]
    return {"rows": rows} | {name: result[name] for name in ("noise_floor", "manifest") if name in result}
