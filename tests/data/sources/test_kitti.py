import os
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives, kitti
from tests.data.sources.recordings import (
    greys,
    kitti_stamps,
    only_drive,
    reason,
    touch,
    write_grey,
    write_kitti,
)

CURVATURE = "the steering is the curvature of the path: the yaw rate divided by the speed"


def test_a_recording_of_kitti(tmp_path: Path) -> None:
    speeds, yaw_rates = np.linspace(8, 22, 15), np.linspace(0.8, -0.6, 15)
    write_kitti(tmp_path / "2011_09_26_drive_0001_sync", [*speeds], [*yaw_rates])
    drive_set = find_drives([tmp_path])
    (drive,) = drive_set.drives
    assert (drive.id, drive.source) == ("2011_09_26_drive_0001_sync", "kitti")
    assert drive_set.notices == [f"{CURVATURE} ({drive.id})"]
    assert greys(drive) == [*range(15)]
    np.testing.assert_allclose(drive.timestamps, np.arange(15) / 10, atol=1e-6)
    assert drive.log is not None
    assert drive.log.speed is not None
    assert drive.log.steering is not None
    assert drive.log.steering_kind == "curvature"
    np.testing.assert_allclose(drive.log.speed.times, np.arange(15) / 10, atol=1e-6)
    np.testing.assert_allclose(drive.log.speed.values, speeds, rtol=1e-6)
    # Both are positive to the left, as the yaw rate is: z points up.
    np.testing.assert_allclose(drive.log.steering.values, yaw_rates / speeds, rtol=1e-5, atol=1e-9)


def test_oxts_has_its_own_times(tmp_path: Path) -> None:
    write_kitti(tmp_path, late_ms=30)
    drive = only_drive(tmp_path, Reading(time_offset=0.5))
    assert drive.log is not None
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times, np.arange(15) / 10 + 0.53, atol=1e-6)


def test_the_colour_camera_is_read(tmp_path: Path) -> None:
    write_kitti(tmp_path / "a", cameras=("image_00", "image_03"))
    touch(tmp_path / "a", "velodyne_points/data/0000000000.bin", "tracklet_labels.xml")
    drive_set = find_drives([tmp_path])
    (drive,) = drive_set.drives
    assert drive.reader.files(np.array([3])) == [
        tmp_path / "a" / "image_03" / "data" / "0000000003.png"
    ]
    assert drive.notices[0] == "of its cameras, image_03 is read, and not image_00"
    assert drive_set.passed_over == [f"{tmp_path}: passed over 1 other file: 1 .xml"]


def test_the_curvature_of_a_slow_car_is_unknown(tmp_path: Path) -> None:
    speeds = [5.0] * 5 + [0.99, 0.5, 0.0, -0.2, 0.4] + [-1.0, 5.0, 5.0, 5.0, 5.0]
    write_kitti(tmp_path, speeds, [0.1] * 15)
    drive = only_drive(tmp_path)
    assert drive.notices[1] == "the curvature is unknown below 1 m/s: 33% of the time"
    sampled = sample(drive)
    assert sampled.action_valid[:, 0].all()
    assert sampled.action_valid[:, 1].tolist() == [True] * 4 + [False] * 6 + [True] * 5
    assert drive.log is not None
    assert drive.log.steering is not None
    assert drive.log.steering.values[5] == pytest.approx(-0.1)  # A car that reverses.
    write_kitti(tmp_path / "stands", [0.0] * 15, [0.0] * 15)
    stands = find_drives([tmp_path / "stands"]).drives[0]
    assert stands.log is not None
    assert stands.log.steering is None
    assert stands.log.steering_kind is None


def test_missing_pictures_and_samples_are_said(tmp_path: Path) -> None:
    write_kitti(tmp_path)
    (tmp_path / "image_02" / "data" / "0000000004.png").unlink()
    (tmp_path / "oxts" / "data" / "0000000007.txt").unlink()
    drive = only_drive(tmp_path)
    assert greys(drive) == [n for n in range(15) if n != 4]
    np.testing.assert_allclose(drive.timestamps[3:5], [0.3, 0.5], atol=1e-6)
    assert drive.notices[0].startswith("1 of 15 pictures are missing")
    assert drive.notices[1] == "1 of 15 samples of oxts are missing"
    assert drive.log is not None
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times[6:8], [0.6, 0.8], atol=1e-6)


def test_times_of_oxts_that_go_back_are_left_out(tmp_path: Path) -> None:
    write_kitti(tmp_path)
    stamps = kitti_stamps(15)
    stamps[8] = stamps[6]
    (tmp_path / "oxts" / "timestamps.txt").write_text("\n".join(stamps))
    drive = only_drive(tmp_path)
    assert drive.notices[0].startswith("1 samples of oxts are not later")
    assert drive.log is not None
    assert drive.log.speed is not None
    assert len(drive.log.speed.times) == 14
    (tmp_path / "oxts" / "timestamps.txt").write_text("\n".join(reversed(stamps)))
    assert "oxts: has 15 samples, " in reason(tmp_path)


def test_pictures_alone_are_a_drive(tmp_path: Path) -> None:
    write_kitti(tmp_path)
    (tmp_path / "oxts").rename(tmp_path / "elsewhere")
    drive = only_drive(tmp_path)
    assert drive.log is None
    assert drive.notices == ("there is no oxts, so there are no actions",)
    write_grey(tmp_path / "other" / "image_02" / "a.mp4")
    assert len(find_drives([tmp_path / "other"]).drives) == 1  # only looks like KITTI


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "image_02/timestamps.txt",
            "now\n",
            "image_02/timestamps.txt, line 1: 'now' is not a time",
        ),
        ("image_02/timestamps.txt", "2011-13-26 13:02:25\n", "line 1: '2011-13-26"),
        ("oxts/timestamps.txt", "", "oxts: has 0 samples"),
        ("oxts/data/0000000003.txt", "1 2 3", "0000000003.txt: must contain 30 numbers (it has 3)"),
        ("oxts/data/0000000003.txt", "x " * 30, "0000000003.txt: must contain 30 numbers (could"),
        ("oxts/data/0000000003.txt", "nan " * 30, "has speeds from nan"),
        ("oxts/data/0000000003.txt", "40 " * 30, "has yaw rates from 0.2 to 40 rad/s"),
        ("oxts/data/0000000003.txt", "1e300 " * 30, "has speeds from 10 to 1e+300 m/s"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    write_kitti(tmp_path)
    (tmp_path / name).write_text(text)
    assert message in reason(tmp_path)


def test_files_of_a_false_size_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_kitti(tmp_path)
    monkeypatch.setattr(kitti, "_MOST_TIMES_BYTES", 99)
    assert "timestamps.txt: cannot be read (it has more than 99 bytes)" in reason(tmp_path)


def test_only_files_of_the_recording_are_read(tmp_path: Path) -> None:
    write_kitti(tmp_path / "in")
    times = tmp_path / "in" / "image_02" / "timestamps.txt"
    times.rename(tmp_path / "times")
    times.symlink_to(tmp_path / "times")
    assert "is a link that leads outside" in reason(tmp_path / "in")
    times.unlink()
    os.mkfifo(times)
    assert "timestamps.txt: is no file" in reason(tmp_path / "in")
    times.unlink()
    (tmp_path / "times").rename(times)
    sample = tmp_path / "in" / "oxts" / "data" / "0000000003.txt"
    sample.rename(tmp_path / "sample")
    sample.symlink_to(tmp_path / "sample")
    assert "0000000003.txt: cannot be read" in reason(tmp_path / "in")


def test_a_rate_that_is_not_used_is_said(tmp_path: Path) -> None:
    write_kitti(tmp_path)
    line = "`video_fps` is not used, because the pictures have times"
    assert line in only_drive(tmp_path, Reading(video_fps=5)).notices
    assert line not in only_drive(tmp_path).notices


def test_the_kind_of_steering_is_checked(tmp_path: Path) -> None:
    write_kitti(tmp_path)
    assert "is curvature, but normalised is needed" in reason(
        tmp_path, Reading(steering_kind="normalised")
    )
