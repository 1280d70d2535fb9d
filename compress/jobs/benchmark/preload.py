"""Imports what every row needs, in the server process that is forked for each row."""

from compress.models.quiet import hide_notices

hide_notices()  # before the imports that print them

import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: E402, F401
import transformers.models.clip.modeling_clip  # noqa: E402, F401

import compress.jobs.benchmark.row  # noqa: E402, F401
