import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.actions.action_file import read_action_file
from driving_sim.data.actions.action_log import ActionLog
from driving_sim.data.actions.reading import Reading
from driving_sim.data.arrays import Floats
from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.engine.config import to_dict
from driving_sim.engine.errors import DriveSimError
from driving_sim.pipeline import drive_again
from driving_sim.play import recorder
from driving_sim.play.car import Held
from driving_sim.play.drive import Drive
from driving_sim.play.recorder import Recorder
from driving_sim.play.replay import Replay, checksum
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import HISTORY_S
from tests.fixtures.token_drives import FPS
from tests.fixtures.world_models import W

LEFT, RIGHT = Held(wheel=1.0, throttle=1.0), Held(wheel=-1.0, brake=0.4)


class Recording:
    """A drive and its recorder, together."""

    def __init__(self, drive: Drive, folder: Path, held_back: int = 100) -> None:
        self.drive = drive
        folder.mkdir(exist_ok=True)
        self.recorder = Recorder(folder, drive.now(), fps=FPS, held_back=held_back)

    def go(self, held: Held, frames: int) -> None:
        for _ in range(frames):
            self.recorder.add(self.drive.step(held))

    def back(self, frames: int) -> None:
        self.drive.rewind(frames / FPS)
        self.recorder.go_back(self.drive.now())

    def finish(self) -> Path | None:
        drive, first = self.drive, self.recorder.first_frame
        return self.recorder.finish(drive.as_replay(first), drive.actions, "road_wheel")


def recorded(drive: Drive, folder: Path) -> Path:
    """Record a drive with a rewind and a change of the settings; return the video."""
    drive.step(LEFT)
    recording = Recording(drive, folder)
    recording.go(LEFT, 6)
    recording.back(3)
    drive.sampling = Sampling(temperature=0.7, seed=5)
    recording.go(RIGHT, 8)
    path = recording.finish()
    assert path is not None
    return path


def rows(log: ActionLog) -> Floats:
    """Return the speed and steering of a log whose channels have the same times, [M, 2]."""
    assert log.speed is not None
    assert log.steering is not None
    return np.stack([log.speed.values, log.steering.values], axis=1)


def test_a_recording_is_a_drive_like_any_other(drive: Drive, tmp_path: Path) -> None:
    video = recorded(drive, tmp_path)
    (found,) = find_drives([tmp_path]).require_all().drives
    sampled = sample(found)
    assert found.id == video.stem
    assert sampled.fps == pytest.approx(FPS)
    assert len(sampled.timestamps) == drive.frame  # it began after the first frame
    np.testing.assert_allclose(sampled.actions[:-1], drive.actions[1:], atol=1e-3)
    assert sampled.action_valid[:-1].all()
    assert found.log is not None
    assert found.log.steering_kind == "road_wheel"


def test_the_video_shows_the_frames_of_the_drive(drive: Drive, tmp_path: Path) -> None:
    recording = Recording(drive, tmp_path, held_back=2)
    shown = [drive.now().pixels]
    for held in (LEFT, LEFT, RIGHT, RIGHT, RIGHT):
        moment = drive.step(held)
        recording.recorder.add(moment)
        shown.append(moment.pixels)
    recording.finish()
    (found,) = find_drives([tmp_path]).drives
    frames = found.frames(np.arange(len(shown))).astype(int)
    # The frames of a random tokenizer are noise, which no video keeps exactly.
    distances = [[np.abs(frame - other).mean() for other in shown] for frame in frames]
    assert np.argmin(distances, axis=1).tolist() == list(range(len(shown)))


def test_going_back_behind_the_first_frame_begins_there(drive: Drive, tmp_path: Path) -> None:
    for _ in range(5):
        drive.step(LEFT)
    recording = Recording(drive, tmp_path)
    recording.go(LEFT, 2)
    recording.back(4)
    assert recording.recorder.first_frame == drive.frame == 3
    recording.go(RIGHT, 3)
    path = recording.finish()
    assert path is not None
    assert Replay.load(path.with_suffix(".json")).first_frame == 3
    log = read_action_file(path.with_suffix(".csv"), Reading())
    np.testing.assert_allclose(rows(log)[::2][:-1], drive.actions[3:], atol=1e-6)


def test_a_folder_that_is_gone_costs_the_recording_only(drive: Drive, tmp_path: Path) -> None:
    recording = Recording(drive, tmp_path / "recordings")
    recording.go(LEFT, 3)
    shutil.rmtree(tmp_path / "recordings")
    with pytest.raises(DriveSimError, match="cannot write"):
        recording.finish()


def test_a_drive_whose_frame_failed_can_still_be_kept(drive: Drive, tmp_path: Path) -> None:
    recording = Recording(drive, tmp_path)
    recording.go(LEFT, 3)
    drive.close()  # as an out of memory does
    assert recording.finish() is not None


def test_going_back_again_and_again_keeps_the_video_right(drive: Drive, tmp_path: Path) -> None:
    recording = Recording(drive, tmp_path, held_back=round(HISTORY_S * FPS) + W)
    recording.go(LEFT, 300)
    for _ in range(8):
        recording.back(5 * round(FPS))
    recording.go(RIGHT, 4)
    path = recording.finish()
    assert path is not None
    (found,) = find_drives([tmp_path]).drives
    assert len(found.timestamps) == drive.frame + 1
    log = read_action_file(path.with_suffix(".csv"), Reading())
    np.testing.assert_allclose(rows(log)[::2][:-1], drive.actions, atol=1e-6)


def test_without_actions_there_is_no_table(drive: Drive, tmp_path: Path) -> None:
    recording = Recording(drive, tmp_path)
    recording.go(LEFT, 3)
    unknown = np.full_like(drive.actions, np.nan)
    recording.recorder.finish(drive.as_replay(0), unknown, None)
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".json"}


def test_a_recording_that_cannot_be_finished_leaves_nothing(
    drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = Recording(drive, tmp_path)
    recording.go(LEFT, 3)

    def full(*_: object) -> None:
        raise DriveSimError("no room")

    monkeypatch.setattr(recorder, "save_json", full)
    with pytest.raises(DriveSimError, match="no room"):
        recording.finish()
    assert not list(tmp_path.iterdir())


def test_a_single_frame_is_not_kept(drive: Drive, tmp_path: Path) -> None:
    assert Recording(drive, tmp_path).finish() is None
    assert not list(tmp_path.iterdir())


def test_recordings_at_the_same_time_have_names_of_their_own(drive: Drive, tmp_path: Path) -> None:
    recordings = [Recording(drive, tmp_path) for _ in range(3)]
    for recording in recordings:
        recording.recorder.add(drive.step(LEFT))
    assert len({recording.finish() for recording in recordings}) == 3


def test_a_replay_makes_the_same_tokens(drive: Drive, run: Path, tmp_path: Path) -> None:
    drive.model = str(run)
    file = recorded(drive, tmp_path).with_suffix(".json")
    replay = Replay.load(file)
    assert replay.rewinds == ((7, 4),)
    assert [change.frame for change in replay.changes] == [0, 4]
    made = [checksum(frame.tokens[0]) for frame in replay.drive(drive.world, drive.start.context)]
    assert made == list(replay.checksums)
    report = drive_again(file, tmp_path / "again.mp4", device="cpu", precision="fp32")
    assert report["first_difference"] is None
    assert report["frames"] == drive.frame


@pytest.mark.parametrize("guidances", [(2.0,), (2.0, 1.0), (1.0, 2.0, 1.0, 2.0)])
def test_a_replay_follows_every_change_of_the_settings(
    drive: Drive, guidances: tuple[float, ...]
) -> None:
    for guidance in guidances:
        drive.sampling = Sampling(guidance=3.0)  # never used
        drive.sampling = Sampling(guidance=guidance)
        for _ in range(4):
            drive.step(LEFT)
        drive.rewind(1 / FPS)
        drive.sampling = Sampling(guidance=guidance)
    drive.step(RIGHT)
    replay = drive.as_replay(0)
    assert [
        checksum(frame.tokens[0]) for frame in replay.drive(drive.world, drive.start.context)
    ] == list(replay.checksums)


def test_a_replay_says_where_the_tokens_differ(drive: Drive, run: Path, tmp_path: Path) -> None:
    drive.model = str(run)
    file = recorded(drive, tmp_path).with_suffix(".json")
    text = file.read_text("utf-8")
    third = Replay.load(file).checksums[2]
    file.write_text(text.replace(str(third), str(third ^ 1)), "utf-8")
    report = drive_again(file, tmp_path / "again.mp4", device="cpu", precision="fp32")
    assert report["first_difference"] == 3


def test_a_replay_needs_its_own_model(drive: Drive, tmp_path: Path) -> None:
    replay = drive_replay(drive)
    with pytest.raises(DriveSimError, match="name the model with `model`"):
        Replay.load(written(tmp_path, replay.replace(drive.world.fingerprint, "0" * 64))).context(
            drive.world
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("recorded drive 1", "recorded drive 9"), "not the JSON of a drive"),
        (('"fps": 8.0', '"fps": 0.0'), "fps"),
        (('"checksums": [', '"checksums": [1, '), "checksums: must"),
        (('"changes": [', '"changes": [], "more": ['), "more|changes"),
    ],
)
def test_a_damaged_replay_is_refused(
    drive: Drive, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = drive_replay(drive)
    assert change[0] in text
    with pytest.raises(DriveSimError, match=message):
        Replay.load(written(tmp_path, text.replace(*change)))


def drive_replay(drive: Drive) -> str:
    for _ in range(3):
        drive.step(LEFT)
    return json.dumps(to_dict(drive.as_replay(0)))


def written(folder: Path, text: str) -> Path:
    path = folder / "drive.json"
    path.write_text(text, "utf-8")
    return path
