"""The examples of a stage, encoded once for all stages that train on the same teacher, data and choice."""

import hashlib
import json
from dataclasses import asdict
from datetime import timedelta

from accelerate import PartialState

from compress.data.examples import Examples, cached_examples
from compress.data.samples import SamplesConfig
from compress.stage import StageContext

_VERSION = 2  # of what is encoded; raise it when the same choice gives something else


def training_examples(context: StageContext, max_examples: int | None, samples: SamplesConfig) -> Examples:
    """The teacher's latents and conditions; called in every process, of which the first encodes.

    Args:
        context: Of the stage.
        max_examples: At most this many images, chosen at random; None: all; 0: none.
        samples: Latents that the teacher samples.

    Raises:
        UserError: See :func:`compress.data.examples.encode_examples`.
    """
    data = context.data
    # The others wait while the first process encodes the examples, perhaps for longer than the usual half hour.
    state = PartialState(cpu=context.device.type == "cpu", timeout=timedelta(hours=12))
    choice = {"version": _VERSION, "max_examples": max_examples, **asdict(samples)}
    drawn = max_examples is not None or samples.count or data.framing.crop == "random" or not data.has_images
    choice |= {"seed": context.seed} if drawn else {}
    name = hashlib.sha256(json.dumps(choice, sort_keys=True).encode()).hexdigest()[:16]
    with state.main_process_first():
        return cached_examples(
            context.teacher,
            data.train,
            context.folder if context.examples is None else context.examples() / name,
            max_examples=max_examples,
            seed=context.seed,
            framing=data.framing,
            samples=samples,
            prompts=data.prompts,
            write=state.is_main_process,
        )
