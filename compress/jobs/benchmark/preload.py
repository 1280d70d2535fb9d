"""Imports what every row needs, for the process that rows' processes are copies of: once, and without a word."""

from compress.models.quiet import hide_notices

hide_notices()  # before the libraries say them

import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: E402, F401
import transformers.models.clip.modeling_clip  # noqa: E402, F401

import compress.jobs.benchmark.row  # noqa: E402, F401
