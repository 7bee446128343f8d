import csv
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import Drive, sample
from driving_sim.data.inspect.inspection import _caption, inspect_drives
from driving_sim.data.inspect.motion import yaw_motion
from driving_sim.data.inspect.steering_check import measure_synchrony
from driving_sim.data.sources import find_drives
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.writer import write_video
from driving_sim.engine.errors import DriveSimError
from tests import SHARED
from tests.fixtures.video_files import damage, write_numbered, write_undecodable

TRACK = SHARED / "track"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A drive that stands and then drives for 12 s, a video without actions, and an empty file."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 255, (120, 32, 64, 3), np.uint8)
    frames[:60] = frames[0]
    videos = tmp_path / "videos"
    (videos / "trip").mkdir(parents=True)
    write_video(videos / "trip" / "a.mp4", frames, 10)
    rows = [f"{t / 10:.1f},{0 if t < 60 else 8},0" for t in range(121)]
    (videos / "trip" / "a.csv").write_text("\n".join(["t,speed,road_wheel_rad", *rows]))
    write_video(videos / "b $x$ $.mp4", frames[:10], 10)
    (videos / "empty.mp4").touch()
    return videos


def test_the_report_names_drives_actions_and_what_is_skipped(folder: Path, tmp_path: Path) -> None:
    report = inspect_drives([folder], tmp_path / "out")
    bare, drive = report.drives
    assert (drive.id, drive.frames, drive.gaps) == ("trip/a", 120, 0)
    assert drive.fps == pytest.approx(10, rel=1e-3)
    assert drive.speed_range_mps == pytest.approx((0, 8))
    assert drive.steering_kind == "road_wheel"
    assert drive.problems == ()
    assert (bare.id, bare.valid_share, bare.steering_range) == ("b $x$ $", 0, None)
    assert [skipped.id for skipped in report.skipped] == ["empty"]
    text = report.table()
    for word in ("trip/a", "0.0 to 8.0", "skipped (1)", "empty.mp4", "speed is taken to be in m/s"):
        assert word in text


def test_the_caption_leaves_the_remedies_out() -> None:
    lines = ["the actions are 3 frames late: shift them by `time_offset=-0.30`", "a; do b"]
    assert _caption(lines) == "the actions are 3 frames late; a"
    assert _caption([]) == "no problems found"


def test_ranges_are_percentiles(tmp_path: Path) -> None:
    frames = np.zeros((1000, 32, 64, 3), np.uint8)
    write_video(tmp_path / "a.mp4", frames, 10)
    # One outlier among 1,000 rows.
    rows = [f"{t / 10:.1f},{90 if t == 500 else t / 100},0" for t in range(1001)]
    (tmp_path / "a.csv").write_text("\n".join(["t,speed,road_wheel_rad", *rows]))
    (drive,) = inspect_drives([tmp_path], tmp_path / "out").drives
    assert drive.speed_range_mps == pytest.approx((0.1, 9.9), abs=0.05)


def test_the_json_and_the_pictures_are_complete(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = inspect_drives([folder], out)
    assert json.loads((out / "inspection.json").read_text()) == json.loads(
        json.dumps(asdict(report))
    )
    for drive in report.drives:
        with Image.open(out / str(drive.picture)) as picture:
            assert picture.width > 800
    assert len(list(out.rglob("*.*"))) == 3


def test_an_error_while_writing_a_picture_skips_no_drive(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise DriveSimError(f"cannot write {path}")

    monkeypatch.setattr("driving_sim.data.inspect.inspection.draw_drive", full)
    with pytest.raises(DriveSimError, match="cannot write"):
        inspect_drives([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_inspection_is_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    inspect_drives([folder], out)
    inspect_drives([folder / "trip"], out)
    assert {path.name for path in out.rglob("*.*")} == {"inspection.json", "a.png"}
    (out / "notes.txt").touch()
    for occupied in (out, folder):
        with pytest.raises(DriveSimError, match="do not belong to an inspection"):
            inspect_drives([folder], occupied)
    assert (out / "notes.txt").exists()


def test_a_moving_picture_of_a_standing_car_is_reported(folder: Path, tmp_path: Path) -> None:
    path = folder / "trip" / "a.csv"
    rows = [f"{t / 10:.1f},{8 if t < 60 else 0},0" for t in range(121)]
    path.write_text("\n".join(["t,speed,road_wheel_rad", *rows]))
    (problem,) = inspect_drives([folder / "trip"], tmp_path / "out").drives[0].problems
    assert "changes more while the speed is 0" in problem


def test_a_speed_that_no_car_reaches_is_reported(folder: Path, tmp_path: Path) -> None:
    path = folder / "trip" / "a.csv"
    path.write_text(path.read_text().replace(",8,", ",80,"))
    (problem,) = inspect_drives([folder / "trip"], tmp_path / "out").drives[0].problems
    assert "80 m/s (288 km/h)" in problem


def test_a_wheelbase_needs_drives_in_its_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match=r"`wheelbase` c=0\.26: no drive in c was read"):
        inspect_drives([folder], tmp_path / "out", reading=Reading(wheelbase={"c": 0.26}))
    assert not (tmp_path / "out").exists()


def test_nothing_to_inspect_is_an_error_that_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(DriveSimError, match="holds no videos"):
        inspect_drives([tmp_path / "videos"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_inspection_without_any_readable_drive_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file fails when its facts are read, the other one when it is decoded."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "empty.mp4").touch()
    write_undecodable(videos / "damaged.hevc")
    with pytest.raises(DriveSimError, match="every drive was skipped"):
        inspect_drives([videos], out)
    said = capsys.readouterr().err
    assert "skipped empty: " in said
    assert "skipped damaged: " in said
    assert not out.exists()


def copy_with_steering(name: str, folder: Path, *, shift: int, scale: float) -> Path:
    """Copy a drive of the track with its steering column scaled and moved down by `shift` rows."""
    shutil.copyfile(TRACK / f"{name}.mp4", folder / f"{name}.mp4")
    with (TRACK / f"{name}.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    steering = np.roll([scale * float(row[2]) for row in rows], shift)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerow(header)
        csv.writer(file).writerows(
            [*row[:2], value] for row, value in zip(rows, steering, strict=True)
        )
    return folder / f"{name}.mp4"


def test_a_late_and_flipped_csv_of_a_real_drive_is_reported(tmp_path: Path) -> None:
    if not TRACK.exists():
        pytest.skip(f"{TRACK} is not here")
    video = copy_with_steering("drive_03", tmp_path, shift=5, scale=-1)
    report = inspect_drives([video], tmp_path / "out", Reading(steering_kind="road_wheel"))
    (drive,) = report.drives
    assert drive.synchrony.lag_frames in (4, 5)
    assert drive.synchrony.sign == -1
    assert len(drive.problems) == 2
    text = report.table()
    assert "frames by which the actions come later (+) or earlier (-)" in text
    assert "late compared with the motion in the picture" in text
    assert "FLIPPED" in text


@pytest.fixture(scope="module")
def track() -> list[tuple[Drive, npt.NDArray[np.float32]]]:
    """The eight real drives, each with its image motion."""
    if not TRACK.exists():
        pytest.skip(f"{TRACK} is not here")
    drives = find_drives([TRACK], Reading(steering_kind="road_wheel")).drives
    size = FrameSize(height=64, width=128)
    return [(drive, yaw_motion(np.stack(list(drive.stream(size))))) for drive in drives]


@pytest.mark.parametrize(
    ("shift", "scale", "lags", "word"),
    [
        (0, 1, (-1, 0), None),
        (0, -1, (-1, 0), "flipped"),
        (5, 1, (4, 5), " late"),
        (-5, 1, (-6, -5), " early"),
    ],
)
def test_lag_and_sign_of_every_real_drive_are_found(
    track: list[tuple[Drive, npt.NDArray[np.float32]]],
    shift: int,
    scale: int,
    lags: tuple[int, int],
    word: str | None,
) -> None:
    assert len(track) == 8
    for drive, motion in track:
        assert drive.log is not None
        assert drive.log.steering is not None
        values = scale * np.roll(drive.log.steering.values, shift)
        steering = replace(drive.log.steering, values=values)
        spoilt = replace(drive, log=replace(drive.log, steering=steering))
        synchrony = measure_synchrony(motion, sample(spoilt))
        assert synchrony.lag_frames in lags, drive.id
        assert synchrony.sign == scale, drive.id
        # In drive_04 the car reverses, but the simulator records no sign of the speed.
        reverses = [problem for problem in synchrony.problems if "reverses" in problem]
        assert bool(reverses) == (drive.id == "drive_04")
        other_problems = [problem for problem in synchrony.problems if problem not in reverses]
        assert len(other_problems) == (word is not None), drive.id
        assert word is None or word in other_problems[0]


def test_a_damaged_stretch_is_named_and_its_frames_are_not_measured(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    damage(write_numbered(videos / "a.mp4", count=60), 24, 24)
    rows = [f"{t / 20},{5},0" for t in range(61)]
    (videos / "a.csv").write_text("\n".join(["t,speed_mps,road_wheel_rad", *rows]))
    report = inspect_drives([videos], tmp_path / "out")
    (drive,) = report.drives
    (notice,) = report.notices
    assert re.match(
        r"damaged at 1\.\d\d to 1\.\d\d s; the 1\d frames there are left out \(a\)", notice
    )
    assert json.loads((tmp_path / "out" / "inspection.json").read_text())["notices"] == [notice]
    assert notice in report.table()
    assert (drive.frames, drive.gaps) == (60, 0)
