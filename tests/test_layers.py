"""Checks that no module imports from a higher layer or room, and that no imports form a cycle."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "driving_sim"
LAYERS = ("engine", "data", "tokenizer", "world_model")  # lowest first
ROOMS = (
    ("engine", "engine.ranks", "engine.training"),
    (
        "data.arrays",
        "data.video",
        "data.actions",
        "data",
        "data.tokens",
        "data.sources",
        "data.synthetic",
        "data.inspect",
    ),
    (
        "world_model.kernels",
        "world_model.sampling",
        "world_model.world_model",
        "world_model.training",
    ),
    (
        "evaluate.report",
        "evaluate.likelihood",
        "evaluate.actions",
        "evaluate.pictures",
        "evaluate.futures",
    ),
)
"""Groups of rooms, each with the lowest room first.

A module belongs to the innermost room that contains it.
"""
APPLICATION = len(LAYERS)
TOP = APPLICATION + 1
ENTRY = ("cli", "__main__")  # These modules import the others, and no module imports them.


def modules() -> dict[str, Path]:
    """Return the file of every module in the package, by the module's dotted name."""
    folders = [PACKAGE, *(PACKAGE / layer for layer in LAYERS)]
    # Resolve the linked folders first, because rglob does not follow links in all Python versions.
    files = {file for folder in folders for file in folder.resolve().rglob("*.py")}
    return {dotted_name(file): file for file in sorted(files)}


def dotted_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "driving_sim":
        parts.insert(0, "driving_sim")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    """Return the height of a module's layer: 0 for the lowest one."""
    name = (*module.split("."), "")[1]
    if name in LAYERS:
        return LAYERS.index(name)
    return TOP if name in ENTRY else APPLICATION


def height_in(rooms: Sequence[str], module: str) -> int | None:
    """Return the index in `rooms` of the module's room, or None if it is in none of them."""
    name = module.removeprefix("driving_sim.")
    holding = [room for room in rooms if f"{name}.".startswith(f"{room}.")]
    return rooms.index(max(holding, key=len)) if holding else None


def import_cycle(sources: Mapping[str, str]) -> list[str]:
    """Return the modules of an import cycle, or an empty list if there is none.

    Each module in the list imports the module before it. The first and the last module are the
    same.
    """
    known = frozenset(sources)
    graph = {name: {*imports(source, known)} & known - {name} for name, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(name) for name in error.args[1]]
    return []


def imports(source: str, known: frozenset[str]) -> Iterator[str]:
    """Yield every module that `source` imports, including imports inside functions.

    The names of relative imports start with dots.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                # `from driving_sim import cli` imports a module, but `from x.y import Z` imports a
                # name.
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in known else base


def wrong_imports(module: str, source: str, known: frozenset[str]) -> list[str]:
    """Return a module's imports from a higher layer or room, and those without an absolute name."""
    return [name for name in imports(source, known) if is_wrong(module, name)]


def is_wrong(module: str, name: str) -> bool:
    if name.startswith(".") or name.split(".")[0] in LAYERS:
        return True
    if name != "driving_sim" and not name.startswith("driving_sim."):
        return False
    if layer_of(name) == TOP:
        return module != "driving_sim.__main__"
    if layer_of(name) != layer_of(module):
        return layer_of(name) > layer_of(module)
    heights = ((height_in(rooms, name), height_in(rooms, module)) for rooms in ROOMS)
    return any(a is not None and b is not None and a > b for a, b in heights)


MODULES = modules()
KNOWN = frozenset(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"driving_sim"}))
def test_nothing_imports_upward(module: str) -> None:
    assert wrong_imports(module, MODULES[module].read_text("utf-8"), KNOWN) == []


def test_modules_of_every_layer_are_checked() -> None:
    layers = {layer_of(module) for module in MODULES}
    assert layers >= set(range(APPLICATION))
    assert "driving_sim.data.tokens.store" in MODULES
    assert "driving_sim.engine.errors" in MODULES


def test_every_room_exists() -> None:
    for rooms in ROOMS:
        assert {height_in(rooms, module) for module in KNOWN} >= set(range(len(rooms)))


def test_no_imports_form_a_cycle() -> None:
    """Imports inside functions and under `TYPE_CHECKING` count too."""
    assert import_cycle({name: file.read_text("utf-8") for name, file in MODULES.items()}) == []


def test_import_cycles_are_detected() -> None:
    later = "def f():\n    from driving_sim.a import g"
    for_types = "if TYPE_CHECKING:\n    from driving_sim.b import h"
    sources = {"driving_sim.a": for_types, "driving_sim.b": "import driving_sim.c"}
    assert import_cycle(sources | {"driving_sim.c": "import os"}) == []
    cycle = import_cycle(sources | {"driving_sim.c": later})
    assert {*cycle} == {"driving_sim.a", "driving_sim.b", "driving_sim.c"}


def test_every_module_that_is_imported_exists() -> None:
    # Commands import inside functions, so importing all modules would not find a wrong name there.
    for module, file in MODULES.items():
        for name in imports(file.read_text("utf-8"), KNOWN):
            if name.split(".")[0] == "driving_sim":
                assert name in KNOWN, f"{module} imports {name}"


@pytest.mark.parametrize("module", ["driving_sim", "driving_sim.engine", "driving_sim.data"])
def test_the_outer_packages_import_nothing(module: str) -> None:
    assert list(imports(MODULES[module].read_text("utf-8"), KNOWN)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("driving_sim.engine.config", "import driving_sim.data.video.reader"),
        ("driving_sim.data.video.reader", "from driving_sim.tokenizer.fsq import FSQ"),
        (
            "driving_sim.data.video.reader",
            "def f():\n    from driving_sim.tokenizer import Tokenizer",
        ),
        ("driving_sim.data.video.reader", "from driving_sim import tokenizer"),
        ("driving_sim.tokenizer.fsq", "from driving_sim.world_model.order import Order"),
        ("driving_sim.tokenizer.fsq", "from driving_sim.cli import app"),
        ("driving_sim.world_model.order", "from driving_sim.demo import demo"),
        ("driving_sim.demo", "from driving_sim import cli"),
        ("driving_sim.engine.files", "from driving_sim.engine.training.loop import train"),
        ("driving_sim.engine.ranks.sharding", "import driving_sim.engine.training.config"),
        ("driving_sim.data.video.reader", "from driving_sim.data.drive import Drive"),
        ("driving_sim.tokenizer.fsq", "from data import video"),
        ("driving_sim.tokenizer.fsq", "import tokenizer.fsq"),
        ("driving_sim.tokenizer.fsq", "from . import autoencoder"),
        ("driving_sim.tokenizer.fsq", "from ..data import video"),
    ],
)
def test_upward_and_bare_imports_are_detected(module: str, source: str) -> None:
    known = KNOWN | {"driving_sim.cli", "driving_sim.demo", "driving_sim.tokenizer"}
    assert len(wrong_imports(module, source, known)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("driving_sim.cli", "from driving_sim.demo import demo"),
        ("driving_sim.__main__", "from driving_sim.cli import app"),
        ("driving_sim.world_model.order", "from driving_sim.engine.config import to_dict"),
        ("driving_sim.tokenizer.fsq", "from driving_sim.tokenizer import autoencoder"),
        ("driving_sim.engine.training.loop", "from driving_sim.engine.files import atomic_file"),
        ("driving_sim.engine.training.loop", "import driving_sim.engine.training.step"),
        ("driving_sim.data.video.reader", "import numpy as np\nfrom collections import abc"),
    ],
)
def test_downward_and_sideways_imports_are_allowed(module: str, source: str) -> None:
    assert wrong_imports(module, source, KNOWN) == []


def test_every_module_can_be_imported_on_windows() -> None:
    """The test first removes the modules and functions that Windows lacks."""
    program = """
import importlib, os, select, signal, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for module, names in (
    (os, "fork sched_getaffinity writev statvfs killpg"),
    (signal, "SIGKILL SIGALRM SIGUSR1 setitimer pthread_sigmask"),
    (select, "poll"),
):
    for name in names.split():
        vars(module).pop(name, None)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    names = [name for name in MODULES if not name.endswith("__main__")]
    command = [sys.executable, "-c", program, *names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
