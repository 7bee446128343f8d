"""Tests of the command line, run as a user runs it."""

import ast
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner, Result

from driving_sim.cli import app, with_flags
from driving_sim.data.actions.reading import Reading
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.demo import DemoConfig
from driving_sim.engine.config import to_dict
from driving_sim.engine.errors import Interrupted
from driving_sim.engine.progress import say
from driving_sim.evaluate.futures.measure import measure_futures
from driving_sim.evaluate.measure import (
    measure_tokenizer,
    measure_world_model,
)
from driving_sim.evaluate.world_model import FULL, QUICK
from driving_sim.pipeline import model_and_drives, roll_out, tokenize_videos
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.training.presets import PRESETS
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.small_files import small_files
from tests.fixtures.synthetic_worlds import write_futures

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "av", "decord", "driving_sim.engine.config", "matplotlib", "PIL")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + result.stderr
    return result


def follow(result: Result, *more: str) -> Result:
    """Run the next command that an earlier command's output suggests, with `more` arguments."""
    return succeed(*result.stdout.split("next: drivesim ")[1].split(), *more)


def refused(*arguments: str | Path) -> str:
    """Run a command that must fail, and return its error line."""
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


def settle_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into `folder`, and set the environment for training runs of two steps on the CPU."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DRIVESIM_PRESET", "demo")
    monkeypatch.setenv("DRIVESIM_STEPS", "2")
    monkeypatch.setenv("DRIVESIM_DEVICE", "cpu")
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, after making it the current folder."""
    return settle_in(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def finished(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which `tokenize`, `train-world-model` and `rollout` have run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = settle_in(tmp_path_factory.mktemp("finished"), monkeypatch)
        (folder / "videos").symlink_to(videos)
        for command in ("tokenize videos/", "train-world-model", "rollout --actions left"):
            succeed(*command.split())
    return folder


@pytest.fixture
def used(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of `finished`, after making it the current folder."""
    return settle_in(finished, monkeypatch)


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


def test_help_shows_whole_summaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    groups: list[Any] = [typer.main.get_command(app)]
    groups += [command for command in groups[0].commands.values() if hasattr(command, "commands")]
    for group, words in zip(groups, ([], ["evaluate"]), strict=True):
        help_text = " ".join(succeed(*words, "--help").stdout.split())
        for name, command in group.commands.items():
            assert f" {name} {command.help.splitlines()[0]}" in help_text


def test_tokenize_train_and_rollout_run_with_their_defaults(finished: Path) -> None:
    assert (finished / "rollout.mp4").stat().st_size > 1000
    settings = json.loads((finished / "rollout.json").read_text())
    assert settings["futures"] == ["left"]
    assert settings["frames"] == 40


@pytest.mark.usefixtures("used")
def test_existing_outputs_and_wrong_options_are_refused() -> None:
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
    missing = refused("rollout", "--actions", "left", "--overwrite", "--tokens", "runs/gone")
    assert "name a video with --context" in missing


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_commands_work_in_the_precision_asked_for(used: Path, precision: str) -> None:
    tokenizer, out = "runs/tokenizer", f"runs/{precision}-tokens"
    option = "--precision", precision
    succeed("tokenize", "videos", "--tokenizer", tokenizer, "--out", out, *option)
    index = json.loads((used / out / "index.json").read_text())
    assert index["info"]["precision"] == precision
    report = f"runs/{precision}-report"
    succeed("evaluate", "tokenizer", tokenizer, "videos", "--out", report, *option)
    metrics = json.loads((used / report / "metrics.json").read_text())
    assert metrics["model"]["precision"] == precision
    rollout = "rollout", "--actions", "left", "--seconds", "0.2", "--out", f"runs/{precision}.mp4"
    succeed(*rollout, *option)
    settings = json.loads((used / f"runs/{precision}.json").read_text())
    assert settings["precision"] == {"tokenizer": precision, "world_model": precision}
    heldout = "runs/world-model", "videos"
    succeed("surprise", *heldout, "--out", f"runs/{precision}-surprise", *option)
    surprise = json.loads((used / f"runs/{precision}-surprise" / "surprise.json").read_text())
    assert surprise["settings"]["precision"] == settings["precision"]
    control = succeed("evaluate", "control", *heldout, "--starts", "1", "--seconds", "0.2", *option)
    assert json.loads(control.stdout)["precision"] == settings["precision"]
    wrong = "tokenize", "videos", "--tokenizer", tokenizer, "--out", "runs/x", "--precision", "fp8"
    assert "auto, fp32, bf16" in refused(*wrong)


def test_every_command_that_runs_a_model_has_a_precision_which_is_auto_by_default() -> None:
    group: Any = typer.main.get_command(app)
    commands = group.commands | group.commands["evaluate"].commands
    runs_no_model = {"synth", "inspect", "scaling", "compare", "evaluate"}
    have_precision = {
        name
        for name, command in commands.items()
        if any("--precision" in option.opts and option.default is None for option in command.params)
    }
    assert have_precision == commands.keys() - runs_no_model
    functions: tuple[Any, ...] = (
        Tokenizer.from_run,
        WorldModel.from_run,
        tokenize_videos,
        roll_out,
        measure_tokenizer,
        measure_world_model,
        measure_futures,
        model_and_drives,
    )
    defaults = {signature(function).parameters["precision"].default for function in functions}
    assert defaults == {"auto"}


def test_futures_are_evaluated_and_a_wrong_folder_is_one_line(used: Path) -> None:
    commands, config = (
        {"left": (9.0, 0.08), "brake": (2.0, 0.0)},
        SyntheticConfig(height=96, width=192),
    )
    write_futures(used / "futures", commands, starts=1, context_frames=30, config=config)
    evaluate = "evaluate", "futures", "runs/world-model"
    done = succeed(*evaluate, "futures", "--out", "runs/futures", "--seed", "1")
    assert "nearest to their own future, PSNR, 0.5 to 1.5 s: " in done.stdout
    assert "report -> runs/futures/report.html" in done.stdout
    assert (used / "runs" / "futures" / "futures.png").stat().st_size > 1000
    assert "no context; each start is a folder with context.mp4" in refused(
        *evaluate, "videos", "--out", "runs/other"
    )


def test_presets_are_chosen_by_the_device_and_then_by_the_tokens(
    used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = succeed("train-world-model", "--preset", "auto", "--out", "runs/auto", "--steps", "1")
    assert "using preset demo because frames are 4x8 tokens" in trained.stderr
    config = yaml.safe_load((used / "runs" / "auto" / "config.yaml").read_text())
    assert config["model"] == to_dict(PRESETS["demo"].model)
    monkeypatch.delenv("DRIVESIM_PRESET")
    (used / "nothing").mkdir()
    result = run("train-tokenizer", "nothing")
    assert "using preset tiny because the device is cpu" in result.stderr
    group: Any = typer.main.get_command(app)
    for name in ("train-tokenizer", "tokenize", "train-world-model"):
        presets = [option for option in group.commands[name].params if option.name == "preset"]
        assert [preset.default for preset in presets] == ["auto"]


def test_the_suggested_next_command_works_with_other_folders(used: Path) -> None:
    train = "train-tokenizer videos --out runs/other --set training.seed=1 --precision fp32"
    succeed(*train.split())
    config = yaml.safe_load((used / "runs" / "other" / "config.yaml").read_text())
    assert config["training"]["precision"] == "fp32"
    mismatch = refused("train-world-model", "--tokenizer", "runs/other", "--out", "runs/mismatched")
    assert "was not made by the tokenizer" in mismatch
    assert not (used / "runs" / "mismatched").exists()

    tokenize = "tokenize videos --tokenizer runs/other --out runs/other-tokens"
    tokenized = succeed(*tokenize.split())
    assert "runs/other: it turns 64x128 pixels into 4x8 tokens" in tokenized.stderr
    trained = follow(tokenized, "--out", "runs/other-world")
    follow(trained, "--seconds", "0.2", "--out", "other.mp4")


@pytest.mark.parametrize(
    "command",
    [
        "synth runs/full-synth --drives 1 --seconds 2",
        # Use no data workers: they pass batches as files in shared memory, to which the limit
        # applies too.
        "train-tokenizer videos --out runs/full-tokenizer --set training.workers=0",
        "tokenize videos --out runs/full-tokens",
        "train-world-model --out runs/full-world --set training.workers=0",
        "rollout --actions left --seconds 0.2 --overwrite",
        "demo --out runs/full-demo",
    ],
)
def test_a_full_disk_gives_a_one_line_error(command: str, used: Path) -> None:
    before = (used / "rollout.mp4").read_bytes()
    with small_files():
        line = refused(*command.split())
    assert "File too large" in line
    assert (used / "rollout.mp4").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "missing"], "no such file"),
        (["rollout"], "--actions"),
        (["rollout", "--actions", "left", "--top-k", "x"], "--top-k"),
        (["rolout"], "rolout"),
        (["--debgu"], "--debgu"),
        (["synth", "x", "--seed", "-1"], "--seed"),
        (["synth", "x", "--seconds", "inf"], "--seconds inf"),
        (["synth", "x", "--set", "trafic=0"], "--set"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--drives", "1"], "--drives"),
        (["tokenize", "empty", "--fps", "0"], "--fps 0"),
        (["evaluate", "tokenizer", "missing", "empty", "--fps", "nan"], "holds no tokenizer"),
        (["train-tokenizer", "empty"], "holds no videos"),
        (["train-world-model"], "no such token store"),
        (["rollout", "--actions", "left"], "holds no world model"),
        (["rollout", "--actions", "left", "--out", "x.gif"], ".mp4"),
        (["train-tokenizer", "empty", "--preset", "tinny"], "no such preset"),
        (["train-tokenizer", "empty", "--set", "training.stepz=3"], "steps"),
        (
            ["train-tokenizer", "empty", "--set", "training.seed=-1", "--steps", "1"],
            "training.seed: must be greater than or equal to 0, found -1",
        ),
        (["train-tokenizer", "empty", "--precision", "fp8"], "'auto', 'fp32' or 'bf16'"),
        (["train-world-model", "--precision", "fp8"], "'auto', 'fp32' or 'bf16'"),
        (["train-tokenizer", "empty", "--steps", "1", "--minutes", "1"], "give only one"),
        (["inspect", "empty", "--steering-kind", "hovering"], "unknown; choose steering_wheel"),
        (["inspect", "empty", "--fps", "inf"], "--fps inf"),
        (["inspect", "empty", "--wheelbase", "a=b"], "--wheelbase a=b: write metres, or a folder"),
        (["inspect", "empty", "--fps", "5", "--every", "2"], "--fps and --every are both given"),
        (["evaluate", "tokenizer", "missing", "empty"], "holds no tokenizer"),
        (["evaluate", "world-model", "missing", "empty", "--sweeps", "0"], "--sweeps"),
        (
            ["evaluate", "world-model", "missing", "empty", "--quick", "--long-seconds", "2"],
            "long_seconds: must be at least 5, found 2",
        ),
    ],
)
def test_mistakes_give_a_one_line_error(
    arguments: list[str], message: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRIVESIM_STEPS")
    (workplace / "empty").mkdir()
    before = sorted(workplace.rglob("*"))
    assert message in refused(*arguments)
    assert sorted(workplace.rglob("*")) == before


def test_an_evaluation_takes_its_counts_from_the_options_and_else_from_quick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []

    def watched(**options: Any) -> dict[str, str]:
        given.append(options)
        return {"figure": "1 [0, 2]"}

    monkeypatch.setattr("driving_sim.evaluate.measure.measure_world_model", watched)
    evaluate = "evaluate", "world-model", "run", "videos"
    assert "figure: 1 [0, 2]\n" in succeed(*evaluate).stdout
    succeed(*evaluate, "--quick", "--training-tokens", "mine")
    options = "--sweeps", "9", "--long-rollouts", "8", "--long-seconds", "7", "--seed", "6"
    succeed(*evaluate, "--quick", *options)
    chosen = replace(QUICK, sweeps=9, long_rollouts=8, long_seconds=7.0, sampling=Sampling(seed=6))
    assert [options["config"] for options in given] == [FULL, QUICK, chosen]
    assert [options.get("training_tokens") for options in given] == [None, Path("mine"), None]
    assert {options["usual_tokens"] for options in given} == {Path("runs/tokens")}
    helps = {option.name: option.help for option in commands()["evaluate world-model"].params}
    for name in ("sweeps", "long_rollouts", "long_seconds"):
        full, quick = (getattr(config, name) for config in (FULL, QUICK))
        assert f"[default: {full:g}; quick {quick:g}]" in helps[name]


def test_options_override_the_environment(workplace: Path) -> None:
    """`--minutes` overrides `DRIVESIM_STEPS`, so the two do not conflict."""
    (workplace / "empty").mkdir()
    assert "holds no videos" in refused("train-tokenizer", "empty", "--minutes", "1")


@pytest.mark.parametrize("arguments", [[], ["evaluate"]])
def test_a_bare_group_of_commands_shows_its_help(arguments: list[str]) -> None:
    result = run(*arguments)
    assert "Usage:" in result.output
    assert "error:" not in result.output


def test_missing_lpips_weights_name_an_option_that_tokenize_has(
    videos: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    line = refused("tokenize", videos, "--set", "objective.lpips_weight=1")
    assert "without LPIPS (--set objective.lpips_weight=0)" in line
    assert sorted(workplace.iterdir()) == []


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    all_commands = group.commands | {
        f"evaluate {name}": command for name, command in group.commands["evaluate"].commands.items()
    }
    return {name: command for name, command in all_commands.items() if name != "evaluate"}


def modules_except_cli() -> Iterator[ast.Module]:
    """Yield the parsed source of every module except `cli.py`, and those that it does not use."""
    for room in ("driving_sim", "data", "tokenizer", "world_model"):
        # os.walk does not follow symbolic links, so it visits no file twice.
        for folder, rooms, names in os.walk(ROOT / room):
            rooms[:] = [name for name in rooms if name != "env"]
            for name in names:
                if name.endswith(".py") and name != "cli.py":
                    yield ast.parse((Path(folder) / name).read_text("utf-8"))


def test_only_the_command_line_names_flags() -> None:
    options = [option for command in commands().values() for option in command.params]
    flags = {flag for option in options for flag in option.opts}
    assert "--init-from" in flags
    texts = [
        node.value
        for module in modules_except_cli()
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert {word for text in texts for word in re.findall(r"--[\w-]+", text)}.isdisjoint(flags)


def test_every_command_has_words_for_every_setting_that_an_error_names() -> None:
    names = set()
    for module in modules_except_cli():
        raised = [node for node in ast.walk(module) if isinstance(node, ast.Raise)]
        for text in (ast.unparse(node) for node in raised):
            names |= set(re.findall(r"`([a-z]\w*)[`=]", text))
    assert names >= {"out", "run", "resume", "fps", "steering_kind", "time_offset", "start_s"}
    for name, command in commands().items():
        for setting in names - {"compress"}:  # `compress` is a function, not a setting.
            words = with_flags(f"`{setting}`", command)
            assert "`" not in words, f"{name}: {setting}"


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("train-tokenizer", "go on with `resume`, or in `run`", "go on with --resume, or in --out"),
        ("tokenize", "go on with `resume`", "go on with the same command again"),
        ("tokenize", "choose another `run`", "choose another trained --tokenizer"),
        ("synth", "choose another `out`", "choose another OUT"),
        ("inspect", "try `time_offset=-0.20`", "try --time-offset -0.20"),
        ("inspect", "but `steering_kind` is a", "but --steering-kind is a"),
        ("rollout", "but `steering_kind` is a", "but --steering-kind is a"),
        ("rollout", "`start_s` 9: name one", "--start 9: name one"),
        ("rollout", "tokenize with `fps=10`", "tokenize with --fps 10"),
        ("tokenize", "`objective.lpips_weight=0`", "--set objective.lpips_weight=0"),
        ("rollout", "`drivesim tokenize` made `x`", "`drivesim tokenize` made `x`"),
    ],
)
def test_a_setting_is_named_by_its_flag(command: str, text: str, expected: str) -> None:
    assert with_flags(text, commands()[command]) == expected


def test_a_wheelbase_is_given_for_all_or_for_a_folder(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Reading] = []

    def stop(_: object, __: object, reading: Reading, **___: object) -> None:
        seen.append(reading)
        raise Interrupted("stopped", 130)

    monkeypatch.setattr("driving_sim.data.inspect.inspection.inspect_drives", stop)
    run("inspect", "videos", "--wheelbase", "2.9", "--wheelbase", "videos/rc=0.26")
    run("inspect", "videos")
    assert [reading.wheelbases for reading in seen] == [{"": 2.9, "videos/rc": 0.26}, {}]


def test_an_interrupted_command_says_how_to_continue_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Interrupted("stopped; to go on, give `resume`", 130)

    monkeypatch.setattr("driving_sim.pipeline.tokenize_videos", stop)
    monkeypatch.setattr("driving_sim.pipeline.train_tokenizer_on", stop)
    for command, way in (("tokenize", "the same command again"), ("train-tokenizer", "--resume")):
        result = run(command, "videos")
        assert result.exit_code == 130
        assert result.stderr == f"stopped; to go on, give {way}\n"


def test_notices_also_name_flags(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "driving_sim.pipeline.train_tokenizer_on", lambda *_, **__: say("use `preset`")
    )
    assert "use --preset" in run("train-tokenizer", "videos").stderr


def test_debug_shows_the_traceback(workplace: Path) -> None:
    result = run("--debug", "tokenize", "missing")
    assert result.exit_code == 1
    assert result.exception is not None


def no_room_for_a_process() -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def no_room_on_the_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**60),
        lambda: np.empty(2**50),
        no_room_for_a_process,
        no_room_on_the_device,
    ],
)
def test_too_little_memory_gives_a_one_line_error(
    allocate: Callable[[], object], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = "driving_sim.data.synthetic.writer.write_synthetic_drives"
    monkeypatch.setattr(writer, lambda *_, **__: allocate())
    assert "out of memory: to train, lower data.batch_size" in refused("synth", "out")


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


def test_the_demo_makes_as_many_drives_as_asked(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[DemoConfig] = []
    monkeypatch.setattr(
        "driving_sim.demo.run_demo", lambda out, seed, config: configs.append(config)
    )
    run("demo", "--drives", "160", "--precision", "fp32")
    run("demo")
    assert [config.drives for config in configs] == [160, DemoConfig().drives]
    assert [config.precision for config in configs] == ["fp32", "auto"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing holds no world model"),
        (["synthetic", "--context", "missing"], "no such file"),
        (["synthetic", "--context", "empty"], "holds no videos"),
        (["synthetic", "--host", "203.0.113.1"], "cannot listen on --host 203.0.113.1"),
        (["synthetic", "--port", "99999"], "--port"),
        (["synthetic", "--sessions", "0"], "--sessions"),
        (["synthetic", "--record", "videos/drive_000.mp4"], "drive_000.mp4"),
    ],
)
def test_play_says_in_one_line_why_it_does_not_start(
    arguments: list[str], message: str, used: Path
) -> None:
    (used / "empty").mkdir(exist_ok=True)
    assert message in refused("play", *arguments, "--no-browser")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "3"], "leave out --seed"),
        (["--actions", "left"], "leave out --actions"),
        ([], "missing.json"),
    ],
)
def test_a_replay_takes_the_drive_from_its_file_alone(options: list[str], message: str) -> None:
    assert message in refused("rollout", "--replay", "missing.json", *options)
