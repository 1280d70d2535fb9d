"""The loop that the three trainings of the embedded default share."""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from compress.system.progress import track


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Images a step.
        learning_rate: Peak of a cosine schedule with a linear warm-up over the first 4 % of the steps.
        weight_decay: AdamW's.
        ema_decay: Decay of the exponential moving average of the weights, the ones that are saved.
        bf16: Autocast the forward pass to bfloat16.
        seed: Seed of initialization, batches and noise.
        save_every: Steps between two resumable training states.
        schedule_steps: Length of the cosine schedule where it is longer than ``steps``; 0 for the same.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    bf16: bool = True
    seed: int = 0
    save_every: int = 500
    schedule_steps: int = 0


def train(
    model: torch.nn.Module,
    loss: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    size: int,
    config: LoopConfig,
    out: Path,
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Trains ``model`` in place and leaves it with its averaged weights.

    A training state is kept in ``out / "state.pt"`` until the end, so a second call continues where the first stopped.

    Args:
        model: What is trained; only parameters that require a gradient are.
        loss: From indices ``(batch_size,)`` of the training examples and a generator to a scalar.
        size: Number of training examples.
        config: See :class:`LoopConfig`.
        out: Folder of the state and of ``curve.json``, rows ``[step, loss, seconds]``.
        evaluate: Called with averaged weights in place at every save; its figures join the curve.

    Returns:
        ``{"curve": [...], "figures": [...], "seconds": ...}``.
    """
    out.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "betas": (0.9, 0.99)}
    optimizer = torch.optim.AdamW(parameters, **rates)
    length = config.schedule_steps or config.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, length))
    average = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    generator = torch.Generator().manual_seed(config.seed)
    pool = torch.empty(0, dtype=torch.long)  # what is left of this epoch's examples
    done = 0
    record: dict[str, Any] = {"curve": [], "figures": [], "seconds": 0.0}
    state_file, beside = out / "state.pt", out / ".state.pt.partial"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average.load_state_dict(state["average"])
        generator.set_state(state["generator"])
        pool, done, record = state["pool"], state["step"], state["record"]

    started, running = time.time() - record["seconds"], []
    for step in track(range(done, config.steps), f"training to {config.steps} steps"):
        while len(pool) < config.batch_size:
            pool = torch.cat([pool, torch.randperm(size, generator=generator)])
        batch, pool = pool[: config.batch_size], pool[config.batch_size :]
        with torch.autocast("cpu", torch.bfloat16) if config.bf16 else nullcontext():
            value = loss(batch, generator)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(parameters)
        running.append(value.item())
        record["seconds"] = time.time() - started
        if (step + 1) % 50 == 0:
            record["curve"].append([step + 1, sum(running) / len(running), record["seconds"]])
            print(f"step {step + 1} loss {record['curve'][-1][1]:.5f} seconds {record['seconds']:.0f}", flush=True)
            running = []
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            if evaluate is not None:
                average.store(parameters)
                average.copy_to(parameters)
                model.eval()
                with torch.no_grad():
                    record["figures"].append({"step": step + 1, **evaluate()})
                model.train()
                average.restore(parameters)
                print(record["figures"][-1], flush=True)
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                 "average": average.state_dict(), "generator": generator.get_state(), "pool": pool.clone(),
                 "step": step + 1, "record": record},
                beside,
            )  # fmt: skip
            os.replace(beside, state_file)  # a crash leaves the state before this one
            (out / "curve.json").write_text(json.dumps(record))
    average.copy_to(parameters)
    model.eval()
    return record


def _cosine(step: int, steps: int) -> float:
    warm = max(1, round(0.04 * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
