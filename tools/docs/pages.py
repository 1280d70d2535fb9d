"""The generated pages of the documentation site, as a hook of mkdocs: nothing of them is kept in ``docs/``.

Config groups and recipes come from their YAML files with their comments, the Python reference from docstrings.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from compress.__main__ import usage  # noqa: E402
from compress.config.folders import NOT_STAGES, recipe_files  # noqa: E402
from compress.store.command import usage as store_usage  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

API = ("compress.api", "compress.stage", "compress.errors")
PACKAGES = (
    "config", "models", "data", "store", "runtime", "evaluate", "prune", "distill", "quantize", "report", "track",
    "run", "grid", "jobs", "system",
)  # fmt: skip
LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.-]+):(?:\s+(?P<value>.*?))??(?:\s+#\s?(?P<comment>.*)|\s*)")


@dataclass
class Key:
    """A key of a YAML file: its path, its value as written and its comment."""

    path: str
    value: str
    comment: str


@dataclass
class Choice:
    """A YAML file of ``conf/``: its first comment, the choices it starts from, and its keys."""

    about: str
    starts: list[str] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Adds the generated pages; called by mkdocs."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Removes marks of reStructuredText in docstrings; called by mkdocs."""
    return re.sub(r":(?:class|data|func|meth|mod|attr):(?=<code>)", "", html).replace("::</p>", ":</p>")


def pages() -> dict[str, str]:
    """Markdown of every generated page by its path."""
    modules = {f"reference/modules/{name}.md": _members(f"compress.{name}", deep=True) for name in PACKAGES}
    api = "\n\n".join(_members(name) for name in API)
    return {
        "reference/command-line.md": f"# Command line\n\n{_block(usage())}\n## The store\n\n{_block(store_usage())}",
        "reference/config.md": config_page(),
        "reference/recipes.md": recipes_page(),
        "reference/python.md": f"# Python\n\n{api}\n",
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        **modules,
    }


def config_page() -> str:
    """Every group, choice and key of ``conf/`` with its comment."""
    conf = ROOT / "conf"
    parts = [
        "# Config groups and keys\n",
        "Every key has a default, which is the value shown. A key is set by its path: `seed=1`, "
        "`evaluate.images=64`, and `stages.NAME.KEY=VALUE` for the stage of that name in the recipe. "
        "`--cfg job` prints all keys of a composed recipe.\n",
        "## Top level\n",
        _table([key for key in parse(conf / "config.yaml").keys if not key.path.startswith("hydra")]),
    ]
    groups = sorted({file.parent.relative_to(conf).as_posix() for file in conf.rglob("*.yaml")} - {"."})
    for group in groups:
        files = sorted((conf / group).glob("*.yaml"))
        parts.append(f"## {group}\n")
        parts.append(_how_chosen(group, files[0].stem))
        for file in files:
            choice = parse(file)
            parts.append(f"### {group}={file.stem}\n\n{choice.about}\n")
            if choice.starts:
                parts.append(f"Starts from {', '.join(f'`{start}`' for start in choice.starts)}.\n")
            if choice.keys:
                parts.append(_table(choice.keys))
    return "\n".join(parts)


def recipes_page() -> str:
    """Every shipped recipe: what it claims, and its file."""
    parts = ["# Recipes\n", "A recipe is run as `python -m compress recipe=NAME`.\n"]
    for name, file in recipe_files().items():
        choice = parse(file)
        text = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
        parts.append(f"## {name}\n\n{choice.about}\n\n```yaml\n{text.strip()}\n```\n")
    return "\n".join(parts)


def parse(file: Path) -> Choice:
    """The keys of a YAML file with their comments; a comment goes on in the lines below it."""
    about: list[str] = []
    choice = Choice("")
    above: list[tuple[int, str]] = []
    column = None
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#"):
            if not choice.keys and not choice.starts and not above:
                about.append(text.lstrip("# "))
            elif column is not None and line.index("#") == column:
                choice.keys[-1].comment += " " + text.lstrip("# ")
            continue
        if above and above[0][1] == "defaults" and text.startswith("- "):
            if (start := text[2:].partition("#")[0].strip()) != "_self_":
                choice.starts.append(start)
            continue
        found = LINE.fullmatch(line)
        if found is None:
            continue  # an item of a list, which its key's comment explains
        indent = len(found["indent"])
        above = [(deep, name) for deep, name in above if deep < indent] + [(indent, found["key"])]
        if found["key"] == "defaults" and not indent:
            continue
        column = line.rindex("#", 0, found.start("comment")) if found["comment"] else None
        path = ".".join(name for _, name in above)
        choice.keys.append(Key(path, found["value"] or "", found["comment"] or ""))
    choice.about = " ".join(about)
    return choice


def _block(text: str) -> str:
    return f"```\n{text}```\n"


def _how_chosen(group: str, option: str) -> str:
    if group == "accelerate":
        return f"A config file of accelerate: `accelerate launch --config_file conf/{group}/{option}.yaml`.\n"
    kind = group.partition("/")[0]
    if kind in NOT_STAGES or kind == "hydra":
        return f"Chosen with `{group}=NAME`.\n"
    more = "" if "/" in group else f" Added as a stage with `+{group}@stages.NAME={option}`."
    return f"Chosen for the stage of the name `{kind}` with `{group}=NAME`.{more}\n"


def _table(keys: list[Key]) -> str:
    def cell(text: str) -> str:
        return re.sub(r"([|*_\[\]])", r"\\\1", text).replace("<", "&lt;")

    rows = ["| key | value | |", "|---|---|---|"]
    for key in keys:
        value = f"`{key.value}`".replace("|", "\\|") if key.value else ""
        rows.append(f"| `{key.path}` | {value} | {cell(key.comment)} |")
    return "\n".join(rows) + "\n"


def _members(name: str, deep: bool = False) -> str:
    options = "    options:\n      show_submodules: true\n" if deep else ""
    title = f"# {name}\n\n" if deep else f"## {name}\n\n"
    return f"{title}::: {name}\n{options}"
