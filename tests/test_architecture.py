"""The floors of the house, proved from the imports: an import points down, never up or to a neighbour's room.

7  __main__
6  cli/
5  pretrain
4  training/
3  model/
2  kernels/   parallel/   data/
1  topology
0  config/  console  errors  launch  benchmark  options
"""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megachiar"
TOOLS = ROOT / "tools"
ROOT_ROOMS = {"__init__": 0, "errors": 0, "console": 0, "launch": 0, "benchmark": 0, "options": 0, "config": 0}
ROOMS = {"topology": 1, "kernels": 2, "parallel": 2, "data": 2, "model": 3, "training": 4}
FLOORS = {**ROOT_ROOMS, **ROOMS, "pretrain": 5, "cli": 6, "__main__": 7}
# Narrower than the floors: what a room may import of ours. errors is a word that every room may use.
MAY_IMPORT = {
    "config": {"errors", "__init__"},
    "console": {"errors"},
    "launch": {"errors"},
    "errors": set(),
    "benchmark": set(),
    "options": {"errors"},
    "topology": {"config", "errors"},
    "kernels": {"errors"},
    "parallel": {"topology", "errors"},
    "data": {"config", "errors", "console", "__init__"},
    "model": {"config", "topology", "parallel", "kernels", "errors"},
}
MAY_IMPORT_DEEPSPEED = {"training"}


def imports(source: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import statement, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((node.lineno, "." * node.level + (node.module or "")))
            elif node.module == "megachiar":
                found += [(node.lineno, f"megachiar.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return found


def violations(package: Path) -> list[str]:
    """What breaks the floors, as ``file:line: room imports module``."""
    broken = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).with_suffix("")
        room = name.parts[0]
        assert room in FLOORS, f"{path} is in no room: add it to the map here and in the README"
        for line, module in imports(path.read_text()):
            place = f"{path.relative_to(package.parent)}:{line}: {room} imports {module}"
            top, _, rest = module.partition(".")
            if top == "megachiar":
                target = rest.split(".")[0] if rest.split(".")[0] in FLOORS else "__init__"
                up = FLOORS[target] > FLOORS[room]
                neighbour = FLOORS[target] == FLOORS[room] and target != room and target not in ROOT_ROOMS
                refused = target != room and target not in MAY_IMPORT.get(room, set(FLOORS))
                if up or neighbour or refused:
                    broken.append(place)
            elif not top:
                broken.append(f"{place}: imports are absolute")
            elif top == "deepspeed" and not {room, name.as_posix()} & MAY_IMPORT_DEEPSPEED:
                broken.append(f"{place}: only {sorted(MAY_IMPORT_DEEPSPEED)} may")
            elif top in {"tools", "tests", "slurm"}:
                broken.append(f"{place}: nothing imports it")
    return broken


def test_imports_point_down():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("kernels", "from megachiar.model.layer import RoutedLayer"),
        ("kernels", "from megachiar.config import RunConfig"),
        ("data", "import megachiar.training.loop"),
        ("data", "from megachiar.kernels.dct import dct"),
        ("model", "from megachiar import training"),
        ("model", "def f():\n    import deepspeed"),
        ("model", "from ..training import loop"),
        ("kernels", "from .dct import dct"),
        ("config", "from megachiar.topology import Topology"),
        ("training", "import tools.evaluate"),
        ("training", "from megachiar.cli import evaluate"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path, room, line):
    folder = tmp_path / "megachiar" / room
    folder.mkdir(parents=True)
    (folder / "planted.py").write_text(f"import os\n{line}\n")
    (broken,) = violations(tmp_path / "megachiar")
    assert broken.startswith(f"megachiar/{room}/planted.py:{3 if 'def' in line else 2}: {room} imports ")


def test_deepspeed_is_for_training(tmp_path):
    for name in ("model/layer.py", "training/engine.py", "data/loader.py"):
        path = tmp_path / "megachiar" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from deepspeed.pipe import LayerSpec\n")
    assert [line.split(":")[0] for line in violations(tmp_path / "megachiar")] == [
        "megachiar/data/loader.py",
        "megachiar/model/layer.py",
    ]


def test_no_command_imports_another():
    for path in (PACKAGE / "cli").glob("*.py"):
        for line, module in imports(path.read_text()):
            assert not module.startswith("megachiar.cli"), f"{path}:{line}: imports {module}"


def test_every_tool_is_a_command_and_nothing_more():
    for path in TOOLS.glob("*.py"):
        command, console = [module for _, module in imports(path.read_text())]
        assert command.startswith("megachiar.cli.") and console == "megachiar.console", path


def test_no_module_hides_another():
    """Started as a file, ``megachiar/`` is first on the path: its names must not hide modules or packages."""
    ours = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    others = set(sys.stdlib_module_names) | set(packages_distributions()) - {"megachiar", "tests"}
    assert not (ours - {"__init__"}) & others


def test_no_test_imports_another():
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        for line, module in imports(path.read_text()):
            assert module.rpartition(".")[2] not in names, f"{path}:{line}: imports {module}"
