"""Makes a text-to-image diffusion model smaller and faster, and measures what that cost."""

from compress.models.registration import register

__version__ = "0.1.0"

register()
