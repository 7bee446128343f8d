"""Nothing imports upward or in a circle: layers and rooms, checked on every module's source."""

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
    ("evaluate.report", "evaluate.likelihood", "evaluate.actions", "evaluate.pictures"),
)
"""Rooms of a layer, lowest first; a module is of the innermost room that it is in."""
APPLICATION = len(LAYERS)
TOP = APPLICATION + 1
ENTRY = ("cli", "__main__")  # they use the rest; nothing uses them


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    folders = [PACKAGE, *(PACKAGE / layer for layer in LAYERS)]
    # Not through the folders' links: some Python versions do not follow them in rglob.
    files = {file for folder in folders for file in folder.resolve().rglob("*.py")}
    return {dotted_name(file): file for file in sorted(files)}


def dotted_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "driving_sim":
        parts.insert(0, "driving_sim")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    """How high a module of the package stands."""
    name = (*module.split("."), "")[1]
    if name in LAYERS:
        return LAYERS.index(name)
    return TOP if name in ENTRY else APPLICATION


def height_in(rooms: Sequence[str], module: str) -> int | None:
    """How high a module stands among `rooms`; None where it is in none of them."""
    name = module.removeprefix("driving_sim.")
    own = [room for room in rooms if f"{name}.".startswith(f"{room}.")]
    return rooms.index(max(own, key=len)) if own else None


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules each of which imports the one before it, the first and last the same; else none."""
    known = frozenset(sources)
    graph = {name: {*imports(source, known)} & known - {name} for name, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(name) for name in error.args[1]]
    return []


def imports(source: str, known: frozenset[str]) -> Iterator[str]:
    """Every module that a source imports, wherever in it; relative ones start with dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                # `from driving_sim import cli` imports a module, `from x.y import Z` a name.
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in known else base


def wrong_imports(module: str, source: str, known: frozenset[str]) -> list[str]:
    """The imports by which a module reaches upward, or not by the absolute name."""
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


def test_every_layer_is_looked_at() -> None:
    found = {layer_of(module) for module in MODULES}
    assert found >= set(range(APPLICATION))
    assert "driving_sim.data.tokens.store" in MODULES
    assert "driving_sim.engine.errors" in MODULES


def test_every_room_is_there() -> None:
    for rooms in ROOMS:
        assert {height_in(rooms, module) for module in KNOWN} >= set(range(len(rooms)))


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even inside functions, or for types only: neither could be read before the other."""
    assert circle({name: file.read_text("utf-8") for name, file in MODULES.items()}) == []


def test_circles_are_found() -> None:
    later = "def f():\n    from driving_sim.a import g"
    for_types = "if TYPE_CHECKING:\n    from driving_sim.b import h"
    sources = {"driving_sim.a": for_types, "driving_sim.b": "import driving_sim.c"}
    assert circle(sources | {"driving_sim.c": "import os"}) == []
    found = circle(sources | {"driving_sim.c": later})
    assert {*found} == {"driving_sim.a", "driving_sim.b", "driving_sim.c"}


def test_every_module_that_is_imported_exists() -> None:
    # Most imports of the commands happen inside functions: nothing else would notice.
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
def test_upward_and_bare_imports_are_found(module: str, source: str) -> None:
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
def test_imports_downward_and_sideways_are_fine(module: str, source: str) -> None:
    assert wrong_imports(module, source, KNOWN) == []


def test_no_module_needs_what_windows_lacks() -> None:
    """All are imported without the modules and functions that only other systems have."""
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
    own = [name for name in MODULES if not name.endswith("__main__")]
    run = [sys.executable, "-c", program, *own]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
