"""Tests of CSVs that name pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.engine.errors import DriveSimError
from tests.data.sources.recordings import (
    greys,
    only_drive,
    reason,
    touch,
    write_csv,
    write_grey,
    write_pictures,
)

COUNT = 12
NUMBERED = [f"frame_{n:04}.png" for n in range(COUNT)]
EPOCH = 1_532_402_927_612_460
STAMPED = [f"cam__{EPOCH + 100_000 * n}.png" for n in range(COUNT)]


def test_a_csv_names_the_pictures_in_each_row(tmp_path: Path) -> None:
    names = [f"photos/IMG_{n * n}.png" for n in range(COUNT)]  # no series of their own
    write_pictures(tmp_path, names)
    rows: list[list[object]] = [[name, 100 * n, 36, 5 * n] for n, name in enumerate(names)]
    write_csv(tmp_path / "a.csv", "image,timestamp_ms,speed_kmh,road_wheel_deg", rows)
    drive = only_drive(tmp_path)
    assert (drive.source, drive.notices) == ("pictures", ())
    np.testing.assert_allclose(drive.timestamps, np.arange(COUNT) / 10)
    assert greys(drive) == [*range(COUNT)]
    sampled = sample(drive)
    assert sampled.action_valid.all()
    np.testing.assert_allclose(sampled.actions[:, 0], 10, rtol=1e-5)
    middle = np.radians(5 * (np.arange(COUNT - 1) + 0.5))
    np.testing.assert_allclose(sampled.actions[:-1, 1], middle, rtol=1e-5)


def test_a_csv_on_a_clock_since_1970_gives_times_and_actions_together(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    rows: list[list[object]] = [
        [name, f"{1.5e9 + n / 5:.1f}", n] for n, name in enumerate(NUMBERED)
    ]
    write_csv(tmp_path / "a.csv", "file,t,speed_mps", rows)
    drive = only_drive(tmp_path, Reading(time_offset=0.1))
    np.testing.assert_allclose(drive.timestamps, np.arange(COUNT) / 5, atol=1e-6)
    assert drive.log is not None
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times, np.arange(COUNT) / 5 + 0.1, atol=1e-6)


def test_a_csv_without_times_takes_those_in_the_names_or_the_rate(tmp_path: Path) -> None:
    for folder, names in (("rate", NUMBERED), ("stamps", STAMPED)):
        write_pictures(tmp_path / folder, names)
        rows: list[list[object]] = [[name, n] for n, name in enumerate(names)]
        write_csv(tmp_path / folder / "a.csv", "image,speed_mps", rows)
    drive = only_drive(tmp_path / "stamps")
    assert drive.notices == ()
    np.testing.assert_allclose(drive.timestamps, np.arange(COUNT) / 10, atol=1e-5)
    np.testing.assert_allclose(sample(drive).actions[:-1, 0], np.arange(COUNT - 1) + 0.5, atol=1e-3)
    drive = only_drive(tmp_path / "rate", Reading(video_fps=6))
    np.testing.assert_allclose(drive.timestamps, np.arange(COUNT) / 6)
    np.testing.assert_allclose(sample(drive).actions[:-1, 0], np.arange(COUNT - 1) + 0.5)
    (line,) = drive.notices
    assert line.endswith("6 frames/s are taken, as `video_fps` says")


def test_the_drive_begins_with_the_first_picture_that_is_there(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    (tmp_path / NUMBERED[0]).unlink()
    rows: list[list[object]] = [[name, n / 10, n] for n, name in enumerate(NUMBERED)]
    write_csv(tmp_path / "a.csv", "image,t,speed_mps", rows)
    sampled = sample(only_drive(tmp_path))
    np.testing.assert_allclose(sampled.timestamps, np.arange(COUNT - 1) / 10, atol=1e-9)
    np.testing.assert_allclose(sampled.actions[:-1, 0], np.arange(COUNT - 2) + 1.5, rtol=1e-5)


def test_each_csv_that_names_pictures_is_a_drive(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set" / "images", NUMBERED)
    for name, part in (("train", NUMBERED[:8]), ("test", NUMBERED[8:])):
        rows: list[list[object]] = [[f"images/{p}", n / 10] for n, p in enumerate(part)]
        write_csv(tmp_path / "set" / f"{name}.csv", "image,t", rows)
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["set/test", "set/train"]
    assert [greys(drive) for drive in drive_set.drives] == [[*range(8, COUNT)], [*range(8)]]
    assert drive_set.passed_over == []
    assert drive_set.drives[0].notices == ("test.csv has neither speed nor steering",)


def test_pictures_that_a_csv_misses_or_repeats_are_said(tmp_path: Path) -> None:
    write_pictures(tmp_path, [*NUMBERED, "other.png"])
    named = [NUMBERED[0], NUMBERED[0], *NUMBERED[1:5], *NUMBERED[6:]]
    (tmp_path / NUMBERED[3]).unlink()
    rows: list[list[object]] = [[name, n / 10, 1] for n, name in enumerate(named)]
    write_csv(tmp_path / "a.csv", "image,t,speed_mps", rows)
    drive_set = find_drives([tmp_path])
    (drive,) = drive_set.drives
    assert greys(drive) == [0, 1, 2, 4, *range(6, COUNT)]
    np.testing.assert_allclose(drive.timestamps[:4], [0, 0.2, 0.3, 0.5])
    repeated, missing = drive.notices
    assert repeated.startswith("1 rows of a.csv name the same picture")
    assert missing == "1 of 11 pictures are missing; they are left out, which leaves gaps"
    assert drive_set.passed_over == [
        f"{tmp_path}: 2 pictures that no CSV names are left out (the first is frame_0005.png)"
    ]


def test_paths_of_another_computer_and_several_cameras(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pics", NUMBERED)
    rows: list[list[object]] = [
        [f"D:\\x\\left_{n}.png", f"D:\\x\\{name}", n / 10] for n, name in enumerate(NUMBERED)
    ]
    write_csv(tmp_path / "a.csv", "left,center,t", rows)
    drive = only_drive(tmp_path)
    assert greys(drive) == [*range(COUNT)]
    assert drive.log is None
    cameras, foreign, actions = drive.notices
    assert "center is read" in cameras
    assert "another computer" in foreign
    assert actions == "a.csv has neither speed nor steering"


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/a/../x.png", "..\\secret.png", "a\x1bb.png"]
)
def test_a_name_that_leads_outside_is_an_error(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path, ["secret.png"])
    write_pictures(tmp_path / "in", NUMBERED)
    rows: list[list[object]] = [[name, n / 10] for n, name in enumerate(NUMBERED)]
    rows[4][0] = name
    write_csv(tmp_path / "in" / "a.csv", "image,t", rows)
    assert "a.csv, line 6: " in reason(tmp_path / "in")


@pytest.mark.parametrize(("time", "line"), [("0.2", 5), ("nan", 5), ("1e300", None), ("x", 5)])
def test_bad_times_name_the_line(tmp_path: Path, time: str, line: int | None) -> None:
    write_pictures(tmp_path, NUMBERED)
    rows: list[list[object]] = [[name, n / 10, 1] for n, name in enumerate(NUMBERED)]
    rows[3 if line else -1][1] = time
    write_csv(tmp_path / "a.csv", "image,t,speed_mps", rows)
    assert f"a.csv, line {line}: " in reason(tmp_path) if line else "days" in reason(tmp_path)


def write_named(path: Path, header: str, names: list[str], *cells: Sequence[object]) -> None:
    """Write a CSV whose rows are names of pictures, and further cells."""
    write_csv(path, header, [list(row) for row in zip(names, *cells, strict=True)])


TENTHS: list[object] = [n / 10 for n in range(COUNT)]
SPEEDS: list[object] = [*range(COUNT)]


def test_a_missing_picture_leaves_the_times_in_the_names(tmp_path: Path) -> None:
    write_pictures(tmp_path, [*STAMPED, "odd.png"])
    (tmp_path / STAMPED[5]).unlink()
    names = [*STAMPED[:3], STAMPED[2], "odd.png", *STAMPED[3:]]
    write_named(tmp_path / "a.csv", "image,speed_mps", names, [0, 1, 2, 90, 90, *range(3, COUNT)])
    drive = only_drive(tmp_path)
    kept = [n for n in range(COUNT) if n != 5]
    assert greys(drive) == kept
    np.testing.assert_allclose(drive.timestamps, np.array(kept) / 10, atol=1e-5)
    assert drive.log is not None
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times, np.arange(COUNT) / 10, atol=1e-5)
    np.testing.assert_allclose(drive.log.speed.values, np.arange(COUNT))
    assert "2 rows of a.csv have no time of their own in the picture's name" in drive.notices[-1]


def test_a_column_frame_is_the_clock_at_the_rate(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    frames: list[object] = [2 * n + 7 for n in range(COUNT)]
    write_named(tmp_path / "a.csv", "image,frame,speed_mps", NUMBERED, frames, SPEEDS)
    drive = only_drive(tmp_path, Reading(video_fps=8))
    np.testing.assert_allclose(drive.timestamps, np.arange(COUNT) / 4)
    assert drive.log is not None
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times, np.arange(COUNT) / 4)
    assert drive.notices[0].endswith(
        "8 frames/s are taken, as `video_fps` says; the column frame of a.csv counts the frames"
    )


@pytest.mark.parametrize("start", ["\\\\server\\x\\", "D:\\", "/mnt/"])
def test_a_path_of_another_computer_leads_to_the_camera_that_it_names(
    tmp_path: Path, start: str
) -> None:
    for camera in ("left", "right"):
        write_pictures(tmp_path / camera, NUMBERED)
    names = [f"{start}right\\{name}" for name in NUMBERED]
    write_named(tmp_path / "a.csv", "image,t", names, TENTHS)
    drive_set = find_drives([tmp_path])
    assert drive_set.skipped == []
    left, drive = sorted(drive_set.drives, key=lambda drive: len(drive.notices))
    assert drive.reader.files(np.array([3])) == [tmp_path / "right" / NUMBERED[3]]
    assert "another computer" in drive.notices[0]
    assert left.id.endswith("left")


@pytest.mark.parametrize("start", ["D:\\x\\", ""])
def test_the_pictures_of_other_cameras_are_no_drive_of_their_own(
    tmp_path: Path, start: str
) -> None:
    for camera in ("left", "center"):
        write_pictures(tmp_path / camera, NUMBERED)
    left, center = ([f"{start}{camera}\\{n}" for n in NUMBERED] for camera in ("left", "center"))
    write_named(tmp_path / "a.csv", "left,center,t", left, center, TENTHS)
    drive = only_drive(tmp_path)
    assert drive.reader.files(np.array([3])) == [tmp_path / "center" / NUMBERED[3]]


@pytest.mark.parametrize("start", ["D:\\pics\\", "", "pics/"])
def test_the_folder_is_found_even_if_the_first_picture_is_missing(
    tmp_path: Path, start: str
) -> None:
    write_pictures(tmp_path / "pics", NUMBERED)
    (tmp_path / "pics" / NUMBERED[0]).unlink()
    write_named(tmp_path / "a.csv", "image,t", [start + name for name in NUMBERED], TENTHS)
    assert greys(only_drive(tmp_path)) == [*range(1, COUNT)]


@pytest.mark.parametrize("start", ["C:\\x\\", ""])
def test_a_picture_in_several_folders_is_an_error(tmp_path: Path, start: str) -> None:
    for camera in ("left", "right"):
        write_pictures(tmp_path / camera, NUMBERED)
    write_named(tmp_path / "a.csv", "image,t", [start + name for name in NUMBERED], TENTHS)
    (skipped,) = find_drives([tmp_path]).skipped
    assert "several folders have the picture frame_0000.png: left, right" in skipped.reason


@pytest.mark.parametrize("start", ["C:\\x\\", ""])
def test_a_csv_of_several_folders_is_an_error_and_nothing_is_read_twice(
    tmp_path: Path, start: str
) -> None:
    for day in ("monday", "tuesday"):
        write_pictures(tmp_path / day, NUMBERED)
    names = [f"{start}{day}\\{name}" for day in ("monday", "tuesday") for name in NUMBERED]
    write_named(tmp_path / "a.csv", "image,t", names, [n / 10 for n in range(2 * COUNT)])
    message = reason(tmp_path)
    assert "it names pictures in" in message
    assert "monday" in message
    assert message.endswith("tuesday; split the CSV by folder")


@pytest.mark.parametrize(
    ("names", "header"),
    [
        (["rome.jpg", "paris.jpg"], "image,caption"),
        ([f"IMG_{n:04}.jpg" for n in range(COUNT)], "image,caption"),
        ([f"thumb_{n:04}.jpg" for n in range(COUNT)], "thumbnail,title"),
    ],
)
def test_a_csv_about_photos_or_thumbnails_is_another_file(
    tmp_path: Path, names: list[str], header: str
) -> None:
    write_pictures(tmp_path, names)
    write_named(tmp_path / "index.csv", header, names, ["x"] * len(names))
    write_grey(tmp_path / "a.mp4")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["a"]
    (line,) = drive_set.passed_over
    assert line.endswith(f"{len(names)} .jpg, 1 .csv")


@pytest.mark.parametrize(
    ("header", "reading"),
    [("image,frame", Reading()), ("image,speed", Reading()), ("image,v", Reading(speed="V"))],
)
def test_a_csv_about_a_drive_of_any_pictures_is_one(
    tmp_path: Path, header: str, reading: Reading
) -> None:
    names = [f"IMG_{n * n}.jpg" for n in range(COUNT)]
    write_pictures(tmp_path, names)
    write_named(tmp_path / "a.csv", header, names, SPEEDS)
    assert len(only_drive(tmp_path, reading).timestamps) == COUNT


def test_what_lies_beside_the_pictures_of_a_csv_is_still_found(tmp_path: Path) -> None:
    names = [f"in/{name}" for name in NUMBERED]
    write_pictures(tmp_path, names)
    write_named(tmp_path / "a.csv", "image,t", names, TENTHS)
    write_grey(tmp_path / "in" / "film.mp4", tmp_path / "in" / "more" / "b.mp4")
    touch(tmp_path / "in", "notes.txt")
    drive_set = find_drives([tmp_path])
    name = tmp_path.name
    assert sorted(d.id.removeprefix(f"{name}/") for d in drive_set.drives) == [
        "in/film",
        "in/more/b",
        name,
    ]
    assert drive_set.passed_over == [f"{tmp_path}: passed over 1 other file: 1 .txt"]


def test_a_rate_that_is_not_used_is_said(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    write_named(tmp_path / "a.csv", "image,t,speed_mps", NUMBERED, TENTHS, SPEEDS)
    drive = only_drive(tmp_path, Reading(video_fps=8))
    assert drive.notices == ("`video_fps` is not used, because the pictures have times",)


def test_a_clock_that_starts_again_is_where_to_split(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    times = [n % 8 / 10 for n in range(COUNT)]
    write_named(tmp_path / "a.csv", "image,t", NUMBERED, times)
    assert "a.csv, line 10: " in reason(tmp_path)
    assert "split the CSV there" in reason(tmp_path)


def test_the_bad_name_of_a_csv_is_shown(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    for name in ("a.csv", "b\x1b.csv"):
        write_named(tmp_path / name, "image,t", NUMBERED, TENTHS)
    with pytest.raises(DriveSimError, match=r"name would be '[^']*/b\\x1b', which contains con"):
        find_drives([tmp_path])


def test_a_file_that_is_no_csv_is_no_table(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    (tmp_path / "a.csv").write_text(" \n1.jpg\nimage,t\n0.1,2\n")
    drive_set = find_drives([tmp_path])
    assert [len(drive.timestamps) for drive in drive_set.drives] == [COUNT]
