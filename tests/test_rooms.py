"""Checks that the folders stay easy to navigate: few files in each, and tests that mirror them."""

import ast
from collections import Counter
from pathlib import Path

from tests import ROOT

FOLDERS = ("driving_sim", "data", "tokenizer", "world_model", "tests", "benchmarks")
MAX_FILES = 12
SUFFIXES = (".py", ".cpp", ".h")
ONLY_TESTS = {"tests", "tests/benchmarks", "tests/fixtures", "tests/stress"}
"""Test folders that have no counterpart in the package."""


def sources() -> list[Path]:
    """Return the paths of all code files, relative to the root. Linked folders are left out."""
    paths = [path for top in FOLDERS for path in (ROOT / top).rglob("*")]
    files = [path for path in paths if path.suffix in SUFFIXES]
    return sorted(path.relative_to(ROOT) for path in files if path.resolve() == path)


def test_a_folder_holds_at_most_a_dozen_files_of_code() -> None:
    counts = Counter(str(path.parent) for path in sources())
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}
    assert counts["data/video"] > 2


def test_the_folders_of_tests_mirror_those_of_the_package() -> None:
    folders = {str(path.parent).removeprefix("driving_sim/") for path in sources()}
    rooms = {str(path.parent) for path in sources() if path.parts[0] == "tests"}
    assert {
        room for room in rooms - ONLY_TESTS if room.removeprefix("tests/") not in folders
    } == set()


def test_no_test_is_imported_from_another() -> None:
    for path in sources():
        tree = ast.parse((ROOT / path).read_text("utf-8") if path.suffix == ".py" else "")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert ".test_" not in (node.module or ""), f"{path} imports {node.module}"
