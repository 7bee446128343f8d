"""The house stays one that a newcomer finds the way in: few files a folder, tests beside theirs."""

import ast
from collections import Counter
from pathlib import Path

from tests import ROOT

HOUSE = ("driving_sim", "data", "tokenizer", "world_model", "tests", "benchmarks")
MOST_FILES = 12
SOURCES = (".py", ".cpp", ".h")
APART = {"tests", "tests/benchmarks", "tests/fixtures", "tests/stress"}
"""Folders of tests that have no folder of the package beside them."""


def sources() -> list[Path]:
    """Code of the house, by its path from the root; the package's links are not followed."""
    found = [path for top in HOUSE for path in (ROOT / top).rglob("*") if path.suffix in SOURCES]
    return sorted(path.relative_to(ROOT) for path in found if path.resolve() == path)


def test_a_folder_holds_at_most_a_dozen_files_of_code() -> None:
    counts = Counter(str(path.parent) for path in sources())
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}
    assert counts["data/video"] > 2


def test_tests_stand_where_what_they_test_stands() -> None:
    folders = {str(path.parent).removeprefix("driving_sim/") for path in sources()}
    rooms = {str(path.parent) for path in sources() if path.parts[0] == "tests"}
    assert {room for room in rooms - APART if room.removeprefix("tests/") not in folders} == set()


def test_no_test_is_imported_from_another() -> None:
    """Not in strings either, but for programs that a test file runs with what it holds itself."""
    for path in sources():
        tree = ast.parse((ROOT / path).read_text("utf-8") if path.suffix == ".py" else "")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert ".test_" not in (node.module or ""), f"{path} imports {node.module}"
