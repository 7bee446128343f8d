"""Recordings whose lag, sign and units are known get no false verdict."""

from pathlib import Path

import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.inspect.inspection import inspect_drives
from driving_sim.data.inspect.report import DriveReport
from tests import SHARED
from tests.fixtures.video_files import needs_shared

pytestmark = needs_shared


def inspected(name: str, out: Path, reading: Reading) -> DriveReport:
    (drive,) = inspect_drives([SHARED / name], out / "out", reading).drives
    return drive


def test_a_stray_last_picture_causes_no_verdict(tmp_path: Path) -> None:
    drive = inspected("format/udacity_stray_last", tmp_path, Reading())
    assert drive.problems == ()
    assert drive.synchrony.lag_frames in (None, 0)


@pytest.mark.parametrize(
    ("name", "lags"),
    [
        ("003", {None}),  # It stands, and slides for 3 s at the start.
        ("031", {0, 1}),  # It crashes after half of the time.
        ("035", {0, -1}),  # It skids for 3 s.
        ("039", {0, 1}),
    ],
)
def test_a_simulated_car_that_skids_or_crashes(
    name: str, lags: set[int | None], tmp_path: Path
) -> None:
    reading = Reading(steering_kind="road_wheel")
    drive = inspected(f"torcs/train/drive_{name}.mp4", tmp_path, reading)
    assert drive.problems == ()
    assert drive.synchrony.lag_frames in lags


def test_a_model_car_with_a_slow_camera(tmp_path: Path) -> None:
    """The picture answers the wheel 3 to 4 frames late, as a real one may."""
    reading = Reading(steering_kind="normalised")
    drive = inspected("rc/outdoor/drive_17.mp4", tmp_path, reading)
    assert drive.problems == ()
    assert (drive.synchrony.lag_frames, drive.synchrony.sign) == (-4, 1)
    assert "set `wheelbase`" in drive.synchrony.notices[0]
    assert "a wheelbase of 2.7 m (`wheelbase`) and 0.5 rad at full lock" in drive.notices[-1]
    small = Reading(steering_kind="normalised", wheelbase=0.5)
    drive = inspected("rc/outdoor/drive_17.mp4", tmp_path, small)
    assert (drive.problems, drive.synchrony.notices) == ((), ())
    assert drive.notices[-1] == "the check of the units assumes a car with 0.5 rad at full lock"


def test_a_dark_course_says_nothing_of_units(tmp_path: Path) -> None:
    reading = Reading(steering_kind="normalised")
    drive = inspected("rc/indoor/drive_05.mp4", tmp_path, reading)
    assert drive.problems == ()
    assert (drive.synchrony.lag_frames, drive.synchrony.sign) == (-3, 1)
    assert "cannot be checked: the picture has too little texture" in drive.synchrony.notices[0]
