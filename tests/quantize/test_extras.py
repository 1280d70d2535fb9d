"""Methods whose package is not installed, or that are asked for where they cannot work: one message, exit code 2."""

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
import compress.models
from compress.__main__ import main
from compress.errors import UserError
from tests.tiny import tiny_pipeline

METHODS = {
    "quanto_int8": ("optimum-quanto", "quanto"),
    "sdnq_int8": ("sdnq", "sdnq"),
    "bnb_nf4": ("bitsandbytes", "bitsandbytes"),
    "gguf_q8_0": ("gguf", "gguf"),
}


def without(package: str) -> Callable[[str], str]:
    version = importlib.metadata.version

    def found(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    return found


@pytest.mark.parametrize("option", METHODS)
def test_a_missing_package_is_named_with_its_extra(
    option: str,
    tiny_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package, extra = METHODS[option]
    monkeypatch.setattr(importlib.metadata, "version", without(package))
    monkeypatch.setattr(compress.models, "load_teacher", lambda *_: pytest.fail("weights were loaded"))
    words = ["recipe=int8", f"quantize={option}", *tiny_overrides, f"out={tmp_path / 'o'}", f"store={tmp_path / 's'}"]
    monkeypatch.setattr(sys, "argv", ["compress", *words])
    assert main() == 2
    message = f'needs the package {package}, which is not installed: pip install "compress[{extra}]"'
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: stages.quantize.method=") and line.endswith(message)
    with pytest.raises(UserError, match="which is not installed: pip install"):
        compress.quantize(tiny_pipeline(), option)
