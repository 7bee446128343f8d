"""The Python of docs/env.md runs."""

import re
import shutil
from pathlib import Path

import pytest

from driving_sim.engine import run_folder
from driving_sim.env import LaneProbe
from driving_sim.env.lane_probe import PROBE_FILE, _Network
from tests import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "env.md").read_text("utf-8"), re.S)


@pytest.mark.parametrize(
    "code", [code for code in BLOCKS if "gymnasium" in code and "stable_baselines3" not in code]
)
def test_the_pages_python_runs(
    code: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model takes the place of the packaged one."""
    shutil.copytree(run, tmp_path / "synthetic")
    LaneProbe(_Network()).save(tmp_path / "synthetic" / PROBE_FILE)
    monkeypatch.setattr(run_folder, "MODELS", tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    exec(compile(code, "docs/env.md", "exec"), {})


def test_the_page_has_examples() -> None:
    assert len(BLOCKS) == 5
