"""Measures cost and image quality of a pipeline for a grid of runtime choices."""

import dataclasses
import importlib.metadata
import time
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.jobs.benchmark.config import BenchmarkConfig, Choices, Limits, rows

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from compress.jobs.benchmark.job import Job
    from compress.jobs.benchmark.row import Task

__all__ = ["BenchmarkConfig", "Choices", "Limits", "benchmark", "rows", "run_job"]

ROWS = 2  # raised when a row's numbers change their meaning; part of the row's key in the store
LIBRARIES = ("torch", "diffusers", "transformers", "torchao")


def run_job(cfg: "DictConfig") -> None:
    """Runs the benchmark that a composed config describes, and prints its table.

    Raises:
        UserError: The user made a mistake; raised before a weight is loaded where possible.
    """
    from rich.console import Console

    from compress.jobs.benchmark.job import to_job
    from compress.jobs.benchmark.screen import print_end

    job = to_job(cfg)
    print_end(benchmark(job), job, Console())


def benchmark(job: "Job") -> dict[str, Any]:
    """Measures every row of the grid, or takes it from the store, and writes the report to ``job.out``.

    Returns:
        The content of ``benchmark.json``: ``rows``, each with ``name``, ``status`` (``measured``, ``skipped`` or
        ``failed``, with a ``reason``), ``choices``, ``cost``, ``metrics`` and ``dominated_by``; the ``best`` row, its
        criterion ``best_of`` and the ``code`` that runs it; the row with ``most_images`` per second within the same
        limits; the ``noise_floor``, the metrics of the reference row with other seeds; the settings, the prompts, and
        whether one was ``truncated``.

    Raises:
        UserError: The user made a mistake.
    """
    from compress.jobs.benchmark.report import write_report
    from compress.store.uses import key_inside, using

    _check(job)
    begun = time.perf_counter()
    run = _Benchmark(job)
    with using(run.store, job.out, "benchmark", [*run.keys(), *key_inside(run.store, job.model.path)]):
        result = run.go()
        result["seconds"] = time.perf_counter() - begun
        job.out.mkdir(parents=True, exist_ok=True)
        write_report(job.out, result, run.images)
    return result


def _check(job: "Job") -> None:
    """Checks everything that needs no weights."""
    import compress.data
    from compress.evaluate import check as check_evaluation
    from compress.jobs.benchmark.model import check_model
    from compress.run import preflight

    check_model(job.model)
    compress.data.check(job.data)
    check_evaluation(job.evaluate)
    preflight.check_device(job.device)
    for key, folder in (("out", job.out), ("store", job.store)):
        preflight.check_writable(key, folder)


class _Benchmark:
    """One benchmark. Its rows run one after the other, each in a separate process."""

    def __init__(self, job: "Job") -> None:
        import compress.data
        import compress.models
        from compress.evaluate.prompts import evaluation_prompts
        from compress.jobs.benchmark.model import check_text
        from compress.store import Store
        from compress.system import processes

        self.job = job
        self.device: torch.device = processes.join(job.device)
        self.store = Store(job.store)
        self.fingerprint = compress.models.fingerprint(job.model)
        check_text(job.model)  # only now is a model on the hub known to exist
        data, count = compress.data.load_data(job.data), job.benchmark.images
        self.prompts = evaluation_prompts(data, job.evaluate, count, job.seed)
        self.seeds = [job.seed + index for index in range(count)]
        self.images: dict[str, torch.Tensor] = {}
        self.others: torch.Tensor | None = None  # images of the reference row with other noise
        self.truncated = False
        self.longest: float | None = None  # longest seconds per image, set by the reference row

    def go(self) -> dict[str, Any]:
        """Measures and compares all rows."""
        from compress.jobs.benchmark.choose import best, dominating, most_images
        from compress.system.progress import track

        grid = rows(self.job.benchmark)
        found = []
        for name in track(list(grid), "measuring rows"):
            found.append(self._row(name, grid[name]))
            if name == "reference":
                if found[0]["status"] != "measured":
                    raise UserError(f"benchmark.reference: the reference row failed: {found[0]['reason']}")
                self.longest = self.job.benchmark.slowest / found[0]["cost"]["throughput"]
        floor = self._compare(found)
        for row in found:
            row["dominated_by"] = dominating(row, found) if row["status"] == "measured" else None
        chosen, why = best(found, self.job.limit)
        return {
            "model": dataclasses.asdict(self.job.model) | {"fingerprint": self.fingerprint},
            "settings": self._settings(),
            "prompts": self.prompts,
            "truncated": self.truncated,
            "limit": dataclasses.asdict(self.job.limit),
            "rows": found,
            "noise_floor": floor,
            "best": chosen,
            "best_of": why,
            "most_images": most_images(found, self.job.limit),
            "code": self._code(grid[chosen]) if chosen is not None else None,
        }

    def keys(self) -> list[str]:
        """Keys of all rows."""
        grid = rows(self.job.benchmark)
        return [self.store.key(self._parts(self._task(name, grid[name]))) for name in grid]

    def _row(self, name: str, choices: Choices) -> dict[str, Any]:
        """A row from the store, or measured and stored. A row that failed or was skipped is tried again next time."""
        task = self._task(name, choices)
        key = self.store.key(self._parts(task))
        row: dict[str, Any] = {"name": name, "choices": dataclasses.asdict(choices), "key": key, "reason": None}
        stored = self.store.evaluation(key)
        cached = stored is not None
        if stored is None:
            with self.store.lock(key):
                stored = self.store.evaluation(key)  # another benchmark may have stored it meanwhile
                if stored is None:
                    outcome = self._measure(key, task)
                    if outcome is not None:
                        return {**row, **outcome, "cached": False, "cost": None, "metrics": None}
                    stored = self.store.evaluation(key)
        assert stored is not None
        self.images[name] = self._stored_images(key, "images")
        if task.other_seeds:
            self.others = self._stored_images(key, "others")
        self.truncated = self.truncated or stored["truncated"]
        return {**row, "status": "measured", "cached": cached, "cost": stored["cost"], "metrics": None}

    def _measure(self, key: str, task: "Task") -> dict[str, str] | None:
        """Measures a row into the store; returns status and reason if that is not possible."""
        from PIL import Image

        from compress.jobs.benchmark.process import measure_apart

        found = measure_apart(task)
        for status in ("skipped", "failed"):
            if status in found:
                return {"status": status, "reason": found[status]}
        for kind in found.keys() & {"images", "others"}:
            folder = self.store.work(key) / kind
            folder.mkdir(exist_ok=True)
            for index, image in enumerate(found[kind]):
                Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index:06d}.png")
        content = {"cost": found["cost"], "choices": dataclasses.asdict(task.choices), "truncated": found["truncated"]}
        of = {"recipe": "benchmark", "what": f"{task.choices.scheduler} {task.choices.steps}, {task.choices.dtype}"}
        self.store.put_evaluation(key, content | {"of": of, "grid": []})
        return None

    def _stored_images(self, key: str, kind: str) -> "torch.Tensor":
        import torch

        from compress.evaluate.images import ImageFiles, image_files

        images = ImageFiles(image_files(self.store.evaluation_folder(key) / kind))[:]
        assert isinstance(images, torch.Tensor)  # the images of a row have one size
        return images

    def _task(self, name: str, choices: Choices) -> "Task":
        import torch

        from compress.jobs.benchmark.row import Task

        config = self.job.benchmark
        others = tuple(seed + len(self.seeds) for seed in self.seeds) if name == "reference" else ()
        return Task(
            self.job.model, choices, str(self.device), torch.get_num_threads(), tuple(self.prompts), tuple(self.seeds),
            config.guidance, config.height, config.width, config.image_batch, config.repeats, self.longest, others,
        )  # fmt: skip

    def _parts(self, task: "Task") -> dict[str, Any]:
        """Everything that a row's numbers and images depend on."""
        from compress.evaluate.cost import device_name

        parts = dataclasses.asdict(task)
        del parts["longest"]  # decides only whether the row is measured
        libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
        return {
            **parts, "model": self.fingerprint, "rows": ROWS, "device_name": device_name(self.device),
            "libraries": libraries,
        }  # fmt: skip

    def _compare(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds metrics to every measured row; returns those of the reference row with other noise."""
        from compress.evaluate.networks import Networks
        from compress.jobs.benchmark.quality import Quality
        from compress.system.progress import track

        config = self.job.evaluate
        clip = Networks(config, self.device).clip if config.clip is not None else None
        quality = Quality(self.images["reference"], self.prompts, clip, config.bootstrap)
        for row in track([row for row in found if row["status"] == "measured"], "comparing images"):
            row["metrics"] = quality(self.images[row["name"]])
        assert self.others is not None  # sampled with the reference row
        return quality(self.others)

    def _settings(self) -> dict[str, Any]:
        import torch

        from compress.evaluate.cost import device_name

        config = self.job.benchmark
        height, width = self.images["reference"].shape[2:]
        return {
            "n": config.images, "resolution": f"{width}x{height}", "guidance": config.guidance,
            "repeats": config.repeats, "image_batch": config.image_batch, "seed": self.job.seed,
            "device": device_name(self.device), "threads": torch.get_num_threads(),
        }  # fmt: skip

    def _code(self, choices: Choices) -> str:
        from compress.jobs.benchmark.model import denoiser_of, pipeline_class
        from compress.jobs.benchmark.prompt import embedding_names
        from compress.jobs.benchmark.snippet import snippet

        config = self.job.benchmark
        size = {"height": config.height, "width": config.width}
        wanted = {name: side for name, side in size.items() if side is not None}
        model = self.job.model
        embeddings = embedding_names(pipeline_class(model))
        return snippet(model, choices, str(self.device), denoiser_of(model), config.guidance, wanted, embeddings)
