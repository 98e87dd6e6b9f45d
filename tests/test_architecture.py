"""Imports run one way, in no circle, and no module takes what another keeps to itself (docs/architecture.md)."""

import ast
import importlib.util
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# Of the rooms of a line, each imports itself and the lines above it: what an entry begins with is the room's modules.
LAYERS = (
    ("kvrun._core",),
    ("kvrun.errors", "kvrun.version"),
    ("kvrun.options",),
    ("kvrun.text",),
    ("kvrun.files",),
    ("kvrun.backend",),
    ("kvrun.cuda",),
    ("kvrun.exclusive", "kvrun.history", "kvrun.prefix_store", "kvrun.speculation"),
    ("kvrun.session",),
    ("kvrun.request",),
    ("kvrun.scheduler",),
    ("kvrun.model",),
    ("kvrun",),
    ("kvrun.measure",),
    ("kvrun.commands.arguments", "kvrun.commands.progress"),
    ("kvrun.convert",),
    ("kvrun.commands",),
    ("kvrun.__main__",),
)
# Of what is above it, the converter needs only this; of the commands its own may use these.
CONVERTER = ("kvrun._core", "kvrun.errors", "kvrun.options", "kvrun.text", "kvrun.files")
CONVERTER_COMMAND = (*CONVERTER, "kvrun.commands.arguments", "kvrun.commands.progress")
EXACT = {"kvrun"}  # the module, not the room: everything is in that


class Module:
    """A source file of the package, and what it imports while the program runs, wherever in the file that stands."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.is_package = name, path.name == "__init__.py"
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        typing_only = {
            node
            for branch in ast.walk(self.tree)
            if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
            for statement in branch.body
            for node in ast.walk(statement)
        }
        self.imports = [
            (taken, node)
            for node in ast.walk(self.tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for taken in self._taken(node)
        ]
        self.needs = {self._module(taken) for taken, node in self.imports if node not in typing_only}

    def _taken(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        """Full names of what an import statement takes from the package."""
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            package = self.name if self.is_package else self.name.rpartition(".")[0]
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
        return [name for name in names if name.split(".")[0] == "kvrun"]

    @staticmethod
    def _module(taken: str) -> str:
        """The module that a full name is, or is in."""
        return taken if taken in FILES or taken == "kvrun._core" else taken.rpartition(".")[0]


def package_files() -> dict[str, Path]:
    """Module: its source."""
    found = {}
    for prefix in ("kvrun", "kvrun._core", "kvrun.convert"):
        folder = Path(importlib.util.find_spec(prefix).submodule_search_locations[0])
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return found


FILES = package_files()
MODULES = {name: Module(name, path) for name, path in FILES.items()}


def within(name: str, room: str) -> bool:
    return name == room or (room not in EXACT and name.startswith(room + "."))


def layer(name: str) -> int:
    """The most exact layer that has the module."""
    found = [(len(room), n) for n, rooms in enumerate(LAYERS) for room in rooms if within(name, room)]
    assert found, f"{name} is in no room: say in LAYERS where it belongs"
    return max(found)[1]


def test_everything_is_looked_at():
    rooms = {name.split(".")[1] for name in MODULES if "." in name}
    assert {"text", "files", "commands", "measure", "cuda", "convert", "_core"} <= rooms and len(MODULES) > 50
    assert "kvrun.files.model_file" in MODULES["kvrun.model"].needs


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name):
    for needed in MODULES[name].needs:
        assert layer(needed) <= layer(name), f"{name} imports {needed}, which is below it"
        if within(name, "kvrun._core"):
            assert within(needed, "kvrun._core")
        if within(name, "kvrun.convert") and not within(needed, "kvrun.convert"):
            allowed = CONVERTER_COMMAND if name == "kvrun.convert.cli" else CONVERTER
            assert any(within(needed, room) for room in allowed), f"{name} imports {needed}"


def test_there_is_no_circle():
    """Of modules that import each other, at the start or later. A package's own __init__ is not counted as imported
    by the modules in it, though Python runs it first."""
    needs = {name: module.needs - {name} for name, module in MODULES.items()}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail("imports in a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_taken_that_another_module_keeps_to_itself(name):
    """Neither imported by an underscored name, nor reached through a module that was imported."""
    module = MODULES[name]
    imported = {}
    for taken, node in module.imports:
        last = taken.rpartition(".")[2]
        private = last.startswith("_") and not last.startswith("__") and taken != "kvrun._core"
        assert not private, f"{name}:{node.lineno} takes {taken}"
        for alias in node.names:
            if taken.endswith(alias.name) and (taken in FILES or taken == "kvrun._core"):
                imported[alias.asname or alias.name] = taken
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not private, f"{name}:{node.lineno} reaches {imported[node.value.id]}.{node.attr}"
