"""How much longer a whole evaluation takes than what cannot be avoided: sampling, and a pass of each network.

``python benchmarks/evaluation.py [KEY=VALUE ...]`` with the keys of a recipe, for instance ``evaluate.images=512
device=cuda model.path=owner/name``. In one run and turn by turn it measures

- a bare loop that calls the stock pipeline and throws the images away,
- a bare pass of the images, in memory, through each network of the metrics, and of the captions through CLIP's,
- the whole evaluation of a student: sampling, writing and reading images, networks, metrics, intervals,

each at its best batch size. What a run has in its store is there: real images' features, the teacher's images.
"""

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import compress.data
import compress.models
from compress.config.compose import compose
from compress.config.values import PRECISIONS
from compress.evaluate import EvaluateConfig, evaluate
from compress.evaluate.images import Images
from compress.evaluate.networks import Networks
from compress.evaluate.prompts import evaluation_prompts
from compress.run.config import to_run_config
from compress.system import processes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SIZES = (8, 16, 32, 64, 128)
REPEATS = 3
TRIAL = 64  # images that decide the best batch size
LIMIT = 1.05
GENERATION, CAPTIONS, WHOLE = "generation alone", "captions alone", "whole evaluation"


def main(overrides: Sequence[str]) -> int:
    """Prints the table; returns 1 if the whole takes more than :data:`LIMIT` times its parts."""
    config = to_run_config(compose(["recipe=prune", "evaluate.grid=0", *overrides]))
    device, dtype = processes.join(config.device), getattr(torch, PRECISIONS[config.precision])
    pipeline = compress.models.load_teacher(config.model, device, dtype)
    data = compress.data.load_data(config.data)
    networks = Networks(config.evaluate, device)
    prompts = evaluation_prompts(data, config.evaluate, config.evaluate.images, config.seed)
    keys = networks.keys(sets=True, captions=True)
    with tempfile.TemporaryDirectory() as scratch:
        how: dict[str, Any] = {"device": device, "dtype": dtype, "seed": config.seed, "networks": networks}
        how["cache"] = Path(scratch) / "features"
        batch = best(lambda size: generate(pipeline, prompts[:TRIAL], config.evaluate, size))
        settings = replace(config.evaluate, batch_size=batch)
        teacher = Path(scratch) / "teacher"
        evaluate(pipeline, data, settings, teacher, **how)
        images = in_memory(teacher, len(prompts))
        sizes = {key: best(lambda size, key=key: look(networks, key, images[:TRIAL], size)) for key in keys}
        settings = replace(settings, score_batch_size=best(lambda size: looks(networks, keys, images[:TRIAL], size)))
        seconds: dict[str, list[float]] = {}
        for turn in range(REPEATS):
            measured = {GENERATION: generate(pipeline, prompts, settings, batch)}
            measured |= {networks[key].name: look(networks, key, images, sizes[key]) for key in keys}
            if "clip" in keys:
                measured[CAPTIONS] = timed(lambda: networks.clip.text(prompts))
            # Other seeds instead of another model: as costly, and compared with the teacher's images too.
            student = {**how, "folder": Path(scratch) / f"student-{turn}", "teacher": teacher, "other_seeds": True}
            measured[WHOLE] = timed(functools.partial(evaluate, pipeline, data, settings, **student))
            for name, found in measured.items():
                seconds.setdefault(name, []).append(found)
    shown = {GENERATION: batch, **{networks[key].name: sizes[key] for key in keys}}
    return show(seconds, shown, len(prompts))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call that ends with its results on the CPU."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def best(measure: Callable[[int], float]) -> int:
    """The fastest batch size; each is measured once before it counts."""
    found = {}
    for size in SIZES:
        measure(size)
        found[size] = measure(size)
    return min(found, key=lambda size: found[size])


def generate(pipeline: "DiffusionPipeline", prompts: Sequence[str], config: EvaluateConfig, size: int) -> float:
    """Seconds of a bare loop over batches of prompts."""
    from compress.evaluate.sample import call, sampler

    twin = sampler(pipeline, config)

    def loop() -> None:
        for start in range(0, len(prompts), size):
            chosen = prompts[start : start + size]
            call(twin, chosen, range(start, start + len(chosen)), config)

    return timed(loop)


def look(networks: Networks, key: str, images: Images, size: int) -> float:
    """Seconds of a bare pass of images through a network."""
    network = networks[key]
    return timed(lambda: [network(images[start : start + size]) for start in range(0, len(images), size)])


def looks(networks: Networks, keys: Sequence[str], images: Images, size: int) -> float:
    """Seconds through all networks at one batch size."""
    return sum(look(networks, key, images, size) for key in keys)


def in_memory(folder: Path, n: int) -> Images:
    """An evaluation's images."""
    from compress.evaluate.images import ImageFiles
    from compress.evaluate.sample import image_paths

    return ImageFiles(image_paths(folder / "images", range(n)))[0:n]  # type: ignore[return-value]


def show(seconds: dict[str, list[float]], sizes: dict[str, int], n: int) -> int:
    """Prints medians and the ratio as Markdown."""
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"| {n} images | batch size | seconds | images/s |\n|---|---:|---:|---:|")
    for name, value in medians.items():
        print(f"| {name} | {sizes.get(name, '')} | {value:.2f} | {n / value:.2f} |")
    parts = [sum(found[turn] for name, found in seconds.items() if name != WHOLE) for turn in range(REPEATS)]
    ratios = [whole / part for whole, part in zip(seconds[WHOLE], parts, strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"\nThe whole takes {ratio:.3f} times its parts (median of {REPEATS} turns, {min(ratios):.3f} to "
        f"{max(ratios):.3f}); at most {LIMIT} is wanted."
    )
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
