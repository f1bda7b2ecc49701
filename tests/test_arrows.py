"""Arrows point down: which room imports which, wherever in a file the import stands."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; a room imports those below it, and none on its own floor.
FLOORS = [
    {"_native", "_build", "_needs", "options", "targets"},
    {"ops"},
    {"estimators"},
    {"config"},
    {"steps"},
    {"linear"},
    {"convert", "chunked", "offload", "state"},
    {"optim"},
    {"monitor", "hf"},
    {"gpt.paths"},
    {"gpt.data", "gpt.model"},
    {"gpt.train"},
    {"gpt.evaluate", "gpt.chat", "gpt.export"},
    {"gpt.report"},
    {"memory"},
    {"lab"},
    {"bench"},
    {"scripts"},
]
# Rooms that a floor shares for a reason, and may import each other: opening a run stands above
# checkpoint and tokenizer, and fine-tuning opens runs.
TOGETHER = {"gpt.runs": "gpt.train"}


def modules() -> dict[str, Path]:
    found = {}
    for folder in ("molegrad", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The room of "molegrad.gpt.train.loop" is "gpt.train"; "" for packages that only gather."""
    parts = module.split(".")
    if parts[0] == "scripts":
        return "scripts"
    if module in ("molegrad", "molegrad.gpt"):
        return ""
    name = ".".join(parts[1:3]) if parts[1] == "gpt" else parts[1]
    return TOGETHER.get(name, name)


def imports(path: Path, name: str) -> set[str]:
    """Modules of the project that a file imports: at its top, inside functions, for type checkers,
    and by importlib.import_module with a constant."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()

    def add(module: str) -> None:
        if module == "molegrad._C":  # compiled: it imports nothing
            return
        while module and module not in MODULES:
            module = module.rpartition(".")[0]
        if module:
            found.add(module)

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                add(f"{module}.{alias.name}")
        elif isinstance(node, ast.Call) and re.search("import_module$", ast.unparse(node.func)):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    add(str(argument.value))
    return found - {name}


GRAPH = {name: imports(path, name) for name, path in MODULES.items()}


def floor(name: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if name in rooms:
            return number
    raise AssertionError(f"room {name!r} is on no floor: give it a place in FLOORS")


def test_every_import_leads_to_a_floor_below():
    wrong = []
    for module, targets in GRAPH.items():
        own = room(module)
        for target in targets:
            other = room(target)
            if own and other and own != other and floor(other) >= floor(own):
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_package_as_a_whole_from_below_it():
    """`import molegrad` gathers what users have: what it gathers must not import it again."""
    gathered, todo = set(), list(GRAPH["molegrad"])
    while todo:
        module = todo.pop()
        if module not in gathered:
            gathered.add(module)
            todo += GRAPH[module]
    assert not [module for module in gathered if "molegrad" in GRAPH[module]]


def test_there_is_no_circle():
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(module: str) -> None:
        state[module] = 1
        path.append(module)
        for target in sorted(GRAPH[module]):
            if state.get(target) == 1:
                raise AssertionError(" -> ".join([*path[path.index(target) :], target]))
            if target not in state:
                visit(target)
        path.pop()
        state[module] = 2

    for module in GRAPH:
        if module not in state:
            visit(module)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("def f():\n    import molegrad.ops.orth", {"molegrad.ops.orth"}),
        ("if TYPE_CHECKING:\n    from molegrad.ops import orth", {"molegrad.ops.orth"}),
        ("from .orth import polar_factor", {"molegrad.ops.orth"}),
        ("importlib.import_module('molegrad.linear')", {"molegrad.linear"}),
    ],
)
def test_hidden_imports_are_found(text, wanted, tmp_path):
    file = tmp_path / "new.py"
    file.write_text(text)
    assert imports(file, "molegrad.ops.new") == wanted
