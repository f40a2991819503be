"""The floors of the house, proved from the imports: an import points down, never up or to a neighbour's room.

The map of the rooms stands in ``FLOORS``. CONTRIBUTING shows the same one, room by room, and README its folders.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "megachiar"
TOOLS = ROOT / "tools"

FLOORS = (  # from the ground up: rooms of one floor know nothing of each other
    {"__init__", "checkout", "errors", "last_words", "log_streams", "phases", "printed_messages", "process_identity"},
    {
        "activity",
        "config",
        "console",
        "extras",
        "launch",
        "benchmark",
        "interrupts",
        "launcher_watch",
        "local_server",
        "process_memory",
        "progress",
        "request_fields",
        "stop_signals",
    },
    {"topology", "options", "data.permutation", "data.storage"},
    {"kernels", "parallel", "data.inputs"},
    {"data.tokenizers"},
    {"data.sampling", "data.preprocessing"},
    {"model", "data.tasks"},
    {"planning"},
    {"engine"},
    {"checkpoint"},
    {"training"},
    {"inference", "analysis"},
    {"evaluation", "viewer", "sweeps", "interop"},
    {"monitoring"},
    {"reporting", "pretrain"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Narrower than the floors: what a room may import of ours. Every room may raise errors.
MAY_IMPORT = {
    "config": {"__init__"},
    "console": {"printed_messages", "process_identity"},
    "extras": set(),
    "launch": set(),
    "benchmark": set(),
    "local_server": set(),
    "request_fields": set(),
    "options": {"__init__", "config"},
    "topology": {"config"},
    "kernels": set(),
    "parallel": {"topology"},
    "data.permutation": set(),
    "data.storage": {"__init__"},
    "data.inputs": {"data.storage"},
    "data.tokenizers": {"data.storage", "data.inputs", "process_memory"},
    "model": {"config", "topology", "parallel", "kernels", "phases"},
}
MAY_IMPORT_DEEPSPEED = {"engine"}


def imports(source: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import statement, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((node.lineno, "." * node.level + (node.module or "")))
            elif (node.module or "").partition(".")[0] == "megachiar":
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return found


def room_of(module: str) -> str | None:
    """The room that a dotted name within the package lies in: its longest beginning that is on the map."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOOR_OF), None)


def violations(package: Path) -> list[str]:
    """What breaks the floors, as ``file:line: room imports module``."""
    broken = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        room = room_of(name)
        if room is None and name.endswith("__init__"):
            room = "__init__"
        assert room is not None, f"{path} is in no room: add it to the map here"
        for line, module in imports(path.read_text()):
            place = f"{path.relative_to(package.parent)}:{line}: {room} imports {module}"
            top, _, rest = module.partition(".")
            if top == "megachiar":
                target = room_of(rest) or "__init__"
                if target != room and not may_import(room, target):
                    broken.append(place)
            elif not top:
                broken.append(f"{place}: imports are absolute")
            elif top == "deepspeed" and room not in MAY_IMPORT_DEEPSPEED:
                broken.append(f"{place}: only {sorted(MAY_IMPORT_DEEPSPEED)} may")
            elif top in {"tools", "tests", "slurm"}:
                broken.append(f"{place}: nothing imports it")
    return broken


def may_import(room: str, target: str) -> bool:
    if target == "errors":
        return True
    return FLOOR_OF[target] < FLOOR_OF[room] and target in MAY_IMPORT.get(room, FLOOR_OF)


def test_imports_point_down():
    assert violations(PACKAGE) == []


def test_every_room_of_the_map_exists():
    for room in FLOOR_OF:
        path = PACKAGE / room.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), room


def shown(room: str) -> str:
    """A room as the pages write it: a folder with a slash, or a file."""
    path = PACKAGE / room.replace(".", "/")
    return f"{path.relative_to(PACKAGE)}/" if path.is_dir() else f"{path.relative_to(PACKAGE)}.py"


def test_contributing_shows_this_map():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([\w/.]+)` \| [^|]+ \|$", text, re.M)
    assert sorted(rows) == sorted((str(floor), shown(room)) for room, floor in FLOOR_OF.items())


def test_the_readme_shows_the_folders_of_this_map():
    text = (ROOT / "README.md").read_text().split("\n## Map\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.+?) \| .+ \|$", text, re.M)
    named = [room for cell in cells for room in re.findall(r"`([\w/.]+)`", cell) if room != "megachiar/"]
    rooms = {shown(room) for room in FLOOR_OF}
    assert len(named) == len(set(named)) and set(named) <= rooms
    assert {room for room in rooms if room.endswith("/")} <= set(named), "a folder of the map has no line"


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("kernels", "from megachiar.model.layer import RoutedLayer"),
        ("kernels", "from megachiar.config import RunConfig"),
        ("data/storage", "import megachiar.training.trainer"),
        ("data/storage", "from megachiar.data.tokenizers import fast"),
        ("data/sampling", "from megachiar.data.preprocessing.readers import Source"),
        ("data/tokenizers", "from megachiar.kernels.dct import dct"),
        ("model", "from megachiar import training"),
        ("model", "def f():\n    import deepspeed"),
        ("model", "from ..training import loop"),
        ("kernels", "from .dct import dct"),
        ("config", "from megachiar.topology import Topology"),
        ("engine", "from megachiar.checkpoint.sharded_tensors import ShardReader"),
        ("training", "import tools.evaluate"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path, room, line):
    folder = tmp_path / "megachiar" / room
    folder.mkdir(parents=True)
    (folder / "planted.py").write_text(f"import os\n{line}\n")
    (broken,) = violations(tmp_path / "megachiar")
    name = room.replace("/", ".")
    assert broken.startswith(f"megachiar/{room}/planted.py:{3 if 'def' in line else 2}: {name} imports ")


def test_deepspeed_is_for_the_engine(tmp_path):
    for name in ("model/layer.py", "engine/engine.py", "data/sampling/loader.py", "launch.py"):
        path = tmp_path / "megachiar" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from deepspeed.pipe import LayerSpec\n")
    assert [line.split(":")[0] for line in violations(tmp_path / "megachiar")] == [
        "megachiar/data/sampling/loader.py",
        "megachiar/launch.py",
        "megachiar/model/layer.py",
    ]


def test_no_command_imports_another():
    for path in (PACKAGE / "cli").glob("*.py"):
        for line, module in imports(path.read_text()):
            assert not module.startswith("megachiar.cli"), f"{path}:{line}: imports {module}"


def test_every_tool_is_a_command_and_nothing_more():
    for path in TOOLS.glob("*.py"):
        command, console = [module for _, module in imports(path.read_text())]
        assert command.startswith("megachiar.cli.") and console == "megachiar.console.run", path


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
