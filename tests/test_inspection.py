import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from driving_sim.data.inspection import Report, inspect_drives
from driving_sim.data.video_writer import write_video
from driving_sim.engine.errors import DriveSimError

TRACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "track"
DRIVES = [f"drive_{number:02d}" for number in range(8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve seconds of standing and driving, a video without actions, and two bad ones."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 255, (120, 32, 64, 3), np.uint8)
    frames[:60] = frames[0]
    videos = tmp_path / "videos"
    (videos / "trip").mkdir(parents=True)
    write_video(videos / "trip" / "a.mp4", frames, 10)
    rows = [f"{t / 10:.1f},{0 if t < 60 else 8},0" for t in range(121)]
    (videos / "trip" / "a.csv").write_text("\n".join(["t,speed,road_wheel_rad", *rows]))
    write_video(videos / "b.mp4", frames[:10], 10)
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
    assert (bare.id, bare.valid_share, bare.steering_range) == ("b", 0, None)
    assert [skipped.id for skipped in report.skipped] == ["empty"]
    text = report.table()
    for word in ("trip/a", "0.0 to 8.0", "skipped (1)", "empty.mp4", "speed is taken to be in m/s"):
        assert word in text


def test_the_files_are_whole(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = inspect_drives([folder], out)
    assert json.loads((out / "inspection.json").read_text()) == json.loads(
        json.dumps(report.to_dict())
    )
    for drive in report.drives:
        with Image.open(out / str(drive.picture)) as picture:
            assert picture.width > 800
    assert len(list(out.rglob("*.*"))) == 3


def test_a_picture_that_moves_while_the_car_stands_is_said(folder: Path, tmp_path: Path) -> None:
    path = folder / "trip" / "a.csv"
    rows = [f"{t / 10:.1f},{8 if t < 60 else 0},0" for t in range(121)]
    path.write_text("\n".join(["t,speed,road_wheel_rad", *rows]))
    (problem,) = inspect_drives([folder / "trip"], tmp_path / "out").drives[0].problems
    assert "changes more where the speed is 0" in problem


def test_a_speed_no_car_drives_is_said(folder: Path, tmp_path: Path) -> None:
    path = folder / "trip" / "a.csv"
    path.write_text(path.read_text().replace(",8,", ",80,"))
    (problem,) = inspect_drives([folder / "trip"], tmp_path / "out").drives[0].problems
    assert "80 m/s (288 km/h)" in problem


def test_nothing_to_inspect_is_an_error_that_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(DriveSimError, match="holds no videos"):
        inspect_drives([tmp_path / "videos"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def copy_with_steering(name: str, folder: Path, *, shift: int, scale: float) -> Path:
    """A drive of the track, its steering column moved down by `shift` rows and scaled."""
    shutil.copyfile(TRACK / f"{name}.mp4", folder / f"{name}.mp4")
    with (TRACK / f"{name}.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    steering = [row[2] for row in rows]
    moved = [steering[max(0, min(n - shift, len(rows) - 1))] for n in range(len(rows))]
    changed = [
        [*row[:2], str(scale * float(value))] for row, value in zip(rows, moved, strict=True)
    ]
    with (folder / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *changed])
    return folder / f"{name}.mp4"


def inspect_track(names: list[str], folder: Path, *, shift: int = 0, scale: float = 1.0) -> Report:
    if not TRACK.exists():
        pytest.skip(f"{TRACK} is not here")
    videos = [copy_with_steering(name, folder, shift=shift, scale=scale) for name in names]
    return inspect_drives(videos, folder / "out", steering_kind="road_wheel")


def test_the_track_is_in_order(tmp_path: Path) -> None:
    report = inspect_track(DRIVES, tmp_path)
    assert [drive.id for drive in report.drives] == DRIVES
    for drive in report.drives:
        assert drive.synchrony.lag_frames in (0, -1), drive.id
        assert drive.synchrony.sign == 1, drive.id
    # In drive_04 the car reverses, and the simulator's speed has no sign.
    assert [drive.id for drive in report.drives if drive.problems] == ["drive_04"]
    assert "reverses" in report.drives[4].problems[0]


@pytest.mark.parametrize(
    ("shift", "scale", "lags", "word"),
    [(0, -1, (0, -1), "flipped"), (5, 1, (5, 4), " late"), (-5, 1, (-5, -6), " early")],
)
def test_spoilt_steering_is_said(
    tmp_path: Path, shift: int, scale: float, lags: tuple[int, int], word: str
) -> None:
    report = inspect_track(["drive_03"], tmp_path, shift=shift, scale=scale)
    for drive in report.drives:
        assert drive.synchrony.lag_frames in lags
        assert drive.synchrony.sign == scale
        assert any(word in problem for problem in drive.problems)
        assert word.strip() in report.table()
