"""What holds for the package as a whole: names of classes, and which way imports go."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import compress

ROOT = Path(compress.__file__).parent

# From the bottom to the top. A module imports from its own layer and from those below; packages of one layer do not
# import each other.
LAYERS = (
    ("errors", "assets", "system"),
    ("config",),
    ("models",),
    ("data",),
    ("store",),
    ("stage",),
    ("runtime",),
    ("evaluate",),
    ("prune", "distill"),
    ("quantize",),  # trains with the trainer of distill
    ("report",),
    ("track",),
    ("run",),
    ("jobs",),
    ("api",),
    ("grid",),
    ("__main__",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
SHARED = {"errors", "assets", "system"}  # the one layer whose packages may import each other


def modules() -> dict[str, ast.Module]:
    """Parsed source by dotted name."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = ("compress", *file.relative_to(ROOT).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that a module imports, in functions too; not those for type checking alone."""
    found: set[str] = set()
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            if node.module in known:
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (parts & known) | ({node.module} if parts - known else set())
    return found - {name, "compress"}  # the root is imported before anything in it


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", None) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from _executed(other)
            continue
        yield child
        yield from _executed(child)


def graph() -> dict[str, set[str]]:
    """Module to the modules that it imports."""
    trees = modules()
    return {name: imports(name, tree, set(trees)) for name, tree in trees.items()}


def part(name: str) -> str:
    """The first part of a module's name inside of the package; the root stands for the API."""
    return name.split(".")[1] if "." in name else "api"


def in_cycles(edges: dict[str, set[str]]) -> set[str]:
    """The modules that import themselves by way of others."""
    found = set()
    for start in edges:
        seen, waiting = set(), [start]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += new
        found |= {start} & seen
    return found


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {part(name) for name in modules()} <= set(LAYER)


def test_no_two_classes_share_a_name() -> None:
    names = Counter(
        node.name for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    twice = {name for name, count in names.items() if count > 1} - {"Config"}  # every method has its own
    assert not twice


def test_imports_go_downward_only() -> None:
    wrong = set()
    for name, targets in graph().items():
        for target in targets:
            own, other = part(name), part(target)
            level = own == other or (own in SHARED and other in SHARED)
            if not level and LAYER[other] >= LAYER[own]:
                wrong.add(f"{name} -> {target}")
    assert not wrong


def test_no_import_cycle() -> None:
    assert not in_cycles(graph())


def test_a_planted_cycle_is_found() -> None:
    assert in_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == {"b", "c", "d"}
