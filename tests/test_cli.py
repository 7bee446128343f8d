"""The command line as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from driving_sim.cli import app
from driving_sim.data.synthetic import SyntheticConfig, write_synthetic_drives

HEAVY = ("torch", "numpy", "av", "decord", "matplotlib", "PIL")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """The one line of a command that fails."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "videos"
    config = SyntheticConfig(height=96, width=192, fps=10)
    write_synthetic_drives(folder, drives=3, seconds=3, config=config)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and settings for a training of two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRIVESIM_PRESET", "demo")
    monkeypatch.setenv("DRIVESIM_STEPS", "2")
    monkeypatch.setenv("DRIVESIM_DEVICE", "cpu")
    return tmp_path


@pytest.mark.parametrize("command", [[], ["rollout"], ["train-world-model"], ["evaluate"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    script = (
        "import sys\n"
        "from driving_sim.cli import app\n"
        f"app({[*command, '--help']!r}, standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


def test_the_owners_three_commands_run_as_written(videos: Path, workplace: Path) -> None:
    (workplace / "videos").symlink_to(videos)
    for command in (
        "tokenize videos/",
        "train-world-model",
        "rollout --actions left",
    ):
        result = run(*command.split())
        assert result.exit_code == 0, result.output + result.stderr
    assert (workplace / "rollout.mp4").stat().st_size > 1000
    settings = json.loads((workplace / "rollout.json").read_text())
    assert settings["futures"] == ["left"]
    assert settings["frames"] == 40

    again = refused("rollout", "--actions", "left")
    assert "rollout.mp4 exists" in again
    assert "--overwrite" in again
    assert "runs/tokens" in refused("tokenize", "videos")
    assert "--resume" in refused("train-world-model")
    assert "did you mean 'left'" in refused("rollout", "--actions", "lefft", "--overwrite")
    assert "--start 99" in refused("rollout", "--actions", "left", "--start", "99", "--overwrite")
    assert "temperature" in refused(
        "rollout", "--actions", "left", "--temperature", "-1", "--overwrite"
    )

    other = run("train-tokenizer", "videos", "--out", "runs/other", "--set", "training.seed=1")
    assert other.exit_code == 0, other.stderr
    mismatch = refused("train-world-model", "--tokenizer", "runs/other", "--out", "runs/mismatched")
    assert "was not made by the tokenizer" in mismatch
    assert not (workplace / "runs" / "mismatched").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "missing"], "no such file"),
        (["rollout"], "--actions"),
        (["rollout", "--actions", "left", "--top-k", "x"], "--top-k"),
        (["rolout"], "rolout"),
        (["tokenize", "empty", "--fps", "0"], "--fps 0"),
        (["evaluate", "tokenizer", "missing", "empty", "--fps", "nan"], "holds no tokenizer"),
        (["train-tokenizer", "empty"], "holds no videos"),
        (["train-world-model"], "no such token store"),
        (["rollout", "--actions", "left"], "holds no world model"),
        (["rollout", "--actions", "left", "--out", "x.gif"], ".mp4"),
        (["train-tokenizer", "empty", "--preset", "tinny"], "presets are"),
        (["train-tokenizer", "empty", "--set", "training.stepz=3"], "steps"),
        (["train-tokenizer", "empty", "--steps", "1", "--minutes", "1"], "give one"),
        (["inspect", "empty", "--steering-kind", "hovering"], "kinds are"),
        (["evaluate", "tokenizer", "missing", "empty"], "holds no tokenizer"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRIVESIM_STEPS")
    (workplace / "empty").mkdir()
    before = sorted(workplace.rglob("*"))
    assert message in refused(*arguments)
    assert sorted(workplace.rglob("*")) == before


def test_debug_shows_the_traceback(workplace: Path) -> None:
    result = run("--debug", "tokenize", "missing")
    assert result.exit_code == 1
    assert result.exception is not None


def test_a_bad_file_among_good_ones(videos: Path, workplace: Path) -> None:
    folder = workplace / "videos"
    folder.mkdir()
    for path in videos.glob("drive_00*.*"):
        (folder / path.name).symlink_to(path)
    (folder / "broken.mp4").write_bytes(b"not a video")
    assert run("train-tokenizer", videos).exit_code == 0
    line = refused("tokenize", folder)
    assert "broken.mp4" in line
    assert "--skip-bad" in line
    assert not (workplace / "runs" / "tokens" / "index.json").exists()
    result = run("tokenize", folder, "--skip-bad")
    assert result.exit_code == 0, result.stderr
    index = json.loads((workplace / "runs" / "tokens" / "index.json").read_text())
    assert index["drives"] == 3
    assert [skipped["id"] for skipped in index["skipped"]] == ["broken"]
