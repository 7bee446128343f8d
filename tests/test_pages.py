"""Check the README and the pages of the site: length, links, and that their commands run."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST = "<!-- test -->\n"


def blocks(page: Path, before: str = "") -> list[tuple[str, str]]:
    """Return the language and text of each fenced code block that comes right after `before`."""
    return re.findall(re.escape(before) + r"```(\w+)\n(.*?)```", page.read_text("utf-8"), re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def run(language: str, text: str, folder: Path) -> str:
    """Run a code block as a reader would, with trainings of two steps. Return what it prints."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "DRIVESIM_STEPS": "2",
    }
    command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_takes_three_minutes() -> None:
    text = README.read_text("utf-8")
    assert len(text.split()) <= 1300
    for row in re.findall(r"^\|.*\|$", text, re.M):
        for cell in row.strip("|").split("|"):
            assert len(re.sub(r"\(\S+\)", "", cell).split()) <= 10, (
                f"a cell has more than ten words: {cell}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](#one-two) [b](#three) [c](gone.md) [d](page.md#one-two)\n")
    assert dead_links(page) == ["#three", "gone.md"]


def test_file_names_do_not_differ_by_case_alone() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [name.lower() for name in listed.stdout.splitlines()]
    assert len(set(names)) == len(names)


def texts_of_the_package() -> set[str]:
    """Return every string in the source of the package, with {} for each value in an f-string."""
    texts = set()
    for folder in ("driving_sim", "data", "tokenizer", "world_model"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (
                        part.value if isinstance(part, ast.Constant) else "{}"
                        for part in node.values
                    )
                    texts.add("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.add(node.value)
    return texts


def test_troubleshooting_quotes_messages_that_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r'^\*\*"([^"]+)"', page, re.M)
    assert len(quoted) >= 5
    texts = texts_of_the_package()
    assert [quote for quote in quoted if not any(quote in text for text in texts)] == []


def test_the_pictures_are_light() -> None:
    assert (ROOT / "docs" / "demo.webp").stat().st_size < 3_000_000


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    (code,) = [text for language, text in blocks(README) if language == "python"]
    assert run("python", code, tmp_path).endswith("(1, 128, 256, 3)\n")


def test_the_commands_of_getting_started_run_one_after_the_other(tmp_path: Path) -> None:
    page = ROOT / "docs" / "getting-started.md"
    marked = blocks(page, TEST)
    assert len(marked) == page.read_text("utf-8").count(TEST) >= 6
    printed = [run(language, text, tmp_path) for language, text in marked]
    (inspection,) = [text for language, text in blocks(page) if language == "text"]
    # Columns that no processor rounds differently; the legend and the problems word for word.
    columns = re.compile(r"^(drive_\d+) .* ([+-]\d+) +(left \+|FLIPPED) .* (\d|none)$", re.M)
    assert columns.findall(inspection) == columns.findall(printed[1]) != []
    texts = [line for line in inspection.splitlines() if not line.startswith("drive_")]
    assert [line for line in texts[1:] if line not in printed[1]] == []
    for name in ("rollout.mp4", "rollout.png", "slalom.mp4"):
        assert (tmp_path / name).stat().st_size > 1000
