"""Tests of the functions behind the commands, which make decisions for the user."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from driving_sim import pipeline
from driving_sim.data.actions.reading import Reading
from driving_sim.data.synthetic.contexts import write_contexts
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.data.tokens.store import TokenStore
from driving_sim.engine import run_folder
from driving_sim.engine.config import load_json
from driving_sim.engine.errors import BadDriveError, DriveSimError
from driving_sim.engine.run_folder import FINISHED
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.pipeline import TrainingRequest, roll_out, tokenize_videos, train_tokenizer_on
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.training.presets import PRESETS as WORLD_MODEL_PRESETS
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import FPS, write_store
from tests.fixtures.video_files import write_undecodable
from tests.fixtures.world_models import new_world

REQUEST = TrainingRequest(preset="demo", steps=1, device="cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "videos"
    config = SyntheticConfig(height=48, width=64, fps=FPS)
    write_synthetic_drives(folder, drives=2, seconds=3, config=config)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a world model that was validated on drive 1."""
    world = new_world()
    path = tmp_path_factory.mktemp("world")
    validated = WorldModel(
        world.transformer,
        world.tokenizer,
        fps=FPS,
        steering_kind="road_wheel",
        validation_drives=["1"],
    )
    validated.save(path)
    return path


def test_a_requested_length_has_no_min_steps() -> None:
    def training_config(**options: Any) -> TrainingConfig:
        request = TrainingRequest(preset="demo", device="cpu", **options)
        return request.resolve(WORLD_MODEL_PRESETS).training

    assert training_config().minutes
    assert training_config().min_steps
    assert training_config(minutes=0.1).min_steps is None
    assert training_config(steps=3).min_steps is None
    assert training_config(assignments=("training.min_steps=7",)).min_steps == 7


def test_a_missing_tokenizer_is_trained_and_an_unfinished_one_is_resumed(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokenized(steps: int, preset: str = "demo") -> TokenStore:
        request = TrainingRequest(preset=preset, steps=steps, device="cpu")
        out = tmp_path / str(steps)
        tokenize_videos([videos], tokenizer, out, training=request, device="cpu")
        return TokenStore(out)

    tokenizer = tmp_path / "tokenizer"
    tokenized(1)
    assert "does not exist: starting its training" in capsys.readouterr().err
    (tokenizer / FINISHED).unlink()
    with pytest.raises(
        DriveSimError,
        match=r"now it is .*same configuration or choose another `run`$",
    ):
        tokenized(2, "tiny")
    capsys.readouterr()
    store = tokenized(2)
    assert "is unfinished: resuming its training" in capsys.readouterr().err
    assert load_json(tokenizer / FINISHED)["steps"] == 2
    assert (tokenizer / "checkpoints" / "step-00000001").exists()

    # A finished tokenizer is used as it is, whatever training is requested. This also holds for a
    # copy without the run's other files.
    assert tokenized(3, "tiny").info.tokenizer_fingerprint == store.info.tokenizer_fingerprint
    copy = tmp_path / "copy"
    Tokenizer.from_run(tokenizer, "cpu").save(copy)
    tokenizer = copy
    assert tokenized(4).info.tokenizer_fingerprint == store.info.tokenizer_fingerprint
    assert f"using the tokenizer {copy}: it turns 64x128 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "grid", "preset", "reason"),
    [
        ("cuda", None, "base", "the device is cuda"),
        ("mps", None, "tiny", "the device is mps"),
        ("cpu", None, "tiny", "the device is cpu"),
        ("cuda", (8, 16), "tiny", "frames are 8x16 tokens"),
        ("cuda", (4, 8), "demo", "frames are 4x8 tokens"),
        ("cpu", (16, 32), "base", "frames are 16x32 tokens"),
        ("cuda", (3, 4), "base", "the device is cuda"),
        ("cpu", (3, 4), "tiny", "the device is cpu"),
    ],
)
def test_auto_chooses_a_preset_by_the_tokens_or_the_device(
    device: str,
    grid: tuple[int, int] | None,
    preset: str,
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "resolve_device", lambda name: torch.device(device))
    assert TrainingRequest().resolve(WORLD_MODEL_PRESETS, grid) == WORLD_MODEL_PRESETS[preset]
    notice, *warnings = capsys.readouterr().err.splitlines()
    assert notice == f"using preset {preset} because {reason} (use `preset` to choose another)"
    is_slow = preset == "base" and device == "cpu"
    warning = "preset base is made for CUDA GPUs and is slow on cpu; tiny is for CPUs"
    assert warnings == is_slow * [warning]
    # A named preset is used without a notice.
    named = TrainingRequest(preset="demo").resolve(WORLD_MODEL_PRESETS, grid)
    assert named == WORLD_MODEL_PRESETS["demo"]
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_no_run_is_refused_as_the_tokenizer(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(DriveSimError, match=r"is not a run: choose another `run`$"):
        tokenize_videos([videos], tmp_path, tmp_path / "tokens", training=REQUEST)


def roll(run: Path, out: Path, **options: object) -> dict[str, object]:
    arguments = {"tokens": out / "tokens", "seconds": 2 / FPS, "sampling": Sampling()} | options
    return roll_out(run, ["left"], out / "rollout.mp4", overwrite=True, **arguments)  # type: ignore[arg-type]


def test_a_rollout_starts_from_a_drive_that_was_not_trained_on(run: Path, tmp_path: Path) -> None:
    fingerprint = WorldModel.from_run(run, "cpu").tokenizer.fingerprint
    for drives, chosen in ((3, "1 (reconstructed)"), (1, "0 (reconstructed)")):
        store = tmp_path / str(drives)
        write_store(store, [20] * drives, fingerprint=fingerprint)
        context = roll(run, tmp_path, tokens=store)["context"]
        assert isinstance(context, dict)
        assert context["drive"] == chosen


def test_an_error_for_tokens_that_do_not_fit_the_model_suggests_a_context(
    run: Path, tmp_path: Path
) -> None:
    world = WorldModel.from_run(run, "cpu")
    with pytest.raises(DriveSimError, match=r"no such token store.*name a video with `context`$"):
        roll(run, tmp_path)
    write_store(tmp_path / "tokens", [20])
    with pytest.raises(DriveSimError, match=r"not made by the model.*name a video with `context`$"):
        roll(run, tmp_path)
    store = tmp_path / "fitting"
    write_store(store, [20], fingerprint=world.tokenizer.fingerprint)
    for change in ({"fps": 2 * FPS}, {"steering_kind": "curvature"}):
        options = {"fps": FPS, "steering_kind": "road_wheel"} | change
        changed = WorldModel(world.transformer, world.tokenizer, **options)  # type: ignore[arg-type]
        changed.save(tmp_path / "other")
        with pytest.raises(DriveSimError, match=r"the model.*name a video with `context`$"):
            roll(tmp_path / "other", tmp_path, tokens=store)


def test_a_run_with_contexts_starts_from_its_first_one(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "models" / "own"
    shutil.copytree(run, own)
    drive = videos / "drive_000.json"
    moments = {"morning": (drive, 0.5), "evening": (drive, 0.0)}
    write_contexts(own / "contexts", moments, seconds=1.5)
    store = write_store(
        tmp_path / "tokens", [20], fingerprint=WorldModel.from_run(run, "cpu").tokenizer.fingerprint
    ).path
    monkeypatch.setattr(run_folder, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    Path("evening").touch()  # Only a context that the user names can be a file.

    def start(**options: object) -> object:
        report = roll(Path("own"), tmp_path, **({"tokens": None} | options))
        assert isinstance(report["context"], dict)
        return report["context"]["drive"], report["context"]["start_s"]

    assert start() == ("evening", 1.5)
    assert start(start_s=1.0) == ("evening", 1.0)
    assert start(context="morning") == start(context="morning", tokens=store) == ("morning", 1.5)
    assert start(tokens=store)[0] == "0 (reconstructed)"  # type: ignore[index]
    assert start(context=videos / "drive_000.mp4")[0] == "drive_000"  # type: ignore[index]
    message = (
        r"`context` noon: no such file, and the model has no .* its contexts are evening, morning$"
    )
    with pytest.raises(DriveSimError, match=message):
        start(context="noon")


def test_a_run_without_contexts_starts_from_the_default_tokens(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DriveSimError, match=r"^runs.tokens: no such token store"):
        roll(run, tmp_path, tokens=None)
    with pytest.raises(DriveSimError, match=r"^noon: no such file or folder$"):
        roll(run, tmp_path, tokens=None, context="noon")


def test_a_context_is_a_single_drive_with_the_models_kind_of_steering(
    run: Path, videos: Path, tmp_path: Path
) -> None:
    with pytest.raises(DriveSimError, match="contains 2 drives; name the video"):
        roll(run, tmp_path, context=videos)
    video = tmp_path / "drive.mp4"
    video.symlink_to(videos / "drive_000.mp4")
    rows = [f"{100 + t / FPS},5,0.1" for t in range(25)]
    for column, message in (
        ("steering_rad", "is steering_wheel, but road_wheel is needed"),
        ("road_wheel_rad", "`time_offset`"),
    ):
        header = f"timestamp_s,speed_mps,{column}"
        video.with_suffix(".csv").write_text("\n".join([header, *rows]) + "\n")
        with pytest.raises(DriveSimError, match=message):
            roll(run, tmp_path, context=video)
    roll(run, tmp_path, context=video, reading=Reading(time_offset=-100.0))

    # A model that learned no actions does not read the CSV, so an invalid CSV does not matter.
    world = WorldModel.from_run(run, "cpu")
    video.with_suffix(".csv").write_text("not,a,number\n")
    with pytest.raises(DriveSimError):
        roll(run, tmp_path, context=video)
    blind = Transformer(world.config.model, world.config.grid, ActionStatistics())
    WorldModel(blind, world.tokenizer, fps=FPS, steering_kind=None).save(tmp_path / "blind")
    roll_out(
        tmp_path / "blind",
        ["straight"],
        tmp_path / "blind.mp4",
        tokens=tmp_path,
        context=video,
        seconds=2 / FPS,
        sampling=Sampling(),
    )


def test_skip_bad_covers_damage_that_only_decoding_detects(videos: Path, tmp_path: Path) -> None:
    """The file's header is intact, so only the tokenizer's training finds the damage."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in videos.glob("drive_*.*"):
        (folder / path.name).symlink_to(path)
    write_undecodable(folder / "damaged.hevc")
    with pytest.raises(BadDriveError, match="truncated or damaged"):
        train_tokenizer_on([folder], tmp_path / "stopped", REQUEST)
    train_tokenizer_on([folder], tmp_path / "run", REQUEST, skip_bad=True)
    out = tmp_path / "tokens"
    tokenize_videos(
        [folder], tmp_path / "tokenizer", out, training=REQUEST, skip_bad=True, device="cpu"
    )
    store = TokenStore(out)
    assert store.drive_ids == ("drive_000", "drive_001")
    assert [skipped.id for skipped in store.index.skipped] == ["damaged"]


def test_tokenize_says_what_it_passed_over(
    videos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    (folder / "notes.txt").touch()
    (folder / "drive" / "meta").mkdir(parents=True)
    (folder / "drive" / "meta" / "info.json").write_text('{"codebase_version": "v3.0"}')
    tokenize_videos([folder], run / "tokenizer", tmp_path / "tokens", device="cpu")
    said = capsys.readouterr().err
    assert f"{folder}: passed over 1 other file: 1 .txt" in said
    assert f"{folder / 'drive'}: is a LeRobot data set, which drivesim does not" in said
    lerobot, texts = TokenStore(tmp_path / "tokens").index.passed_over
    assert texts == "videos: passed over 1 other file: 1 .txt"
    assert lerobot.startswith("drive: is a LeRobot data set")
    with pytest.raises(DriveSimError, match=r"is a world model, not a tokenizer; its tokenizer is"):
        tokenize_videos([folder], run, tmp_path / "again", device="cpu")
