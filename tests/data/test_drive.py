import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driving_sim.data.actions.action_log import ActionLog, SteeringKind
from driving_sim.data.drive import Drive, DriveSet, Skipped, VideoFrames, sample
from driving_sim.data.video.file_facts import read_facts
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.writer import write_video
from driving_sim.engine.errors import BadDriveError, DriveSimError

FPS = 10
SIZE = FrameSize(height=16, width=32)


def make_log(times: np.ndarray, kind: SteeringKind = "road_wheel") -> ActionLog:
    return ActionLog.on_one_clock(times, np.stack([times, -times], axis=1), kind)


@pytest.fixture
def drive(tmp_path: Path) -> Drive:
    """A drive whose frame n has grey level 20 * n, and whose speed at x seconds is x m/s."""
    levels = np.arange(12, dtype=np.uint8) * 20
    frames = np.broadcast_to(levels[:, None, None, None], (12, 32, 64, 3))
    write_video(tmp_path / "a.mp4", frames, FPS)
    facts = read_facts(tmp_path / "a.mp4")
    log = make_log(np.arange(0, 1.3, 0.05))
    reader = VideoFrames(facts)
    return Drive(id="a", source="video", timestamps=facts.timestamps, reader=reader, log=log)


def test_frames_and_stream_agree_after_pickling(drive: Drive) -> None:
    drive = pickle.loads(pickle.dumps(drive))
    streamed = np.stack(list(drive.stream(SIZE)))
    assert streamed.shape == (12, 16, 32, 3)
    assert streamed.dtype == np.uint8
    np.testing.assert_allclose(streamed.mean(axis=(1, 2, 3)), np.arange(12) * 20, atol=3)
    np.testing.assert_allclose(drive.frames([7, 2], SIZE), streamed[[7, 2]], atol=1)
    np.testing.assert_array_equal(list(drive.stream(SIZE, [2, 7])), streamed[[2, 7]])
    assert drive.timestamps[-1] == pytest.approx(1.1)


def test_a_video_is_not_decoded_in_this_process(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("driving_sim.data.video.reader.open_video")
    monkeypatch.delattr("driving_sim.data.video.reader._read_decord")
    assert len(list(drive.stream(SIZE))) == 12
    assert len(drive.frames([7, 2], SIZE)) == 2


def test_a_sample_has_the_actions_between_its_own_frames(drive: Drive) -> None:
    sampled = sample(drive, every=3)
    assert sampled.indices.tolist() == [0, 3, 6, 9]
    np.testing.assert_allclose(sampled.timestamps, [0, 0.3, 0.6, 0.9], atol=1e-6)
    np.testing.assert_allclose(sampled.actions[:3, 0], [0.15, 0.45, 0.75], atol=1e-5)
    np.testing.assert_allclose(sampled.actions[:, 1], -sampled.actions[:, 0])
    assert sampled.action_valid[:3].all()
    assert sampled.segments == [(0, 4)]
    np.testing.assert_array_equal(sample(drive, fps=10 / 3).indices, sampled.indices)
    np.testing.assert_array_equal(sample(drive).indices, np.arange(12))


def test_a_drive_without_a_log_has_no_valid_actions(drive: Drive) -> None:
    bare = Drive(id="b", source="video", timestamps=drive.timestamps, reader=drive.reader)
    assert not sample(bare).action_valid.any()


def test_kinds_of_steering_do_not_mix(drive: Drive) -> None:
    wheel = Drive(
        id="wheel",
        source="video",
        timestamps=drive.timestamps,
        reader=drive.reader,
        log=make_log(drive.timestamps, "steering_wheel"),
    )
    assert DriveSet([drive]).steering_kind == "road_wheel"
    assert DriveSet([]).steering_kind is None
    with pytest.raises(DriveSimError, match=r"road_wheel \(a\), steering_wheel \(wheel\)"):
        _ = DriveSet([drive, wheel]).steering_kind


def test_requiring_all_drives_names_the_first_that_is_bad(drive: Drive) -> None:
    good = DriveSet([drive])
    assert good.require_all() is good
    bad = [Skipped(id=name, reason=f"{name}.mp4: is empty") for name in "xy"]
    with pytest.raises(BadDriveError, match=r"x\.mp4: is empty \(the first of 2 bad drives\);"):
        DriveSet([drive], bad).require_all()


def test_a_sample_is_cut_where_the_video_lost_a_frame(drive: Drive) -> None:
    later = np.where(np.arange(12) < 6, 0.0, 0.25)  # Frames are missing before frame 6.
    gappy = Drive(
        id="gappy", source="video", timestamps=drive.timestamps + later, reader=drive.reader
    )
    assert sample(gappy, every=2).segments == [(0, 3), (3, 6)]
    assert sample(gappy, fps=5).segments == [(0, 3), (3, 6)]
    assert sample(gappy, fps=2.5).segments == [(0, 4)]  # At this rate no frame is missing.


def test_a_sample_without_its_lost_frames_is_cut_where_they_were(drive: Drive) -> None:
    sampled = sample(drive)
    lost = np.isin(np.arange(12), [0, 4, 5, 9])
    kept = sampled.without(lost)
    assert kept.indices.tolist() == [1, 2, 3, 6, 7, 8, 10, 11]
    assert kept.segments == [(0, 3), (3, 6), (6, 8)]
    np.testing.assert_array_equal(kept.actions, sampled.actions[~lost])
    assert sampled.without(np.zeros(12, bool)) is sampled
    assert sampled.about_losses(np.zeros(12, bool)) == ()
    assert sampled.about_losses(lost) == (
        "damaged at 0.00 s, 0.40 to 0.50 s, 0.90 s; the 4 frames there are left out",
    )


def test_a_lost_frame_is_an_error_where_frames_are_needed(drive: Drive) -> None:
    class Damaged(VideoFrames):
        def stream(self, indices: Any, size: FrameSize | None) -> Iterator[Any]:
            return iter([np.zeros(1), None])

    damaged = replace(drive, reader=Damaged(drive.reader.facts))  # type: ignore[attr-defined]
    with pytest.raises(BadDriveError, match=r"a: is damaged at 0\.7 s; leave this part out"):
        list(damaged.stream(SIZE, [2, 7]))
    assert list(damaged.stream_with_losses(SIZE, [2, 7]))[1] is None


def test_notices_about_the_video_are_those_of_the_drive(tmp_path: Path, drive: Drive) -> None:
    facts = read_facts(tmp_path / "a.mp4")
    noted = replace(drive, assumptions=("one",), video=replace(facts, notices=("two",)))
    assert noted.notices == ("one", "two")


@pytest.mark.parametrize(
    ("rate", "line"),
    [
        (8.1, "all its frames are taken, which makes 8.1 frames/s, not the 10 asked for"),
        (11.4, "all its frames are taken, which makes 11.4 frames/s, not the 10 asked for"),
        (27, "one of 3 frames is taken, which makes 9 frames/s, not the 10 asked for"),
        (14, "its 14 frames/s are resampled to 10: the frames nearest to each tick"),
        (29.97, None),
        (10, None),
    ],
)
def test_what_a_rate_means_for_a_drive_is_said(drive: Drive, rate: float, line: str | None) -> None:
    other = replace(drive, timestamps=np.arange(300) / rate, log=None)
    notices = sample(other, fps=10).notices
    assert [text.startswith(line or "") for text in notices] == [True] * (line is not None)
    assert sample(other).notices == ()


def test_gaps_are_said(drive: Drive) -> None:
    times = np.concatenate([np.arange(50) / 10, 12 + np.arange(50) / 10])
    (line,) = sample(replace(drive, timestamps=times, log=None), fps=10).notices
    assert line == "1 gap without frames at this rate, 7.1 s in all"
