"""The documentation: its site is built, its generated pages are whole, and its commands compose."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

from compress.config.compose import compose
from compress.run.config import to_run_config
from tools.docs import pages

ROOT = Path(__file__).parents[2]


def paths(tree: Any, above: str = "") -> set[str]:
    """Every key of a YAML tree by its path."""
    found: set[str] = set()
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found |= {f"{above}{key}"} | paths(value, f"{above}{key}.")
    return found


@pytest.mark.parametrize("group", sorted({file.parent for file in (ROOT / "conf").rglob("*.yaml")}), ids=str)
def test_every_key_is_in_the_reference(group: Path) -> None:
    for file in group.glob("*.yaml"):
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        choice = pages.parse(file)
        found = {key.path for key in choice.keys}
        inline = {path for path in paths(tree) if any(path.startswith(f"{key}.") for key in found)}
        assert paths(tree) - {"defaults"} == found | inline, file
        assert choice.about or file.name == "config.yaml", file
        for start in choice.starts:
            assert start in str(tree["defaults"]).replace("'", ""), file


def test_a_comment_goes_on_in_the_next_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "# What it does,\n# in two lines.\ndefaults:\n  - width # not shown\n  - _self_\n"
        'path: "a#b" # a file\n            # or a folder\nlist:  # of things\n  - 1\ninner:\n  deep: null\n'
    )
    choice = pages.parse(file)
    assert (choice.about, choice.starts) == ("What it does, in two lines.", ["width"])
    assert [(key.path, key.value, key.comment) for key in choice.keys] == [
        ("path", '"a#b"', "a file or a folder"),
        ("list", "", "of things"),
        ("inner", "", ""),
        ("inner.deep", "null", ""),
    ]


def commands() -> list[str]:
    """Every documented command that runs stages of a shipped recipe."""
    found = []
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for language, block in re.findall(r"```(\w*)\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
            lines = [] if language else block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if " compress " in line and "recipe=" in line]
    own = r"recipe=(\./|RECIPE|mine)|=CHOICE"
    other_job = r"recipe=(score|benchmark|report)\b"
    return [line for line in found if not re.search(f"{own}|{other_job}", line)]


def first(word: str) -> str:
    """An override with the first of its values."""
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    value: Any = override.value()
    start = value.start if isinstance(value, IntervalSweep) else next(override.sweep_string_iterator())
    return f"{override.get_key_element()}={start}"


@pytest.mark.parametrize("command", commands())
def test_documented_commands_compose(command: str) -> None:
    words = shlex.split(command, comments=True)
    words = words[words.index("compress") + 1 :]
    # A launcher needs its package.
    overrides = [word for word in words if "=" in word and not re.match("hydra[/.]launcher", word)]
    overrides = [first(word) for word in overrides] if "-m" in words else overrides
    cfg = compose(overrides)
    assert to_run_config(cfg, alternatives=cfg.job == "compare").stages


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs-material is not installed: compress[docs]")
def test_the_site_builds_without_a_broken_link_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = list((tmp_path / "site").rglob("*.html"))
    assert len(found) > 30
    for file in found:
        text = file.read_text(encoding="utf-8")
        assert not re.findall(r"""<(?:script|img|iframe)[^>]* src=["']?(?:https?:)?//[^>]*>""", text), file
        loaded = re.findall(r"<link[^>]*>", text)
        assert not [link for link in loaded if "//" in link and "rel=canonical" not in link.replace('"', "")], file
    page = (tmp_path / "site" / "reference" / "config.html").read_text(encoding="utf-8")
    assert "share of the channels to remove, in (0, 1)" in page and "quantize=w8a8" in page
    assert "Loads a pipeline, frozen" in (tmp_path / "site" / "reference" / "python.html").read_text(encoding="utf-8")
