from pathlib import Path

import pytest

from driving_sim.data.sources import find_drives
from driving_sim.engine.errors import DriveSimError
from tests.data.sources.recordings import touch, write_actions, write_grey


def write_route(folder: Path, *names: str, before: str = "") -> None:
    write_grey(*(folder / f"{before}{name}" for name in names))
    touch(folder, f"{before}rlog.zst", f"{before}qlog.zst")


LOGS = (
    "passed over qlog.zst and rlog.zst: openpilot's logs are not read; for actions, put a CSV "
    "beside each video"
)
DRIVER = "passed over dcamera.hevc: the camera shows the driver"
COPY = "passed over qcamera.ts: the same pictures as fcamera, but small"
ALL = ("dcamera.hevc", "ecamera.hevc", "fcamera.hevc", "qcamera.ts")


def test_the_cameras_of_the_road_become_drives(tmp_path: Path) -> None:
    first, second = tmp_path / "r--0", tmp_path / "r--1"
    write_route(first, *ALL)
    write_route(second, *ALL)
    write_actions(first / "fcamera.csv")
    touch(first, "dcamera.csv", "bootlog")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == [
        *("r--0/ecamera", "r--0/fcamera", "r--1/ecamera", "r--1/fcamera")
    ]
    assert [drive.log is not None for drive in drive_set.drives] == [False, True, False, False]
    assert drive_set.skipped == []
    assert drive_set.passed_over == [
        *(f"{first} (and 1 more folder): {line}" for line in (DRIVER, COPY, LOGS)),
        f"{tmp_path}: passed over 1 other file: 1 without a suffix",
    ]


def test_the_small_copy_is_read_if_there_is_nothing_better(tmp_path: Path) -> None:
    write_grey(tmp_path / "qcamera.ts", tmp_path / "dcamera.mp4")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["qcamera"]
    assert drive_set.passed_over == [
        f"{tmp_path}: passed over dcamera.mp4: the camera shows the driver"
    ]


def test_downloaded_files_begin_with_the_route(tmp_path: Path) -> None:
    for minute in range(3):
        write_route(tmp_path, *ALL[:3], before=f"a--{minute}--")
    write_grey(tmp_path / "a--3--qcamera.ts", tmp_path / "trip.mp4")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == [
        *(f"a--{n}--{camera}" for n in range(3) for camera in ("ecamera", "fcamera")),
        *("a--3--qcamera", "trip"),
    ]
    driver, logs = drive_set.passed_over
    assert "a--0--dcamera.hevc and 2 more" in driver
    assert "a--0--qlog.zst and 5 more" in logs


def test_a_route_without_pictures_is_named(tmp_path: Path) -> None:
    write_route(tmp_path)
    with pytest.raises(DriveSimError, match=r"qlog\.zst and rlog\.zst: openpilot's logs are not"):
        find_drives([tmp_path])


def test_the_drivers_camera_is_read_if_its_file_is_named(tmp_path: Path) -> None:
    write_route(tmp_path, "dcamera.hevc")
    assert len(find_drives([tmp_path / "dcamera.hevc"]).drives) == 1
