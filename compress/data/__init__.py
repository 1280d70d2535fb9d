"""Images with captions to train on and to compare with."""

from compress.data.config import DataConfig
from compress.data.load import (
    Data,
    Verified,
    check,
    content_hash,
    fingerprint,
    has_images,
    load_data,
    verify,
)

__all__ = [
    "Data",
    "DataConfig",
    "Verified",
    "check",
    "content_hash",
    "fingerprint",
    "has_images",
    "load_data",
    "verify",
]
